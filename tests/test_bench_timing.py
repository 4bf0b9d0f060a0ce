"""fastlm/bench: timing on a fake clock, memory, ceilings."""

from functools import partial
from pathlib import Path

import pytest
import torch
from fake_clock import FakeClock, FakeGpuClock

from fastlm.bench import ceilings, memory, timing
from fastlm.bench.clock import Clock

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
