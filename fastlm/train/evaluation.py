"""The loss on held-out text."""

from __future__ import annotations

import torch

from fastlm.models import Model
from fastlm.tasks import Task


@torch.no_grad()
def evaluate(model: Model, task: Task, dtype: torch.dtype) -> dict[str, float]:
    """What `Task.evaluated` makes of the mean loss over `Task.evaluation`; the model is left as it was."""
    device, training = next(model.parameters()).device, model.training
    losses, predicted = [], 0
    model.eval()
    try:
        for micro in task.evaluation():
            moved = micro.to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses.append(model(**moved.inputs).double())
            predicted += micro.counts.predicted
    finally:
        model.train(training)
    return task.evaluated(float(torch.stack(losses).sum()) / max(1, predicted))
