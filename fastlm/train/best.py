"""The best evaluation of a fine-tuning, and when to stop: a function of the figures alone, so that a resume agrees."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastlm.tasks._labelled import LabelledTask, best_sign
from fastlm.train.watch import Counters


class Best:
    """Keeps in `counters`, which checkpoints hold, the best figure, its step, and the evaluations since then.

    figure   its name in the metrics, as "val_accuracy"
    """

    def __init__(self, task: LabelledTask, counters: Counters):
        name = task.figure()
        self.figure, self._sign, self._patience = f"val_{name}", best_sign(name), task.recipe.train.patience
        self._counters = counters

    def add(self, step: int, figures: Mapping[str, float]) -> bool:
        """Whether the evaluation after `step` is better than those before; of equal ones the first is the best.

        A NaN is never the best.
        """
        value, best = figures[self.figure], self._counters.best
        if math.isnan(value) or (best is not None and self._sign * value <= self._sign * best):
            self._counters.stale += 1
            return False
        self._counters.best, self._counters.best_step, self._counters.stale = value, step, 0
        return True

    @property
    def exhausted(self) -> bool:
        """Whether train.patience evaluations, one after another, were no better."""
        return 0 < self._patience <= self._counters.stale
