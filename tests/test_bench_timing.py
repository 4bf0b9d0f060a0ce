"""fastlm/bench: timing on a fake clock, memory, ceilings."""

from functools import partial
from pathlib import Path

import pytest
import torch
from fake_clock import FakeClock, FakeGpuClock
from fake_cuda import FakeCuda

from fastlm.bench import ceilings, memory, timing, tune
from fastlm.bench.clock import Clock
from fastlm.cuda_graph import CudaGraph

CPU = torch.device("cpu")


def test_milliseconds_a_call_of_the_host():
    clock, calls = FakeClock(), []
    assert timing.time_calls(lambda: clock.advance(len(calls)) or calls.append(1), 5, clock) == pytest.approx(2.0)
    assert len(calls) == 5


@pytest.mark.parametrize("calls", [1, 10, 25])
def test_a_short_kernel_takes_its_own_time_and_not_its_launch(calls):
    clock = FakeGpuClock()
    launch = partial(clock.launch, 0.05, 0.004)
    assert timing.time_calls(launch, calls, clock) == pytest.approx(0.004)
    assert timing.time_calls(launch, calls, clock, ahead=False) == pytest.approx(0.05 + 0.004 / calls)


def test_a_call_that_synchronises_pays_for_the_host():
    clock = FakeGpuClock()

    def call():
        clock.launch(0.05, 0.004)
        clock.wait()

    # The device is busy when the first is launched, and idle while the other nine are.
    assert timing.time_calls(call, 10, clock) == pytest.approx((0.004 + 9 * 0.054) / 10)


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(FakeGpuClock()).install(monkeypatch)


class Launched:
    """Calls that take `sets` inputs in turn: 53 us of Python, and a kernel of 47 us, or as `kernel_ms` says."""

    def __init__(self, clock, sets=1, kernel_ms=lambda index: 0.047):
        self.clock, self.sets, self.kernel_ms = clock, sets, kernel_ms
        self.taken = []

    def __call__(self):
        self.taken.append(len(self.taken) % self.sets)
        self.clock.launch(0.053, self.kernel_ms(self.taken[-1]))


def test_a_graph_times_the_kernel_and_not_python(cuda):
    """Where launches find the device idle, 53 us of Python hide the kernel's 47 us; not in a graph."""
    call = Launched(cuda.clock)
    assert timing.time_calls(call, 100, cuda.clock, ahead=False) == pytest.approx(0.053, rel=0.01)
    timer = timing.GraphTimer(call, 1, cuda.clock)
    assert timer.calls == timing.GRAPH_CALLS
    for calls in (1, 10, 400):
        assert timer(calls) == pytest.approx(0.047)
    assert timing.host_ms(call, cuda.clock) == pytest.approx(0.053)


@pytest.mark.parametrize(("sets", "turns"), [(1, 10), (3, 4), (4, 3), (32, 1)])
def test_a_graph_holds_whole_turns_and_is_captured_once(cuda, sets, turns):
    """Kernels of different lengths show which inputs a replay has: all of them, equally often."""
    call = Launched(cuda.clock, sets, lambda index: 0.001 * (index + 1))
    timer = timing.GraphTimer(call, sets, cuda.clock)
    before = len(call.taken)
    assert [timer(calls) for calls in (1, 50, 100)] == pytest.approx([0.001 * (sets + 1) / 2] * 3)
    assert len(call.taken) == before  # no call after the capture
    (graph,) = cuda.graphs
    assert len(graph.kernels) == timer.calls == sets * turns
    assert {graph.kernels.count(ms) for ms in graph.kernels} == {turns}
    assert graph.replays > 0


def test_a_long_call_is_not_repeated_in_its_graph(cuda):
    assert timing.GraphTimer(Launched(cuda.clock, 2, lambda index: 5.0), 2, cuda.clock).calls == 2


def test_tune_times_by_the_same_graphs(cuda):
    assert tune.device_ms(Launched(cuda.clock, 2), 2, cuda.clock) == pytest.approx(0.047)
    assert len(cuda.graphs) == 1


def synchronizes(clock):
    clock.launch(0.01, 0.02)
    clock.wait()


