"""Every op beside what a user would run instead.

    python benchmarks/bench_ops.py --op all --device cpu --json ops.json --plot ops.png

All contenders of a shape are timed in turn, round by round, on fresh inputs larger than the cache, and with them the
ceilings: a large copy and a large matrix product. Before the clock every contender's results are held against eager's
in float32. On a CPU the contenders run in two processes, one with glibc's allocator as shipped and one ("+malloc") that
keeps freed memory, as fastlm's command line does; the best time of all peers counts. What cannot run is named with why.

"fwd" is a forward with autograd on, "fwd+bwd" adds the gradients of all that has one. GB/s and TFLOP/s count what the
maths must read, write and multiply, not what a contender does.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import math
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import _report
import torch
from peers import PEERS, Peer, Unsupported

from fastlm import _malloc
from fastlm.ops import _registry
from fastlm.testing import timing
from fastlm.testing.cases import CASES, OpCase, Variant

ALLOCATORS = {"default": "", "tuned": "+malloc"}  # and what a contender's name gets for it
PASSES = ("fwd", "fwd+bwd")
VS = ("eager", "compile", "sdpa", "chunked")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# RMS difference from eager in float32, relative to its RMS: room for rounding and none for skipped work.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Beside the ops' own shapes, one so small that only the cost of a call is left.
OVERHEAD = dataclasses.replace(CASES["layer_norm"], benchmarks=(Variant({"rows": 1, "cols": 8}),))
OURS = ("cpu", "triton", "cuda")
MATMUL = {"cpu": 1024, "cuda": 8192}  # rows and columns of the square matrices
WRONG = "WRONG: "
BENCHMARKS: dict[str, OpCase] = {**CASES, "call overhead": OVERHEAD}


# ---- in the process that runs the contenders


class Contender:
    """A function with its options over sets of inputs; every call takes the next set."""

    def __init__(self, function: Callable, sets: list[dict], options: dict, outputs: int | None = None, real=None):
        """`outputs`: how many leading outputs count (all); `real`: as of peers.Peer."""
        self.function, self.sets, self.options, self.real = function, sets, options, real
        self.count = outputs
        first = self.outputs(sets[0])
        self.count = len(first)
        self.cotangents = [torch.randn_like(out) for out in first if out.requires_grad]
        self.next_set = itertools.cycle(sets).__next__

    def outputs(self, inputs: dict, **options) -> tuple[torch.Tensor, ...]:
        out = self.function(**inputs, **{**self.options, **options})
        return (tuple(out) if isinstance(out, (tuple, list)) else (out,))[: self.count]

    def gradients(self, inputs, outputs, cotangents) -> dict[str, torch.Tensor]:
        leaves = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
        outputs = [out for out in outputs if out.requires_grad]
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
        return {name: grad for name, grad in zip(leaves, grads) if grad is not None}

    def run(self, which: str):
        """One pass; what it returns keeps the results alive until the next call."""
        inputs = self.next_set()
        outputs = self.outputs(inputs)
        return outputs if which == "fwd" else self.gradients(inputs, outputs, self.cotangents)

    def results(self, **options) -> dict[str, torch.Tensor]:
        """Outputs, and gradients for the outputs themselves as cotangents, by name, in the op's own form."""
        inputs = self.sets[0]
        outputs = self.outputs(inputs, **options)
        named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
        if self.cotangents:
            cotangents = [out.detach() for out in outputs if out.requires_grad]
            if self.real is not None:
                cotangents = [c * self.real[..., None, None] for c in cotangents]
            named |= {f"d{name}": grad for name, grad in self.gradients(inputs, outputs, cotangents).items()}
        return {name: x if self.real is None else x[self.real] for name, x in named.items()}


def disagreement(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], bound: float) -> str | None:
    """How `got` differs from eager's results in float32, or None. Random integers are compared by their means."""
    for name in got.keys() & want.keys():
        x, y = got[name].double(), want[name].double()
        if x.shape != y.shape:
            return f"{name} has shape {tuple(x.shape)}, eager's {tuple(y.shape)}"
        random = not want[name].dtype.is_floating_point
        error = (x.mean() - y.mean()).abs() / y.mean().abs() if random else (x - y).norm() / y.norm()
        if not error <= (0.05 if random else bound):
            return f"{name} is {error:.2g} away from eager's in float32"
    return None


