"""Memory of this process (resident, from Linux's /proc) or of a CUDA device (allocated by torch), in MiB."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status_mb(name: str) -> float | None:
    """VmRSS (now) or VmHWM (the most so far); None elsewhere than on Linux."""
    for line in _STATUS.read_text().splitlines() if _STATUS.exists() else ():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 2**10
    return None


def peak_mb(device: torch.device) -> float:
    """The most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # getrusage's maximum is the last choice: it starts with the memory of the process that started this one.
    peak = _status_mb("VmHWM")
    if peak is not None:
        return peak
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, kilobytes elsewhere


def in_use_mb(device: torch.device) -> float:
    """What is in use now; elsewhere than on Linux, the most so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    _trim()
    now = _status_mb("VmRSS")
    return peak_mb(device) if now is None else now


def _trim() -> None:
    """A tuned allocator keeps freed memory, and what runs next would reuse it unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_of_call(function: Callable[[], object], device: torch.device) -> float | None:
    """What one call takes at its peak beyond what was in use before it; on a CPU only on Linux, None elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif not _RESET.exists():
        return None
    before = in_use_mb(device)
    if device.type != "cuda":
        _RESET.write_text("5")  # VmHWM starts again from VmRSS
    function()
    return max(0.0, peak_mb(device) - before)