def raises(clock):
    clock.launch(0.01, 0.02)
    if clock.captured is not None:
        raise ValueError("takes no graph")


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (synchronizes, RuntimeError, "previous error during capture"),
        (raises, ValueError, "takes no graph"),
        (lambda clock: None, UserWarning, "The CUDA Graph is empty"),
    ],
)
def test_torch_works_after_a_capture_that_failed(cuda, function, error, message):
    """The stream is the one before, random numbers are drawn, the pool is closed, and the next capture succeeds."""
    with pytest.raises(error, match=message):
        timing.GraphTimer(partial(function, cuda.clock), 1, cuda.clock)
    assert cuda.current == "default"
    assert not cuda.recording
    assert cuda.released == ([(0, 1)] if function is synchronizes else [])
    cuda.draw()
    assert timing.GraphTimer(Launched(cuda.clock), 1, cuda.clock)(10) == pytest.approx(0.047)


def test_graphs_that_share_have_one_pool_and_one_stream(cuda):
    first = CudaGraph()
    CudaGraph(first)
    assert (cuda.pools, len(cuda.streams)) == (1, 2)
    CudaGraph()
    assert (cuda.pools, len(cuda.streams)) == (2, 3)


def timers_of(clock, **ms):
    return {name: partial(timing.time_calls, partial(clock.advance, each), clock=clock) for name, each in ms.items()}


def test_a_fifth_slower_shows_as_that():
    times = timing.interleaved(timers_of(FakeClock(), even=0.5, slower=0.6), rounds=5, min_ms=2.0)
    assert times["even"].ms == pytest.approx(0.5)
    assert times["slower"].ms == pytest.approx(0.6)
    assert times["slower"].iqr == pytest.approx(0.0)
    assert len(times["even"].rounds) == 5


def test_a_round_is_long_enough_and_a_slow_moment_meets_a_few_rounds():
    """Median and interquartile range, of rounds of min_ms."""
    asked, clock = [], FakeClock()

    def timer(calls):
        asked.append(calls)
        slow = len(asked) % 4 == 0  # every fourth round
        clock.advance(calls * (0.5 + slow))
        return 0.5 + slow

    times = timing.interleaved({"a": timer}, rounds=12, min_ms=20.0, warmup=3)
    assert asked == [3, 1] + [40] * 12
    assert times["a"].ms == pytest.approx(0.5)
    assert times["a"].iqr == pytest.approx(0.75)  # 0.5 to 1.25, between the ninth and the tenth of twelve
    assert timing.Timing.of([3.0]) == timing.Timing(3.0, 0.0, (3.0,))


def test_no_contender_always_has_the_same_place():
    """Every round runs each of them once, in another order each time, the same orders in every run."""

    def orders():
        ran = []
        timers = {name: lambda calls, name=name: ran.append(name) or 1.0 for name in "abcd"}
        times = timing.interleaved(timers, rounds=12, min_ms=1.0)
        assert all(len(of.rounds) == 12 for of in times.values())
        ran = ran[-12 * len(timers) :]  # without the warm-up
        return [ran[start : start + 4] for start in range(0, len(ran), 4)]

    drawn = orders()
    assert all(sorted(order) == list("abcd") for order in drawn)
    assert all({order[place] for order in drawn} == set("abcd") for place in (0, 3))
    assert orders() == drawn


def test_the_real_clock_runs():
    """Forwards, in seconds; how fast is for `make bench-check`."""
    clock = Clock()
    began = clock.now()
    clock.wait()
    assert not clock.on_gpu
    assert clock.now() >= began


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc here")
def test_peak_of_a_call_is_its_own():
    """Not what was taken and freed before it."""
    del (before := [torch.ones(64 << 20, dtype=torch.uint8)])[:]
    assert not before
    peak = memory.peak_of_call(lambda: torch.ones(32 << 20, dtype=torch.uint8), CPU)
    assert 31 < peak < 48
    assert memory.in_use_mb(CPU) <= memory.peak_mb(CPU)


def test_ceilings_count_what_they_do():
    assert ceilings.matmul_flops(CPU) == 2 * 1024**3
    assert ceilings.matmul(CPU, torch.bfloat16)().shape == (1024, 1024)
    assert ceilings.sets_to_fill_cache(1, CPU) == ceilings.MOST_SETS
    assert ceilings.sets_to_fill_cache(2 * ceilings.cache_bytes(CPU), CPU) == 1
    call, moved = ceilings.copy(CPU, 8)
    assert moved == 2 * call().nbytes
