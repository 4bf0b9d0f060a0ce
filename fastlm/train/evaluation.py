"""The loss on held-out data, and the figures of what a model says of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from fastlm.models import Model
from fastlm.tasks import Task
from fastlm.tasks._labelled import reading_notes
from fastlm.train.parallel import ALONE, World


class Evaluation(NamedTuple):
    """figures: val_loss and what else the task says; outputs: of a scored task, else None"""

    figures: dict[str, float]
    outputs: np.ndarray | None


def evaluate(
    model: Model, task: Task, dtype: torch.dtype, world: World = ALONE, sharded: bool = False
) -> dict[str, float]:
    """The figures of `evaluation`."""
    return evaluation(model, task, dtype, world, sharded).figures


@torch.no_grad()
def evaluation(model: Model, task: Task, dtype: torch.dtype, world: World = ALONE, sharded: bool = False) -> Evaluation:
    """What `Task.evaluated` makes of the mean loss over `Task.evaluation`, and `Task.scores` of the outputs.

    The model is left as it was. The processes of `world` divide the micro-batches among them, but with a `sharded`
    model: each forward then needs every process, and all of them run all. The result is the same in each.
    """
    device, training = next(model.parameters()).device, model.training
    share = (0, 1) if sharded else (world.rank, world.size)
    losses, predicted = [torch.zeros((), dtype=torch.float64, device=device)], 0
    mine, rows = [], 0  # (first row, outputs) of each micro-batch that ran here
    model.eval()
    try:
        for number, micro in enumerate(task.evaluation()):
            if number % share[1] == share[0]:
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss, outputs = task.score(model, micro.to(device))
                losses.append(loss.double())
                mine += [] if outputs is None else [(rows, outputs.float())]
                predicted += micro.counts.predicted
            rows += micro.outputs
    finally:
        model.train(training)
        if sharded:
            model.reshard()  # after a forward without backward the last group holds whole weights
    sums = torch.stack([torch.stack(losses).sum(), torch.tensor(float(predicted), dtype=torch.float64, device=device)])
    loss, predicted = (sums if sharded else world.sum(sums)).tolist()
    figures = task.evaluated(loss / max(1.0, predicted))
    if not task.scored:
        return Evaluation(figures, None)
    whole = torch.zeros(rows, *task.output_shape, device=device)
    for first, outputs in mine:
        whole[first : first + len(outputs)] = outputs
    outputs = (whole if sharded else world.sum(whole)).cpu().numpy()
    return Evaluation({**figures, **{f"val_{name}": value for name, value in task.scores(outputs).items()}}, outputs)


class Final:
    """The evaluations of a run, of which the best one's outputs are kept for its reports.

    validation, test   the Evaluations of the best weights, when `finish` was called; None without such examples
    """

    def __init__(self, task: Task, dtype: torch.dtype, world: World, sharded: bool, test=None):
        self._task, self._how, self._latest = task, (dtype, world, sharded), (-1, None)
        self.test_task = None if test is None else type(task)(task.recipe, task.dataset, task.device, test)
        self.validation: Evaluation | None = None
        self.test: Evaluation | None = None

    def evaluate(self, model: Model, step: int) -> dict[str, float]:
        """The figures of the weights after `step`."""
        self._latest = step, evaluation(model, self._task, *self._how)
        return self._latest[1].figures

    def finish(self, model: Model, step: int) -> None:
        """`model` has the best weights, those after `step`."""
        if not self._task.scored:
            return
        if self._task.validation is not None:
            if self._latest[0] != step:
                self.evaluate(model, step)
            self.validation = self._latest[1]
        if self.test_task is not None:
            self.test = evaluation(model, self.test_task, *self._how)

    def notes(self) -> list[str]:
        """What was set aside and cut of the rows of the test."""
        return [] if self.test_task is None else reading_notes("test", self.test_task.validation)

    def figures(self) -> dict[str, float]:
        """val_ and test_ of the best weights."""
        validation = {} if self.validation is None else self.validation.figures
        test = {} if self.test is None else self.test.figures
        return {**validation, **{f"test_{name.removeprefix('val_')}": value for name, value in test.items()}}
