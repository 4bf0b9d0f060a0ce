"""The rate of this CPU's matrix products: MFU on a CPU is measured against it, and `train.dtype = "auto"` follows it.

No data sheet has it, so it is measured: the best of large square products with the threads that are used. `measure`
takes about a second for float32 and bfloat16 together. `remember` keeps the result in the user's cache directory, by
the CPU's name, the number of threads, torch's version and the dtype; `known` reads it. A busy machine measures too
little, so the larger of two measurements is kept.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from fastlm.storage import replace_json

_SIZES = (1024, 2048, 4096, 8192)  # rows and columns: the larger ones where a product takes less than _SHORT
_SHORT = 0.03  # seconds
_SECONDS, _LEAST = 0.3, 5  # each size is measured for so long, and at least so many times,
_MOST = 1.0  # where these do not take longer: without units for it, bfloat16 may take a second a product
BOTH = torch.float32, torch.bfloat16

_measured: dict[str, float] = {}  # by this process, also where the directory cannot be written


@cache
def cpu_info() -> tuple[str, set[str]]:
    """Name and feature flags of the CPU; the flags are empty outside x86 Linux."""
    fields = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return fields.get("model name") or platform.processor() or platform.machine(), set(fields.get("flags", "").split())


def path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm" / "cpu-rates.json"


def key(dtype: torch.dtype, threads: int) -> str:
    """What the file calls a measurement."""
    name, flags = cpu_info()
    units = [unit for unit in ("avx512_bf16", "amx_bf16") if unit in flags]  # a virtual machine may hide them
    dtype = str(dtype).removeprefix("torch.")
    return "; ".join([name, *units, f"{threads} threads", f"torch {torch.__version__}", dtype])


def _product(size: int, dtype: torch.dtype) -> Callable[[], object]:
    a, b = torch.full((2, size, size), 0.01, dtype=dtype)  # no random numbers: a run's are its own
    out = torch.empty_like(a)
    return lambda: torch.matmul(a, b, out=out)


def measure(
    dtype: torch.dtype,
    clock: Callable[[], float] = time.perf_counter,
    product: Callable[[int, torch.dtype], Callable[[], object]] = _product,
    seconds: float = _SECONDS,
) -> float:
    """FLOP/s of the fastest product in `dtype`, with the threads that torch has now.

    seconds: how long each size is measured at least
    """
    best = 0.0
    for size in _SIZES:
        call, times = product(size, dtype), []
        while sum(times) < seconds or (len(times) < _LEAST and sum(times) < _MOST):
            began = clock()
            call()
            times.append(clock() - began)
        best = max(best, 2.0 * size**3 / min(times))
        if min(times) > _SHORT:
            break
    return best


def known(dtype: torch.dtype) -> float | None:
    """What was measured for this CPU, torch and number of threads; None where nothing was."""
    name = key(dtype, torch.get_num_threads())
    return _measured.get(name) or _read().get(name)


def both() -> tuple[float, float]:
    """FLOP/s in float32 and in bfloat16, measured where either is not known: twice in turn, about two seconds.

    So a busy moment lowers one of them only where it comes twice: their ratio decides `train.dtype`.
    """
    if None in map(known, BOTH):
        for dtype in 2 * BOTH:
            remember(dtype, measure(dtype, seconds=_SECONDS / 2))
    return tuple(map(known, BOTH))


def remember(dtype: torch.dtype, flops: float) -> float:
    """Keep a measurement; the larger of it and of one before.

    Where the directory cannot be written, it is kept for this process alone.
    """
    name = key(dtype, torch.get_num_threads())
    _measured[name] = flops = max(flops, known(dtype) or 0.0)
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        replace_json(path(), {**_read(), name: flops})
    except OSError:
        pass  # a home that is read-only or full: the run goes on, and the next one measures again
    return flops


def _read() -> dict[str, float]:
    """The file's content. A damaged file holds nothing: the next measurement replaces it."""
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home directory
        return {}
    return {key: rate for key, rate in content.items() if isinstance(rate, float)} if isinstance(content, dict) else {}
