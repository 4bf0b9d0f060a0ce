"""The rates of this CPU's matrix products: the peak of MFU on a CPU, and what `train.dtype = "auto"` follows.

No data sheet has them, so they are measured, in float32 and bfloat16: large square products of both in turn, in short
rounds, with the threads that torch has. Of each dtype the fastest product counts, since other work on the machine can
only make one slower. `Rate.busy` says how much there was.

`measure` takes about a second. `remember` keeps the result in the user's cache directory, by the CPU's name, the number
of threads, torch's version and the dtype; `known` reads it. A rate of a busy machine decides one process's dtype at
most: the next process that chooses one measures again. For MFU alone it is not measured again.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fastlm.storage import replace_json

# Rows and columns: the first whose product takes _SHORT seconds. Longer ones are no faster, and few of them run
# undisturbed on a busy machine: beside three other processes 1024 in bfloat16 reached 85% of the rate alone, 2048 half.
_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_SHORT = 0.0015
_TRIES = 3  # the best of so many calls says how long a product takes: a pause in one would end the search too early
_SECONDS, _LEAST = 0.7, 5  # rounds are measured for so long, and so many of them at least
_IDLE = 0.2  # the largest `busy` of an idle machine: threads wait for each other too
BOTH = torch.float32, torch.bfloat16


class Rate(NamedTuple):
    """flops: FLOP/s of the fastest product.

    busy: the share of the time that other work had, from 0 to 1. It is the larger of two: the share that the threads
    lacked of their processors' time; and by how much the median product was slower than the fastest, since the time
    that another virtual machine takes is not counted as lacking.
    """

    flops: float
    busy: float

    @property
    def steady(self) -> bool:
        """Whether the machine had no other work to speak of."""
        return self.busy <= _IDLE


_measured: dict[str, Rate] = {}  # what this process has, also where the directory cannot be written


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
    clock: Callable[[], float] = time.perf_counter,
    processor: Callable[[], float] = time.process_time,
    product: Callable[[int, torch.dtype], Callable[[], object]] = _product,
) -> dict[torch.dtype, Rate]:
    """The rates of BOTH dtypes, with the threads that torch has now.

    clock, processor   seconds, and those that the threads of this process had a processor
    """
    began, rounds = clock(), []
    products = [_large(dtype, clock, product) for dtype in BOTH]
    while len(rounds) < _LEAST or clock() - began < _SECONDS:
        rounds.append([_timed(call, clock, processor) for call, _ in products])
    return {dtype: _rate(flops, times) for dtype, (_, flops), times in zip(BOTH, products, zip(*rounds))}


def _rate(flops: float, times: Sequence[tuple[float, float]]) -> Rate:
    """Of a product. times: what its calls took, in seconds and in seconds of processors."""
    seconds, had = zip(*times)
    lacked = 1.0 - sum(had) / (sum(seconds) * torch.get_num_threads())
    return Rate(flops / min(seconds), max(0.0, lacked, 1.0 - min(seconds) / statistics.median(seconds)))


def _large(dtype, clock, product) -> tuple[Callable[[], object], float]:
    """(a product large enough to be timed, its FLOPs)"""
    for size in _SIZES:
        call = product(size, dtype)
        call()  # it allocates, and prepares the product
        if min(_timed(call, clock)[0] for _ in range(_TRIES)) >= _SHORT:
            break
    return call, 2.0 * size**3


def _timed(call: Callable[[], object], *clocks: Callable[[], float]) -> tuple[float, ...]:
    began = [clock() for clock in clocks]
    call()
    return tuple(clock() - start for clock, start in zip(clocks, began))


def known(dtype: torch.dtype) -> Rate | None:
    """The best rate that any process measured for this CPU, torch and number of threads; None where none did."""
    name = key(dtype, torch.get_num_threads())
    return _best(_measured.get(name), _read().get(name))


def _best(*rates: Rate | None) -> Rate | None:
    """A steady one goes before that of a busy machine, and a faster one before a slower of the same kind."""
    return max(filter(None, rates), key=lambda rate: (rate.steady, rate.flops), default=None)


def due() -> str:
    """Why `both` would measure, in words that follow "measured"; "" where it would not.

    A rate of a busy machine is measured again, once in a process.
    """
    if None in (rates := [known(dtype) for dtype in BOTH]):
        return "once"
    names = [key(dtype, torch.get_num_threads()) for dtype in BOTH]
    settled = all(rate.steady for rate in rates) or all(map(_measured.get, names))
    return "" if settled else "again, as it was busy before"


def both() -> tuple[Rate, Rate]:
    """The rates in float32 and in bfloat16, measured where they are `due`: about a second."""
    if due():
        remember(measure())
    return tuple(map(known, BOTH))


def remember(rates: Mapping[torch.dtype, Rate], keep: bool = True) -> None:
    """Take a measurement for this process, where it has none that is better, and likewise into the file.

    keep: False for one of another machine, which is this process's alone. So is one where the directory cannot be
    written.
    """
    threads = torch.get_num_threads()
    new = {key(dtype, threads): rate for dtype, rate in rates.items()}

    def merged(before: dict[str, Rate]) -> dict[str, Rate]:
        return {**before, **{name: _best(before.get(name), rate) for name, rate in new.items()}}

    _measured.update(merged(_measured))
    if not keep:
        return
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        replace_json(path(), {name: rate._asdict() for name, rate in merged(_read()).items()})
    except (OSError, RuntimeError):
        pass  # a home that is read-only, full or missing: the run goes on, and the next one measures again


def _read() -> dict[str, Rate]:
    """The file's content. A damaged file holds nothing: the next measurement replaces it.

    Nor does a bare number count, as earlier versions wrote them.
    """
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home directory
        return {}
    found = {}
    for name, entry in content.items() if isinstance(content, dict) else ():
        fields = [entry.get(field) for field in Rate._fields] if isinstance(entry, dict) else [None]
        if all(isinstance(value, float) for value in fields):
            found[name] = Rate(*fields)
    return found
