"""The contenders of one op's shape and their clock, in a process per allocator."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from fastlm import _malloc
from fastlm.bench import ceilings, memory, timing
from fastlm.bench.clock import Clock
from fastlm.bench.op_runner import AGREEMENT, OpRunner, disagreement, reason, restore
from fastlm.bench.passes import PASSES
from fastlm.bench.peers import PEERS, Peer, Unsupported
from fastlm.bench.results import GRAPH, HOST, LAUNCHES, WRONG
from fastlm.cuda_graph import CudaGraph
from fastlm.ops import _registry
from fastlm.testing.cases import CASES, OpCase, Variant

OURS = ("cpu", "triton", "cuda")  # backends
# Beside the ops' own shapes, one so small that only the cost of a call is left.
OVERHEAD = "call overhead"
BENCHMARKS: dict[str, OpCase] = {
    **CASES,
    OVERHEAD: dataclasses.replace(
        CASES["layer_norm"], benchmarks=(Variant({"rows": 1, "cols": 8}),), benchmarks_cuda=()
    ),
}


def family(name: str) -> str:
    """The first word of a peer's name: "apex" of "apex fast"."""
    return name.partition(" ")[0]


def shapes(case: OpCase, device: str) -> tuple[Variant, ...]:
    return (case.benchmarks_cuda if device == "cuda" else ()) or case.benchmarks


class Timer(NamedTuple):
    """ms(calls): milliseconds a call. by: GRAPH, LAUNCHES or HOST; why: what prevented a graph."""

    ms: Callable[[int], float]
    by: str
    why: str | None = None


