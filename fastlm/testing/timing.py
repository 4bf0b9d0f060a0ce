"""Interleaved timing: every round runs every contender once, so that a slow moment of the machine meets them all."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: the median of the rounds, and their interquartile range."""

    ms: float
    iqr: float
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, rounds: list[float]) -> Timing:
        low, _, high = statistics.quantiles(rounds, n=4) if len(rounds) > 1 else (rounds[0],) * 3
        return cls(statistics.median(rounds), high - low, tuple(rounds))


BATCH = 10  # calls that are queued at once on a device; a thousand launches fill its queue
CYCLES_A_MS = 2e6  # of a GPU's clock, at most


def time_calls(function: Callable[[], object], calls: int, device: torch.device, ahead: bool = True) -> float:
    """Milliseconds a call; on CUDA of the device, which the host runs ahead of, as it does in a training step.

    There the device is kept busy until the calls are queued, or short kernels would be as slow as Python launches them.
    A call that waits for the device ends that, and pays for it. ahead=False: the host's share counts.
    """
    if device.type == "cuda" and ahead:
        return sum(_time_on_device(function, min(BATCH, calls - i)) for i in range(0, calls, BATCH)) / calls
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / calls


def _time_on_device(function: Callable[[], object], calls: int) -> float:
    """Milliseconds of so many calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    host_ms = (time.perf_counter() - began) * 1e3
    torch.cuda._sleep(int((1.5 * host_ms * calls + 0.2) * CYCLES_A_MS))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleaved(
    contenders: dict[str, Callable[[], object]], *, device: torch.device | str = "cpu", **options
) -> dict[str, Timing]:
    """Times every contender, a function without arguments, in turn. Options as of `interleaved_timers`.

    A contender is expected to take fresh inputs by itself where that matters.
    """
    device = torch.device(device)
    timers = {name: partial(time_calls, function, device=device) for name, function in contenders.items()}
    return interleaved_timers(timers, **options)


def interleaved_timers(
    timers: dict[str, Callable[[int], float]], *, rounds: int = 7, min_ms: float = 20.0, warmup: int = 2
) -> dict[str, Timing]:
    """Times every contender, `rounds` rounds in turn, each round at least `min_ms` long, in another order each round.

    In one order the first of four equal ones, behind the ceilings, was 12 to 33% slower than the last (LOG.md).
    A timer makes the calls that it is asked for, in another process for example, and returns milliseconds a call.
    """
    calls = {}
    for name, timer in timers.items():
        timer(warmup)
        calls[name] = max(1, int(min_ms / max(1e-3, timer(1))))
    times: dict[str, list[float]] = {name: [] for name in timers}
    order, draw = list(timers), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            times[name].append(timers[name](calls[name]))
    return {name: Timing.of(rounds) for name, rounds in times.items()}
