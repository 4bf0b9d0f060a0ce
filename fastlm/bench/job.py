"""What a contender of a training step is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fastlm.bench.steps import Batch
from fastlm.ops import IGNORE_INDEX
from fastlm.tasks import TrainTable

Loss = Callable[[], float]
Step = Callable[[int], torch.Tensor]


class NotRun(Exception):
    """Why a contender does not run a step."""


@dataclass(frozen=True)
class Job:
    """cls: of fastlm.models; table: the optimizer's, and the dtype; weights: a directory that both sides read."""

    cls: type
    table: TrainTable
    weights: Path
    batches: list[Batch]
    device: torch.device

    def autocast(self):
        dtype = getattr(torch, self.table.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)


def refuse_float32(job: Job) -> None:
    """For a contender that differs from another one only in a step of less precision."""
    if job.table.dtype == "float32":
        raise NotRun("the step is in float32 already")


@dataclass(frozen=True)
class Contender:
    """load: the model on its device; prepare: (the loss of batch 0 without dropout, a function of the step's number).

    Steps count from 0 and take the batches in turn. Memory that `load` leaves in use does not count as the step's;
    everything later does. tuned: whether the allocator is tuned.
    """

    load: Callable[[Job], torch.nn.Module]
    prepare: Callable[[Job, torch.nn.Module], tuple[Loss, Step]]
    tuned: bool = True


def real_tokens(rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(rows, length), bool: the first lengths (rows,) of each row."""
    return torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]


def predicted_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Indexes into the flattened labels."""
    return labels.flatten().ne(IGNORE_INDEX).nonzero().flatten()