def reason(error: Exception) -> str:
    """The first line of what went wrong."""
    expected = isinstance(error, (Unsupported, ValueError))
    return (str(error) if expected else f"{type(error).__name__}: {error}").partition("\n")[0]


def cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    name = "SC_LEVEL3_CACHE_SIZE"
    return (os.sysconf(name) if name in os.sysconf_names else 0) or 64 << 20


def resident_mb(name: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process, MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


class Bench:
    """The contenders of one shape at a time, and the ceilings."""

    def prepare(self, op: str, index: int, dtype: torch.dtype, device: str, vs: tuple[str, ...]):
        """({contender: its passes}, {contender: why it is missing}) of benchmark shape `index` of `op`."""
        self.functions: dict[tuple[str, str], Callable] = {}
        self.device = torch.device(device)
        torch.manual_seed(0)
        torch._dynamo.reset()
        case = BENCHMARKS[op]
        variant = case.benchmarks[index]
        peers = PEERS[case.op]
        compiled = Peer(torch.compile(peers["eager"].function, dynamic=False), peers["eager"].adapt)
        peers = {**peers, "compile": compiled}
        exact_sets = [case.inputs(variant, 0, torch.float32, device)]
        try:
            exact = adapted(peers["eager"], exact_sets, variant.options)
        except Unsupported:
            exact = Contender(case.reference, exact_sets, variant.options)
        no_dropout = {"dropout_p": 0.0} if "dropout_p" in variant.options else {}
        want = exact.results(**no_dropout)

        sets = self.input_sets(case, variant, dtype)
        builders = {name: partial(adapted, peers[name], sets, variant.options) for name in vs if name in peers}
        for backend in self.backends(case.op, sets[0]):
            function = partial(case.function, backend=backend)
            builders[f"fastlm:{backend}"] = partial(Contender, function, sets, variant.options, exact.count)
        passes, missing = {}, {}
        for name, build in builders.items():
            try:
                contender = build()
                wrong = disagreement(contender.results(**no_dropout), want, AGREEMENT[dtype])
            except Exception as error:  # whatever it is, this one is named and the others run
                missing[name] = reason(error)
                continue
            if wrong:
                missing[name] = f"{WRONG}{wrong}"
                continue
            passes[name] = PASSES if contender.cotangents else PASSES[:1]
            self.functions |= {(name, which): partial(contender.run, which) for which in passes[name]}
        return passes, missing

    def input_sets(self, case: OpCase, variant: Variant, dtype: torch.dtype) -> list[dict]:
        """As many inputs as it takes to fill the cache twice."""
        first = case.inputs(variant, 0, dtype, self.device.type)
        size = sum(x.numel() * x.element_size() for x in first.values() if isinstance(x, torch.Tensor))
        count = min(32, math.ceil(2 * cache_bytes(self.device) / size))
        return [first, *(case.inputs(variant, seed, dtype, self.device.type) for seed in range(1, count))]

    def backends(self, op: str, inputs: dict) -> list[str]:
        """fastlm's own that can run here; where there is none, whatever `auto` runs."""
        x = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
        names = [name for name in OURS if _registry.reason(op, name, x.device.type, x.dtype, x) is None]
        return names or ["auto"]

    def prepare_ceilings(self, dtype: torch.dtype, device: str) -> dict[str, int]:
        """Bytes that one copy moves, and the operations of one matrix product."""
        gpu = device == "cuda"
        source = torch.ones((1 << 30 if gpu else 1 << 28) // 4, device=device)
        target = torch.empty_like(source)
        a, b = (torch.randn(2, MATMUL[device], MATMUL[device], device=device) * 0.01).to(dtype)
        c = torch.empty_like(a)
        self.ceilings = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.matmul(a, b, out=c)}
        self.device = torch.device(device)
        return {"copy": 2 * source.nbytes, "matmul": 2 * MATMUL[device] ** 3}

    def allocator(self) -> str:
        return _malloc.state()

    def time(self, name: str, which: str, calls: int) -> float:
        """Milliseconds a call."""
        return timing.time_calls(self.functions[name, which], calls, self.device)

    def time_ceiling(self, name: str, calls: int) -> float:
        return timing.time_calls(self.ceilings[name], calls, self.device)

    def peak_mb(self, name: str, which: str) -> float | None:
        """Memory that one call takes at its peak beyond its inputs; on a CPU resident memory, on Linux alone."""
        function = self.functions[name, which]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        if not Path("/proc/self/clear_refs").exists():
            return None
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before = resident_mb("VmRSS")
        function()
        return max(0.0, resident_mb("VmHWM") - before)


def adapted(peer: Peer, sets: list[dict], options: dict) -> Contender:
    if peer.adapt is None:
        return Contender(peer.function, sets, options)
    triples = [peer.adapt(inputs, options) for inputs in sets]
    return Contender(peer.function, [inputs for inputs, _, _ in triples], triples[0][1], real=triples[0][2])


def serve(connection, allocator: str) -> None:
    """Answers (method, arguments) with (True, result) or (False, traceback), until the connection closes."""
    if allocator == "tuned":
        _malloc.tune()
    bench = Bench()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(bench, method)(*arguments)))
        except Exception:
            connection.send((False, traceback.format_exc()))


