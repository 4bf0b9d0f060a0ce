"""Batches of packed rows: a pure function of (seed, step, global batch size).

Global row g = step·B + j goes through `fastlm.data.order`; micro-batch m of M takes rows j in [m·B/M, (m+1)·B/M). So
neither accumulation, nor the number of ranks, nor a resume changes what is trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastlm.data._checks import integer
from fastlm.data.layouts import NO_NEXT
from fastlm.data.order import rows_at
from fastlm.data.packing import PADDING_SAMPLE
from fastlm.data.shards import Dataset, ragged

# The order is computed for so many rows at a time: for 32 rows the calls into NumPy cost 10 ms, for 4096 40.
_WINDOW = 4096


@dataclass(frozen=True)
class Batch:
    """T = rows · Dataset.width tokens of packed pieces. Every shape is the same for every batch of that many rows.

    input_ids    (T,) int64
    cu_seqlens   (rows · Dataset.max_pieces + 1,) int32: where the pieces start, then T, repeated to the end. The
                 padding at the end of a row is a piece of its own
    positions    (T,) int64, from 0 in every piece
    sample_ids   (T,) int64, `fastlm.data.packing.PADDING_SAMPLE` on padding
    epochs       (T,) int64
    max_seqlen   no piece is longer: width
    tokens       how many of the T are not padding
    pieces       how many entries of cu_seqlens are starts of pieces, padding among them
    targets      (T,) int64, with causal rows: the token that follows in the document, -100 on padding; else None
    """

    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    sample_ids: torch.Tensor
    epochs: torch.Tensor
    max_seqlen: int
    tokens: int
    pieces: int
    targets: torch.Tensor | None = None


class Batches:
    """The batches of `dataset`, `batch_rows` rows each, in the order that `seed` gives."""

    def __init__(self, dataset: Dataset, *, batch_rows: int, seed: int):
        self.dataset = dataset
        self.batch_rows = integer("batch_rows", batch_rows, 1)
        self.seed = integer("seed", seed, -(2**63), 2**64 - 1)  # signed or not, it is 64 bits
        # Epochs stay below 2^32 and global row numbers below 2^63, in the window after the last batch too.
        self._last_step = (min(dataset.rows << 32, 2**63) - _WINDOW) // self.batch_rows - 1
        self._window = 0, np.empty(0, np.int64), np.empty(0, np.int64)

    def at(self, step: int, micro: int = 0, micro_count: int = 1) -> Batch:
        """Micro-batch `micro` of the `micro_count` that global batch `step` is cut into; it must divide batch_rows."""
        return make_batch(self.dataset, *self.rows_at(step, micro, micro_count))

    def rows_at(self, step: int, micro: int = 0, micro_count: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, row), int64 each, of the rows of that micro-batch."""
        step = integer("step", step, 0, self._last_step)
        micro_count = integer("micro_count", micro_count, 1)
        if self.batch_rows % micro_count:
            raise ValueError(
                f"micro_count: expected a divisor of batch_rows={self.batch_rows}, got {micro_count}; choose a global "
                "batch that accumulation steps times ranks divide"
            )
        micro = integer("micro", micro, 0, micro_count - 1)
        rows = self.batch_rows // micro_count
        return self._order(step * self.batch_rows + micro * rows, rows)

    def _order(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, row), (count,) int64 each, of the global rows from `first` on."""
        start, epoch, row = self._window
        if not start <= first <= first + count <= start + len(row):
            epoch, row = rows_at(np.arange(first, first + max(count, _WINDOW)), self.dataset.rows, self.seed)
            self._window = start, epoch, row = first, epoch, row  # one assignment, so that threads may share us
        at = slice(first - start, first - start + count)
        return epoch[at], row[at]


def make_batch(data: Dataset, epoch: np.ndarray, row: np.ndarray) -> Batch:
    """The batch of the rows numbered `row` (k,), seen in the epochs `epoch` (k,)."""
    cells, counts, pieces = data.gather(row)
    total = cells.size
    samples = pieces[:, 0]
    starts = pieces[:, 1] + np.repeat(np.arange(0, total, data.width), counts)
    lengths = np.diff(starts, append=total)
    cu_seqlens = np.full(len(row) * data.max_pieces + 1, total, dtype=np.int32)
    cu_seqlens[: len(starts)] = starts
    ids = cells.reshape(-1).astype(np.int64)
    return Batch(
        input_ids=torch.from_numpy(ids),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        positions=torch.from_numpy(ragged(np.zeros_like(lengths), lengths)),
        sample_ids=torch.from_numpy(np.repeat(samples, lengths)),
        epochs=torch.from_numpy(np.repeat(epoch, data.width)),
        max_seqlen=data.width,
        tokens=int(lengths[samples != PADDING_SAMPLE].sum()),
        pieces=len(starts),
        targets=_targets(ids, lengths, pieces) if data.layout == "causal" else None,
    )


def _targets(ids: np.ndarray, lengths: np.ndarray, pieces: np.ndarray) -> torch.Tensor:
    targets = np.roll(ids, -1)
    targets[np.cumsum(lengths) - 1] = pieces[:, 2]
    padding = np.repeat(pieces[:, 0] == PADDING_SAMPLE, lengths)
    return torch.from_numpy(np.where(padding, NO_NEXT, targets))