class OpWorker:
    """The contenders of one shape at a time, and the ceilings."""

    def __init__(self, make_clock: Callable[[torch.device], Clock] = Clock):
        self.make_clock = make_clock

    def prepare(self, op: str, index: int, dtype: torch.dtype, device: str, vs: tuple[str, ...]):
        """({contender: its passes}, {contender: why it is missing}) of benchmark shape `index` of `op`."""
        case = BENCHMARKS[op]
        self.runners: dict[str, OpRunner] = {}
        self.timers: dict[tuple[str, str], Timer] = {}
        self.graph: CudaGraph | None = None  # whose memory the next one shares
        self.device, self.ahead = torch.device(device), op != OVERHEAD
        self.clock = self.make_clock(self.device)
        torch.manual_seed(0)
        if "compile" in vs:
            torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        variant = shapes(case, device)[index]
        no_dropout = {name: 0.0 for name in ("dropout_p", "p") if name in variant.options}
        want, count = self._exact(case, variant, no_dropout)
        sets = self._input_sets(case, variant, dtype)
        kept = {name: x.detach().clone() for name, x in sets[0].items() if isinstance(x, torch.Tensor)}
        builders, missing = self._builders(case, variant, sets, count, vs)
        for name, build in builders.items():
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    runner = build()
                    wrong = disagreement(runner.results(**no_dropout), want, AGREEMENT[dtype])
                except Exception as error:  # any: this contender is named, and the rest run
                    missing[name] = reason(error, said)
                    continue
                finally:
                    changed = restore(sets[0], kept)
            if changed:
                missing[name] = f"overwrites its {', '.join(changed)}"
            elif wrong:
                missing[name] = f"{WRONG}{wrong}"
            else:
                self.runners[name] = runner
        return {name: PASSES if runner.cotangents else PASSES[:1] for name, runner in self.runners.items()}, missing

    def _builders(self, case, variant, sets, count, vs) -> tuple[dict[str, Callable], dict[str, str]]:
        """({contender: what makes its OpRunner}, {contender: why it is missing})."""
        known = dict(PEERS[case.op])
        if "compile" in vs:
            eager = known["eager"]
            known["compile"] = Peer(torch.compile(eager.function, dynamic=False), eager.adapt)
        missing = {name: f"has no {case.op}" for name in vs if not any(family(peer) == name for peer in known)}
        builders = {}
        for name, peer in known.items():
            if family(name) in vs and peer.cuda and self.device.type != "cuda":
                missing[name] = f"needs CUDA, the device is {self.device}"
            elif family(name) in vs:
                builders[name] = partial(OpRunner.of, peer, sets, variant.options)
        for backend in self._backends(case.op, sets[0]):
            function = partial(case.function, backend=backend)
            builders[f"fastlm:{backend}"] = partial(OpRunner, function, sets, variant.options, count)
        return builders, missing

    def _exact(self, case: OpCase, variant: Variant, no_dropout: dict) -> tuple[dict, int]:
        """Eager's results in float32, the reference's where torch has no such form, and the number of outputs."""
        sets = [self._draw(case, variant, 0, torch.float32)]
        try:
            runner = OpRunner.of(PEERS[case.op]["eager"], sets, variant.options)
        except Unsupported:
            runner = OpRunner(case.reference, sets, variant.options)
        return runner.results(**no_dropout), runner.count

    def _draw(self, case: OpCase, variant: Variant, seed: int, dtype: torch.dtype) -> dict:
        return case.inputs(variant, seed, dtype, self.device.type, draw_on=self.device.type)

    def _input_sets(self, case: OpCase, variant: Variant, dtype: torch.dtype) -> list[dict]:
        """As many inputs as it takes to fill the cache twice."""
        first = self._draw(case, variant, 0, dtype)
        size = sum(x.numel() * x.element_size() for x in first.values() if isinstance(x, torch.Tensor))
        count = ceilings.sets_to_fill_cache(size, self.device)
        return [first, *(self._draw(case, variant, seed, dtype) for seed in range(1, count))]

    def _backends(self, op: str, inputs: dict) -> list[str]:
        """Those of OURS that can run here; where none can, "auto"."""
        x = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
        names = [name for name in OURS if _registry.reason(op, name, x.device.type, x.dtype, x) is None]
        return names or ["auto"]

    def prepare_ceilings(self, dtype: torch.dtype, device: str, moved: int) -> dict[str, float]:
        """Bytes of one copy and operations of one matrix product, beside an op that moves `moved` bytes."""
        self.device = torch.device(device)
        self.clock = self.make_clock(self.device)
        copy, copied = ceilings.copy(self.device, moved)
        self.ceilings = {"copy": copy, "matmul": ceilings.matmul(self.device, dtype)}
        self.ceiling_timers: dict[str, Callable[[int], float]] = {}
        self.ceiling_sets = {"copy": ceilings.sets_to_fill_cache(copied // 2, self.device), "matmul": 1}
        return {"copy": copied, "matmul": ceilings.matmul_flops(self.device)}

    def allocator(self) -> str:
        return _malloc.state()

    def time(self, name: str, which: str, calls: int) -> float:
        """Milliseconds a call; on a CUDA device the device's."""
        with self.runners[name].around():
            return self._timer(name, which).ms(calls)

    def _timer(self, name: str, which: str) -> Timer:
        """Made at the first call, for the pass's whole measurement."""
        if (name, which) not in self.timers:
            self.timers[name, which] = self._make_timer(self.runners[name], which)
        return self.timers[name, which]

    def _make_timer(self, runner: OpRunner, which: str) -> Timer:
        function = partial(runner.run, which)
        plain = partial(timing.time_calls, function, clock=self.clock, ahead=self.ahead)
        if not (self.clock.on_gpu and self.ahead):
            return Timer(plain, HOST)
        try:
            timer = timing.GraphTimer(function, len(runner.sets), self.clock, self.graph)
        except Exception as error:  # any: this contender is marked and timed by launches
            self.graph = None
            return Timer(plain, LAUNCHES, reason(error))
        self.graph = timer.graph
        return Timer(timer, GRAPH)

    def how(self, name: str, which: str) -> tuple[str, str | None, float | None]:
        """(GRAPH, LAUNCHES or HOST, why no graph, on a CUDA device the host's milliseconds a call)."""
        runner = self.runners[name]
        with runner.around():
            timer = self._timer(name, which)
            host = timing.host_ms(partial(runner.run, which), self.clock) if self.clock.on_gpu else None
        return timer.by, timer.why, host

    def time_ceiling(self, name: str, calls: int) -> float:
        if name not in self.ceiling_timers:
            function = self.ceilings[name]
            if self.clock.on_gpu:
                timer = timing.GraphTimer(function, self.ceiling_sets[name], self.clock)
            else:
                timer = partial(timing.time_calls, function, clock=self.clock)
            self.ceiling_timers[name] = timer
        return self.ceiling_timers[name](calls)

    def peak_mb(self, name: str, which: str) -> float | None:
        """Memory that one call takes at its peak beyond its inputs."""
        runner = self.runners[name]
        with runner.around():
            return memory.peak_of_call(partial(runner.run, which), self.device)


# ---- processes


def serve(connection, allocator: str) -> None:
    """Answers (method, arguments) with (True, result) or (False, traceback), until the connection closes."""
    if allocator == "tuned":
        _malloc.tune()
    worker = OpWorker()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(worker, method)(*arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))


class Process:
    """An OpWorker in its own process, whose allocator is as shipped ("default") or "tuned"."""

    def __init__(self, allocator: str):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, allocator), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, method: str, *arguments):
        self.connection.send((method, arguments))
        done, result = self.connection.recv()
        if not done:
            raise RuntimeError(f"{method}{arguments}:\n{result}")
        return result

    def close(self) -> None:
        self.connection.close()
        self.process.join()