# ---- in the process that was started


class Process:
    """A Bench in a process of its own, whose allocator is as shipped ("default") or "tuned"."""

    def __init__(self, allocator: str):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, allocator), daemon=True)
        self.process.start()
        theirs.close()

    def close(self):
        self.connection.close()
        self.process.join()

    def __call__(self, method: str, *arguments):
        self.connection.send((method, arguments))
        done, result = self.connection.recv()
        if not done:
            raise RuntimeError(f"{method}{arguments}:\n{result}")
        return result


def label(case: OpCase, variant: Variant) -> str:
    """The shape, and the options in which the case's benchmarks differ: "rows8192-cols768-dropout_p=0.1"."""

    def word(name, value, joint=""):
        long = isinstance(value, tuple) and len(value) > 4
        return f"{name}{joint}{f'{len(value)}of{sum(value)}' if long else value}"

    common = set.intersection(*({(k, str(v)) for k, v in other.options.items()} for other in case.benchmarks))
    options = [word(k, v, "=") for k, v in variant.options.items() if (k, str(v)) not in common]
    return "-".join([*(word(k, v) for k, v in variant.shape.items()), *options])


def bench_shape(processes, op, index, dtype, args) -> tuple[list[dict], dict[str, str], list[dict]]:
    """(rows of one shape, {contender: why it is missing}, the ceilings as measured beside each pass)."""
    case = BENCHMARKS[op]
    variant = case.benchmarks[index]
    missing: dict[str, str] = {}
    contenders: dict[str, dict[str, tuple[Process, str]]] = {which: {} for which in PASSES}
    for suffix, process in processes.items():
        passes, absent = process("prepare", op, index, DTYPES[dtype], args.device, args.vs)
        missing |= {name + suffix: why for name, why in absent.items()}
        for name, its in passes.items():
            for which in its:
                contenders[which][name + suffix] = process, name
    first = next(iter(processes.values()))
    amounts = first("prepare_ceilings", DTYPES[dtype], args.device)
    rows, ceilings = [], []
    for which, running in contenders.items():
        if not running:
            continue
        timers = {name: partial(process, "time", plain, which) for name, (process, plain) in running.items()}
        timers |= {name: partial(first, "time_ceiling", name) for name in amounts}
        times = timing.interleaved_timers(timers, rounds=args.rounds, min_ms=args.min_ms)
        copy, matmul = (amounts[name] / times[name].ms for name in ("copy", "matmul"))  # a millisecond
        ceilings.append(
            {"op": op, "shape": label(case, variant), "copy_gbps": copy / 1e6, "matmul_tflops": matmul / 1e9}
        )
        directions = (False, True)[: 1 + PASSES.index(which)]
        count = variant.shape, variant.options
        moved = sum(case.bytes(*count, DTYPES[dtype].itemsize, backward) for backward in directions)
        flops = sum(case.flops(*count, backward) for backward in directions)
        for name, (process, plain) in running.items():
            ms = times[name].ms
            rows.append(
                {
                    "op": op,
                    "shape": label(case, variant),
                    "dtype": dtype,
                    "pass": which,
                    "contender": name,
                    "ms": ms,
                    "ms_iqr": times[name].iqr,
                    "gbps": moved / ms / 1e6,
                    "tflops": flops / ms / 1e9,
                    "of_ceiling": flops / ms / matmul if flops else moved / ms / copy,
                    "peak_mb": process("peak_mb", plain, which),
                }
            )
    return rows, missing, ceilings


def is_ours(row: dict) -> bool:
    return row["contender"].startswith("fastlm")


