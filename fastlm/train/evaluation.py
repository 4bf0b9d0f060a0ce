"""The loss on held-out text."""

from __future__ import annotations

from itertools import islice

import torch

from fastlm.models import Model
from fastlm.tasks import Task
from fastlm.train.parallel import ALONE, World


@torch.no_grad()
def evaluate(
    model: Model, task: Task, dtype: torch.dtype, world: World = ALONE, sharded: bool = False
) -> dict[str, float]:
    """What `Task.evaluated` makes of the mean loss over `Task.evaluation`; the model is left as it was.

    The processes of `world` divide the micro-batches among them, but with a `sharded` model: each forward then needs
    every process, and all of them run all.
    """
    device, training = next(model.parameters()).device, model.training
    share = (0, 1) if sharded else (world.rank, world.size)
    losses, predicted = [torch.zeros((), dtype=torch.float64, device=device)], 0
    model.eval()
    try:
        for micro in islice(task.evaluation(), share[0], None, share[1]):
            moved = micro.to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses.append(model(**moved.inputs).double())
            predicted += micro.counts.predicted
    finally:
        model.train(training)
        if sharded:
            model.reshard()  # after a forward without backward the last group holds whole weights
    sums = torch.stack([torch.stack(losses).sum(), torch.tensor(float(predicted), dtype=torch.float64, device=device)])
    loss, predicted = (sums if sharded else world.sum(sums)).tolist()
    return task.evaluated(loss / max(1.0, predicted))
