"""`fastlm tune`: measures the configurations of the Triton kernels on this GPU and writes a table that launchers read.

The ops say what is tuned: a call is observed, and the candidates of every kernel that asked for a configuration
(fastlm.kernels.tuning.choose) are timed in place, one kernel at a time, in calls of the OpCases' benchmark shapes for a
GPU. Forward and backward are timed together, since a forward that makes a gradient does more than one that does not. A
candidate replaces the rule's configuration where it is faster by more than MARGIN.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from fastlm.bench import ceilings
from fastlm.bench.clock import Clock
from fastlm.bench.timing import GraphTimer
from fastlm.ops import _registry
from fastlm.testing.cases import CASES, OpCase, Variant

MARGIN = 0.02  # of the time of a call; what is nearer is noise
REPLAYS = 20

Measure = Callable[[Callable[[], object], int], float]


def device_ms(function: Callable[[], object], sets: int, clock: Clock | None = None) -> float:
    """Milliseconds of device time a call of `function`, which takes `sets` inputs in turn: the median of REPLAYS."""
    timer = GraphTimer(function, sets, clock or Clock("cuda"))
    return statistics.median(timer(1) for _ in range(REPLAYS))


def tune(
    ops: Iterable[str],
    dtype: torch.dtype,
    device: str = "cuda",
    measure: Measure = device_ms,
    variants: Callable[[OpCase], Iterable[Variant]] = lambda case: case.benchmarks_cuda or case.benchmarks,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, dict]]:
    """The `configurations` of a table: {kernel: {shape: fields}}, of those that beat the rule's or the present table's.

    measure(function, sets): milliseconds of a call of a function that takes so many inputs in turn. ValueError for an
    op without Triton kernels.
    """
    from fastlm.kernels import tuning

    found: dict[str, dict[str, dict]] = {}
    seen: set = set()
    for op in ops:
        if op not in CASES or "triton" not in _registry.backends(op):
            having = [case.op for case in CASES.values() if "triton" in _registry.backends(case.op)]
            raise ValueError(f"op: expected one with Triton kernels ({', '.join(having)}), got {op!r}")
        case = CASES[op]
        for variant in variants(case):
            function, sets = _call(case, variant, dtype, device)
            with tuning.observe() as asked:
                function()
            for key, (now, candidates) in asked.items():
                if key in seen:
                    continue
                seen.add(key)
                best = _fastest(key, now, candidates(), partial(measure, function, sets), say)
                if best != now:
                    found.setdefault(key[0], {})[tuning.shape_name(key[1])] = dataclasses.asdict(best)
    return found


def _call(case: OpCase, variant: Variant, dtype: torch.dtype, device: str):
    """(forward, and backward where there is one, of inputs that take turns; their number: twice the cache)."""
    sets = [case.inputs(variant, 0, dtype, device, draw_on=device)]
    size = sum(x.nbytes for x in sets[0].values() if isinstance(x, torch.Tensor))
    more = range(1, ceilings.sets_to_fill_cache(size, torch.device(device)))
    sets += [case.inputs(variant, seed, dtype, device, draw_on=device) for seed in more]
    outputs = case.run(case.function, variant, sets[0], backend="triton")
    cotangents = [torch.randn_like(out) for out in outputs if out.requires_grad]
    following = itertools.cycle(sets).__next__

    def call():
        inputs = following()
        outputs = [o for o in case.run(case.function, variant, inputs, backend="triton") if o.requires_grad]
        leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        if outputs:
            torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)

    return call, len(sets)


def _fastest(key, now, candidates, measure: Callable[[], float], say):
    """`now`, or the candidate that is faster by more than MARGIN."""
    from triton.errors import TritonError

    from fastlm.kernels import tuning

    kernel, shape = key
    times = {}
    for candidate in [now, *(c for c in dict.fromkeys(candidates) if c != now)]:
        try:
            with tuning.override(key, candidate) if candidate != now else nullcontext():
                times[candidate] = measure()
        except (TritonError, RuntimeError) as error:  # more shared memory or registers than there are
            say(f"  {kernel} {tuning.shape_name(shape)}: {candidate} does not run: {type(error).__name__}")
            if candidate == now:
                raise
    best = min(times, key=times.__getitem__)
    if times[best] >= times[now] * (1 - MARGIN):
        best = now
    gain = f", {times[now] / times[best]:.2f}× with {best}" if best != now else ""
    say(f"{kernel} {tuning.shape_name(shape)}: {times[now]:.4f} ms, {len(times)} tried{gain}")
    return best


def user_table(gpu: str) -> Path:
    """The path of a user's table for a GPU, which later runs read."""
    from fastlm.kernels import tuning

    return tuning.user_directory() / tuning.file_name(gpu)


def write_table(path: Path, gpu: str, configurations: dict[str, dict[str, dict]]) -> None:
    """Adds configurations to a table, or makes it."""
    import triton

    from fastlm.kernels import tuning
    from fastlm.storage import replace_json

    merged = tuning.read_table(path) if path.is_file() else {}
    for kernel, shapes in configurations.items():
        merged.setdefault(kernel, {}).update(shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_json(path, {"gpu": gpu, "triton": triton.__version__, "configurations": merged})
    tuning.forget()
