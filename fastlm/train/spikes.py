"""Loss spikes: steps whose loss is far above those before, and the data that they were trained on."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

import numpy as np

from fastlm.data import Dataset, Mixture

WINDOW = 100  # losses that a loss is compared with
_LEAST = 20  # of them, before which nothing is a spike
_DEVIATIONS = 6.0  # standard deviations of normal noise, by the median absolute deviation (MAD)
_SIGMA = 1.4826  # standard deviation of normal noise, in MADs
_FLAT = 1e-3  # of the median: the least standard deviation, for losses that are nearly equal
_NAMED = 8  # rows of the batch that are named


class Spikes:
    """A loss above median + 6 · 1.4826 · MAD of the 100 before it is a spike.

    Spikes enter the window too: a loss that stays high is no spike any more after 50 steps.

    losses: those before the first step, the oldest first
    """

    def __init__(self, losses: Iterable[float | None] = ()):
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._high = False
        for loss in losses:
            self.add(loss)

    def add(self, loss: float | None) -> tuple[float, bool] | None:
        """(the median before it, whether it is the first of several in a row) of a spike, else None.

        None for `loss`: the step predicted nothing, or was skipped.
        """
        if loss is None:
            return None
        found = None
        if len(self._window) >= _LEAST:
            median = statistics.median(self._window)
            mad = statistics.median(abs(x - median) for x in self._window)
            if loss > median + _DEVIATIONS * max(_SIGMA * mad, _FLAT * abs(median)):
                found = median, not self._high
        self._high = found is not None
        self._window.append(loss)
        return found


def batch_rows(step: int, rows: int, dataset: Dataset | Mixture, seed: int) -> str:
    """The rows of the global batch of `step` (from 0), for a person to look at: "epoch 2: rows 17, 4, ...".

    rows: in a batch. Of a mixture, each source's are by its own numbers: "rows/wiki: epoch 2: rows 17, 4".
    """
    epochs, chosen = dataset.order(np.arange(step * rows, (step + 1) * rows), seed)
    if not isinstance(dataset, Mixture):
        return _named(epochs, chosen)
    parts = dataset.split(chosen)
    return "; ".join(f"{dataset.sources[source].directory}: {_named(epochs[at], local)}" for source, at, local in parts)


def _named(epochs: np.ndarray, rows: np.ndarray) -> str:
    parts = []
    for epoch in np.unique(epochs):
        these = rows[epochs == epoch].tolist()
        more = f" and {len(these) - _NAMED} more" if len(these) > _NAMED else ""
        parts.append(f"epoch {epoch}: rows {', '.join(map(str, these[:_NAMED]))}{more}")
    return "; ".join(parts)