def best_peer(row: dict, rows: list[dict]) -> dict | None:
    """The fastest peer at row's shape and pass, whatever its allocator."""
    same = [r for r in rows if all(r[key] == row[key] for key in ("op", "shape", "dtype", "pass")) and not is_ours(r)]
    return min(same, key=lambda r: r["ms"], default=None)


def lines(rows: list[dict]) -> list[str]:
    """An aligned line for each of fastlm's rows; the peers' times stand behind it."""
    out = []
    for row in filter(is_ours, rows):
        others = [r for r in rows if (r["shape"], r["pass"]) == (row["shape"], row["pass"]) and not is_ours(r)]
        peer = best_peer(row, rows)
        columns = (
            f"{row['shape'][:44]:<44} {row['pass']:<7} {row['contender']:<17}",
            f"{row['ms'] * 1e3:10.1f} us ±{50 * row['ms_iqr'] / row['ms']:3.0f}%",
            f"{row['gbps']:8.1f} GB/s",
            f"{row['tflops']:8.3f} TFLOP/s" if row["tflops"] else " " * 16,
            f"{row['of_ceiling']:5.0%} of {'matmul' if row['tflops'] else 'copy  '}",
            f"x {peer['ms'] / row['ms']:5.2f} of {peer['contender']:<15}" if peer else f"{'no peer':<26}",
        )
        out.append(" ".join(columns) + " | " + "  ".join(f"{r['contender']} {r['ms'] * 1e3:.1f}" for r in others))
    return out


def summary(op: str, rows: list[dict]) -> list[str]:
    """The geometric mean over an op's shapes of (best peer / fastlm), for each of fastlm's contenders and passes."""
    out = []
    for name in dict.fromkeys(r["contender"] for r in rows if is_ours(r)):
        for which in PASSES:
            pairs = [(r, best_peer(r, rows)) for r in rows if (r["contender"], r["pass"]) == (name, which)]
            ratios = [peer["ms"] / row["ms"] for row, peer in pairs if peer]
            if ratios:
                mean = _report.geometric_mean(ratios)
                out.append(
                    f"{op} {which}: {name} is x {mean:.2f} of the best peer, geometric mean of {len(ratios)} shapes"
                )
    return out


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", default="all", help=f"all, or of {', '.join(BENCHMARKS)}; several with commas")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--vs", default=",".join(VS), help=f"peers, of {','.join(VS)}")
    parser.add_argument("--malloc", default="both", choices=("both", "default", "tuned"), help="allocator, cpu only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--min-ms", type=float, default=20.0, help="a contender's time in one round")
    parser.add_argument("--quick", action="store_true", help="the first shape of every op")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(arguments)
    args.op = list(BENCHMARKS) if args.op == "all" else args.op.split(",")
    args.vs = tuple(args.vs.split(","))
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    for what, given, known in (("--op", args.op, BENCHMARKS), ("--vs", args.vs, VS), ("--dtype", [args.dtype], DTYPES)):
        if unknown := set(given) - set(known):
            parser.error(f"{what}: expected {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return args


def main(arguments=None) -> int:
    args = parse(arguments)
    allocators = list(ALLOCATORS) if args.malloc == "both" else [args.malloc]
    processes = {ALLOCATORS[name]: Process(name) for name in (allocators if args.device == "cpu" else ["default"])}
    states = {name: process("allocator") for name, process in processes.items()}
    rows, ceilings, wrong = [], [], False
    for op in args.op:
        print(f"\n{op}, {args.dtype} on {args.device}", flush=True)
        for index in range(1 if args.quick else len(BENCHMARKS[op].benchmarks)):
            new, missing, beside = bench_shape(processes, op, index, args.dtype, args)
            rows, ceilings = rows + new, ceilings + beside
            print("\n".join(lines(new)), flush=True)
            for name, why in missing.items():
                wrong |= why.startswith(WRONG)
                print(f"{'':<44} {name}: {why}", flush=True)
            if args.json:
                _report.write_json(args.json, rows, allocator=states, ceilings=ceilings)
        print("\n".join(summary(op, [row for row in rows if row["op"] == op])), flush=True)
    for process in processes.values():
        process.close()
    if args.plot:
        groups: dict[str, dict[str, float]] = {}
        for row in rows:
            groups.setdefault(f"{row['op']} {row['shape'][:44]} {row['pass']}", {})[row["contender"]] = row["ms"]
        _report.plot(args.plot, groups, title=f"ops, {args.dtype} on {args.device}", unit="ms, median")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
