"""What to do when a step runs out of memory in spite of the estimate before the start (fastlm/train/_memory.py)."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fastlm.run.directory import DATA

_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMGT]i?B)?", re.ASCII)
_HOST = re.compile("DefaultCPUAllocator: (can't allocate|not enough) memory")
_SIZES = {"bytes": 1, None: 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def out_of_memory(
    error: BaseException, recipe, device: torch.device, *, step: int, saved: bool, out: Path, processes: int = 1
) -> ValueError | None:
    """The ValueError that says which micro-batch fits, where `error` is that of an allocation; else None.

    step: the last one that was finished; saved: whether `out` has a checkpoint; processes: that the micro-batches are
    divided among
    """
    if not isinstance(error, torch.OutOfMemoryError) and not _HOST.search(str(error)):
        return None
    asked = ""
    if found := _ASKED.search(str(error)):
        unit = found[2] if found[2] in _SIZES else found[2][0]
        asked = f"; torch asked for {float(found[1]) * _SIZES[unit] / 1e9:,.2f} GB more, which {device} does not have"
    tokens, row, batch = recipe.micro_batch_tokens, recipe.data.row_tokens, recipe.batch_rows
    smaller = [n for n in range(1, recipe.micro_rows) if batch % n == 0 and batch // n % processes == 0]
    if smaller:
        again = f", with --init {out} from its newest checkpoint" if saved and (out / DATA).is_dir() else ""
        remedy = (
            f"set {recipe.train.micro_setting(smaller[-1], row)}, which trains the same, and start again in another "
            f"directory{again}"
        )
    else:
        remedy = "it is one row: choose a smaller model or shorter rows, or a machine with more memory"
    return ValueError(
        f"{recipe.train.micro_key}: expected a step that fits into the memory of {device}, got {tokens} tokens in one "
        f"forward, and memory ran out after step {step}{asked}; {remedy}"
    )
