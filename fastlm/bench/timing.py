"""Interleaved timing: every round runs every contender once, so a slow moment of the machine affects all of them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from fastlm.bench.clock import Clock


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


def time_calls(function: Callable[[], object], calls: int, clock: Clock, ahead: bool = True) -> float:
    """Milliseconds a call. On CUDA the device's time, with the host running ahead as in a training step.

    A sleeping kernel keeps the device busy until the calls are queued. Without it a short kernel would take as long as
    Python needs to launch it. A call that synchronises ends the overlap, and its host time counts.
    ahead=False: the host's time counts too.
    """
    if clock.on_gpu and ahead:
        return sum(_time_on_device(function, min(BATCH, calls - i), clock) for i in range(0, calls, BATCH)) / calls
    clock.wait()
    start = clock.now()
    for _ in range(calls):
        function()
    clock.wait()
    return (clock.now() - start) * 1e3 / calls


def _time_on_device(function: Callable[[], object], calls: int, clock: Clock) -> float:
    """Milliseconds of so many calls."""
    clock.wait()
    began = clock.now()
    function()
    host_ms = (clock.now() - began) * 1e3
    clock.keep_busy(1.5 * host_ms * calls + 0.2)
    start = clock.mark()
    for _ in range(calls):
        function()
    return clock.between(start, clock.mark())


def interleaved(
    timers: dict[str, Callable[[int], float]], *, rounds: int = 7, min_ms: float = 20.0, warmup: int = 2
) -> dict[str, Timing]:
    """Times every contender, `rounds` rounds in turn, each round at least `min_ms` long, in another order each round.

    In one fixed order the first of four equal contenders, behind the ceilings, was 12 to 33% slower than the last
    (LOG.md). A timer makes the calls that it is asked for, possibly in another process, and returns milliseconds a
    call.
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
