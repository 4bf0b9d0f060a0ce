"""Interleaved timing: every round runs every contender once, so a slow moment of the machine affects all of them."""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from fastlm.bench.clock import Clock
from fastlm.cuda_graph import CudaGraph


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


WARM = 3  # calls before a capture, in which kernels are compiled and libraries allocate their workspaces
SHORT_MS = 0.5  # a graph takes as long, if GRAPH_CALLS of its calls do: the gap between two replays is some 0.003 ms
GRAPH_CALLS = 10


class GraphTimer:
    """Milliseconds of the device a call, by replays of a CUDA graph: no time of the host, nor of single launches.

    function: its calls take `sets` inputs in turn. The graph holds whole turns, captured once; RuntimeError or another
    one of the function's where that fails. share: as CudaGraph's.
    """

    def __init__(self, function: Callable[[], object], sets: int, clock: Clock, share: CudaGraph | None = None):
        self.graph, self.clock = CudaGraph(share), clock
        for _ in range(WARM):
            self.graph.warm(function)
        turn_ms = max(1e-3, sets * time_calls(function, sets, clock))
        self.calls = sets * max(1, min(-(-GRAPH_CALLS // sets), int(SHORT_MS / turn_ms) + 1))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "The CUDA Graph is empty")  # its kernels went to another stream
            self.graph.capture(self._calls_of(function))

    def _calls_of(self, function: Callable[[], object]) -> Callable[[], None]:
        def run():
            for _ in range(self.calls):
                function()

        return run

    def __call__(self, calls: int) -> float:
        """Of whole replays, at least `calls` calls."""
        return time_calls(self.graph.replay, -(-calls // self.calls), self.clock) / self.calls


HOST_CALLS = 10


def host_ms(function: Callable[[], object], clock: Clock) -> float:
    """Milliseconds until a call returns to the host that found the device idle: Python and launches. The median."""
    times = []
    for _ in range(HOST_CALLS):
        clock.wait()
        began = clock.now()
        function()
        times.append((clock.now() - began) * 1e3)
    clock.wait()
    return statistics.median(times)


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
