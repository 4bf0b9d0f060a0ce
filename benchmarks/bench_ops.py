"""Every op beside what a user would run instead.

    python benchmarks/bench_ops.py --op all --device cpu --json ops.json --plot ops.png
    python benchmarks/bench_ops.py --op attention --device cuda --vs sdpa-flash,sdpa-cudnn,flash_attn

All contenders of a shape are timed in turn, round by round, on fresh inputs larger than the cache, and with them the
ceilings: a copy, on a GPU of as many bytes as the op moves, and a large matrix product. Before the clock every contender's results are held against eager's
in float32. On a CPU the contenders run in two processes, one with glibc's allocator as shipped and one ("+malloc") that
keeps freed memory, as fastlm's command line does; the best time of all peers counts. What cannot run is named with why.
Memory is measured after the clock, in a call of its own.

"fwd" is a forward with autograd on, "fwd+bwd" adds the gradients of all that has one. GB/s and TFLOP/s count what the
maths must read, write and multiply, not what a contender does.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import itertools
import math
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import _report
import peers
import torch
from libraries import LIBRARIES
from peers import Peer, Unsupported

from fastlm import _malloc
from fastlm.ops import _registry
from fastlm.testing import timing
from fastlm.testing.cases import CASES, OpCase, Variant

ALLOCATORS = {"default": "", "tuned": "+malloc"}  # and what a contender's name gets for it
PASSES = ("fwd", "fwd+bwd")
PEERS = {op: {**torchs, **LIBRARIES.get(op, {})} for op, torchs in peers.PEERS.items()}
# By the first word of a contender's name; the first five by default on a CPU, on a GPU all.
VS = (
    *("eager", "compile", "sdpa", "chunked", "transformers"),
    *("sdpa-flash", "sdpa-cudnn", "liger", "flash_attn", "apex", "te", "quack"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# RMS difference from eager in float32, relative to its RMS: room for rounding and none for skipped work.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Beside the ops' own shapes, one so small that only the cost of a call is left.
OVERHEAD = dataclasses.replace(CASES["layer_norm"], benchmarks=(Variant({"rows": 1, "cols": 8}),), benchmarks_cuda=())
OURS = ("cpu", "triton", "cuda")
MATMUL = {"cpu": 1024, "cuda": 8192}  # rows and columns of the square matrices
MOST_SETS = 32  # of inputs
WRONG = "WRONG: "
BENCHMARKS: dict[str, OpCase] = {**CASES, "call overhead": OVERHEAD}


# ---- in the process that runs the contenders


class Contender:
    """A function with its options over sets of inputs; every call takes the next set."""

    def __init__(
        self, function: Callable, sets: list[dict], options: dict, outputs: int | None = None, real=None,
        around: Callable = nullcontext,
    ):  # fmt: skip
        """`outputs`: how many leading outputs count (all); `real`, `around`: as of peers.Peer."""
        self.function, self.sets, self.options, self.real, self.around = function, sets, options, real, around
        self.count = outputs
        with around():
            first = self.outputs(sets[0])
        self.count = len(first)
        # Of a loss 1, as training has it.
        self.cotangents = [
            (torch.randn_like if out.ndim else torch.ones_like)(out) for out in first if out.requires_grad
        ]
        self.next_set = itertools.cycle(sets).__next__

    def outputs(self, inputs: dict, **options) -> tuple[torch.Tensor, ...]:
        out = self.function(**inputs, **{**self.options, **options})
        return (tuple(out) if isinstance(out, (tuple, list)) else (out,))[: self.count]

    def gradients(self, inputs, outputs, cotangents) -> dict[str, torch.Tensor | None]:
        leaves = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
        outputs = [out for out in outputs if out.requires_grad]
        return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)))

    def run(self, which: str):
        """One pass; what it returns keeps the results alive until the next call."""
        inputs = self.next_set()
        outputs = self.outputs(inputs)
        return outputs if which == "fwd" else self.gradients(inputs, outputs, self.cotangents)

    def results(self, **options) -> dict[str, torch.Tensor | None]:
        """Outputs, and gradients for the outputs themselves as cotangents, by name, in the op's own form.

        None for the gradient of what no output depends on.
        """
        inputs = self.sets[0]
        with self.around():
            outputs = self.outputs(inputs, **options)
            named = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
            if self.cotangents:
                cotangents = [out.detach() for out in outputs if out.requires_grad]
                if self.real is not None:
                    cotangents = [c * self.real[..., None, None] for c in cotangents]
                named |= {f"d{name}": grad for name, grad in self.gradients(inputs, outputs, cotangents).items()}
        return {name: x if self.real is None or x is None else x[self.real] for name, x in named.items()}


def disagreement(got: dict, want: dict, bound: float) -> str | None:
    """How `got` differs from eager's results in float32, or None. Random integers are compared by their means.

    Whoever takes an input in another form (T5's table, where eager takes the bias) has no gradient of eager's, and
    whoever has no backward none at all; that one is timed forward alone.
    """
    for name, expected in want.items():
        if name not in got and name.startswith("output"):
            return f"{name} is missing"
        if name not in got or expected is None:
            continue
        if got[name] is None:
            return f"{name} is missing"
        x, y = got[name].double(), expected.double()
        if x.shape != y.shape:
            return f"{name} has shape {tuple(x.shape)}, eager's {tuple(y.shape)}"
        random = not expected.dtype.is_floating_point
        error = (x.mean() - y.mean()).abs() / y.mean().abs() if random else (x - y).norm() / y.norm()
        if not error <= (0.05 if random else bound):
            return f"{name} is {error:.2g} away from eager's in float32"
    return None


def restore(inputs: dict, kept: dict[str, torch.Tensor]) -> list[str]:
    """Puts back what a contender has overwritten of its inputs, and names it."""
    changed = [name for name, value in kept.items() if not torch.equal(inputs[name], value)]
    for name in changed:
        inputs[name].detach().copy_(kept[name])
    return changed


def reason(error: Exception, said: list[warnings.WarningMessage] = ()) -> str:
    """The first line of what went wrong. Of SDPA, what torch warned of: why the one kernel it may take cannot be."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    if "No available kernel" in str(error):
        reasons = [str(warning.message).partition(" (Triggered")[0] for warning in said]
        return "; ".join(dict.fromkeys(text for text in reasons if not text.endswith("because:"))) or str(error)
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
        self.contenders: dict[str, Contender] = {}
        self.device, self.ahead = torch.device(device), BENCHMARKS[op] is not OVERHEAD
        torch.manual_seed(0)
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        case = BENCHMARKS[op]
        variant = shapes(case, device)[index]
        eager = PEERS[case.op]["eager"]
        known = {**PEERS[case.op], "compile": Peer(torch.compile(eager.function, dynamic=False), eager.adapt)}
        no_dropout = {name: 0.0 for name in ("dropout_p", "p") if name in variant.options}
        want, count = self.exact(case, variant, eager, no_dropout)

        sets = self.input_sets(case, variant, dtype)
        kept = {name: x.detach().clone() for name, x in sets[0].items() if isinstance(x, torch.Tensor)}
        missing = {name: f"has no {case.op}" for name in vs if not any(family(peer) == name for peer in known)}
        builders = {}
        for name, peer in known.items():
            if family(name) in vs:
                builders[name] = partial(adapted, peer, sets, variant.options)
                if peer.cuda and self.device.type != "cuda":
                    missing[name] = f"needs CUDA, the device is {device}"
                    del builders[name]
        for backend in self.backends(case.op, sets[0]):
            function = partial(case.function, backend=backend)
            builders[f"fastlm:{backend}"] = partial(Contender, function, sets, variant.options, count)
        for name, build in builders.items():
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    contender = build()
                    wrong = disagreement(contender.results(**no_dropout), want, AGREEMENT[dtype])
                except Exception as error:  # whatever it is, this one is named and the others run
                    missing[name] = reason(error, said)
                    continue
                finally:
                    changed = restore(sets[0], kept)
            if changed:
                missing[name] = f"overwrites its {', '.join(changed)}"
            elif wrong:
                missing[name] = f"{WRONG}{wrong}"
            else:
                self.contenders[name] = contender
        return {name: PASSES if c.cotangents else PASSES[:1] for name, c in self.contenders.items()}, missing

    def exact(self, case: OpCase, variant: Variant, eager: Peer, no_dropout: dict) -> tuple[dict, int]:
        """Eager's results in float32, the reference's where torch has no such form, and the number of outputs."""
        sets = [self.draw(case, variant, 0, torch.float32)]
        try:
            contender = adapted(eager, sets, variant.options)
        except Unsupported:
            contender = Contender(case.reference, sets, variant.options)
        return contender.results(**no_dropout), contender.count

    def draw(self, case: OpCase, variant: Variant, seed: int, dtype: torch.dtype) -> dict:
        return case.inputs(variant, seed, dtype, self.device.type, draw_on=self.device.type)

    def input_sets(self, case: OpCase, variant: Variant, dtype: torch.dtype) -> list[dict]:
        """As many inputs as it takes to fill the cache twice."""
        first = self.draw(case, variant, 0, dtype)
        size = sum(x.numel() * x.element_size() for x in first.values() if isinstance(x, torch.Tensor))
        count = min(MOST_SETS, math.ceil(2 * cache_bytes(self.device) / size))
        return [first, *(self.draw(case, variant, seed, dtype) for seed in range(1, count))]

    def backends(self, op: str, inputs: dict) -> list[str]:
        """fastlm's own that can run here; where there is none, whatever `auto` runs."""
        x = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
        names = [name for name in OURS if _registry.reason(op, name, x.device.type, x.dtype, x) is None]
        return names or ["auto"]

    def prepare_ceilings(self, dtype: torch.dtype, device: str, moved: int) -> dict[str, int]:
        """Bytes that one copy moves, and the operations of one matrix product.

        On a GPU the copy moves as many as the op, `moved`, between buffers that take turns, together twice the cache; on
        a CPU a large one is the faster, and the ceiling.
        """
        self.device = torch.device(device)
        half = -(-moved // 1024) * 512 if device == "cuda" else 1 << 28  # whole lines of the cache
        count = min(MOST_SETS, math.ceil(2 * cache_bytes(self.device) / half)) if device == "cuda" else 1
        pairs = [(torch.empty_like(x), x) for x in torch.ones(count, half, dtype=torch.uint8, device=device)]
        following = itertools.cycle(pairs).__next__
        a, b = (torch.randn(2, MATMUL[device], MATMUL[device], device=device) * 0.01).to(dtype)
        c = torch.empty_like(a)
        self.ceilings = {"copy": lambda: torch.Tensor.copy_(*following()), "matmul": lambda: torch.matmul(a, b, out=c)}
        return {"copy": 2 * half, "matmul": 2 * MATMUL[device] ** 3}

    def allocator(self) -> str:
        return _malloc.state()

    def time(self, name: str, which: str, calls: int) -> float:
        """Milliseconds a call."""
        contender = self.contenders[name]
        with contender.around():
            return timing.time_calls(partial(contender.run, which), calls, self.device, self.ahead)

    def time_ceiling(self, name: str, calls: int) -> float:
        return timing.time_calls(self.ceilings[name], calls, self.device)

    def peak_mb(self, name: str, which: str) -> float | None:
        """Memory that one call takes at its peak beyond its inputs; on a CPU resident memory, on Linux alone."""
        contender = self.contenders[name]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with contender.around():
                contender.run(which)
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        if not Path("/proc/self/clear_refs").exists():
            return None
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before = resident_mb("VmRSS")
        with contender.around():
            contender.run(which)
        return max(0.0, resident_mb("VmHWM") - before)


def family(name: str) -> str:
    """What --vs calls a peer."""
    return name.partition(" ")[0]


def shapes(case: OpCase, device: str) -> tuple[Variant, ...]:
    return (case.benchmarks_cuda if device == "cuda" else ()) or case.benchmarks


def adapted(peer: Peer, sets: list[dict], options: dict) -> Contender:
    if peer.adapt is None:
        return Contender(peer.function, sets, options, around=peer.around)
    triples = [peer.adapt(inputs, options) for inputs in sets]
    own = [inputs for inputs, _, _ in triples]
    return Contender(peer.function, own, triples[0][1], real=triples[0][2], around=peer.around)


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

    same = next(group for group in (case.benchmarks, case.benchmarks_cuda) if variant in group)
    common = set.intersection(*({(k, str(v)) for k, v in other.options.items()} for other in same))
    options = [word(k, v, "=") for k, v in variant.options.items() if (k, str(v)) not in common]
    return "-".join([*(word(k, v) for k, v in variant.shape.items()), *options])


def bench_shape(processes, op, index, dtype, args) -> tuple[list[dict], dict[str, str], list[dict]]:
    """(rows of one shape, {contender: why it is missing}, the ceilings as measured beside each pass)."""
    case = BENCHMARKS[op]
    variant = shapes(case, args.device)[index]
    missing: dict[str, str] = {}
    contenders: dict[str, dict[str, tuple[Process, str]]] = {which: {} for which in PASSES}
    for suffix, process in processes.items():
        passes, absent = process("prepare", op, index, DTYPES[dtype], args.device, args.vs)
        missing |= {name + suffix: why for name, why in absent.items()}
        for name, its in passes.items():
            for which in its[-1:] if args.whole else its:
                contenders[which][name + suffix] = process, name
    first = next(iter(processes.values()))
    rows, ceilings = [], []
    for which, running in contenders.items():
        if not running:
            continue
        directions = (False, True)[: 1 + PASSES.index(which)]
        count = variant.shape, variant.options
        moved = sum(case.bytes(*count, DTYPES[dtype].itemsize, backward) for backward in directions)
        flops = sum(case.flops(*count, backward) for backward in directions)
        amounts = first("prepare_ceilings", DTYPES[dtype], args.device, moved)
        timers = {name: partial(process, "time", plain, which) for name, (process, plain) in running.items()}
        timers |= {name: partial(first, "time_ceiling", name) for name in amounts}
        times = timing.interleaved_timers(timers, rounds=args.rounds, min_ms=args.min_ms)
        copy, matmul = (amounts[name] / times[name].ms for name in ("copy", "matmul"))  # a millisecond
        ceilings.append(
            {"op": op, "shape": label(case, variant), "copy_gbps": copy / 1e6, "matmul_tflops": matmul / 1e9}
        )
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


def missing_lines(missing: dict[str, str]) -> list[str]:
    """A line for each reason, behind those that it holds for."""
    names: dict[str, list[str]] = {}
    for name, why in missing.items():
        names.setdefault(why, []).append(name)
    return [f"{'':<44} {', '.join(those)}: {why}" for why, those in names.items()]


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
    parser.add_argument("--vs", help=f"peers, of {','.join(VS)}; default {','.join(VS[:5])} on cpu, all on cuda")
    parser.add_argument("--malloc", default="both", choices=("both", "default", "tuned"), help="allocator, cpu only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--min-ms", type=float, default=20.0, help="a contender's time in one round")
    parser.add_argument("--quick", action="store_true", help="the first shape of every op")
    parser.add_argument("--whole", action="store_true", help="fwd+bwd alone, and fwd of what has no gradient")
    parser.add_argument(
        "--seconds",
        type=float,
        help="the first shapes of all ops first, and none begun later; what is left out is named",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(arguments)
    args.op = list(BENCHMARKS) if args.op == "all" else args.op.split(",")
    args.vs = tuple(args.vs.split(",")) if args.vs else VS[: 5 if args.device == "cpu" else None]
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    for what, given, known in (("--op", args.op, BENCHMARKS), ("--vs", args.vs, VS), ("--dtype", [args.dtype], DTYPES)):
        if unknown := set(given) - set(known):
            parser.error(f"{what}: expected {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return args


def main(arguments=None) -> int:
    args = parse(arguments)
    allocators = list(ALLOCATORS) if args.malloc == "both" else [args.malloc]
    processes = {ALLOCATORS[name]: Process(name) for name in (allocators if args.device == "cpu" else ["default"])}
    states = {name: process("allocator") for name, process in processes.items()}
    plan = [(op, i) for op in args.op for i in range(1 if args.quick else len(shapes(BENCHMARKS[op], args.device)))]
    if args.seconds is not None:
        plan.sort(key=lambda step: step[1])
    rows, ceilings, absent, left_out, began, last = [], [], [], [], time.monotonic(), None
    for op, index in plan:
        shape = label(BENCHMARKS[op], shapes(BENCHMARKS[op], args.device)[index])
        if args.seconds is not None and time.monotonic() - began > args.seconds:
            left_out.append({"op": op, "shape": shape})
            continue
        if op != last:
            print(f"\n{op}, {args.dtype} on {args.device}", flush=True)
        last = op
        new, missing, beside = bench_shape(processes, op, index, args.dtype, args)
        rows, ceilings = rows + new, ceilings + beside
        print("\n".join([*lines(new), *missing_lines(missing)]), flush=True)
        absent += [{"op": op, "shape": shape, "contender": name, "reason": why} for name, why in missing.items()]
        if args.json:
            _report.write_json(args.json, rows, allocator=states, ceilings=ceilings, missing=absent, left_out=[])
    if args.json and left_out:
        _report.write_json(args.json, rows, allocator=states, ceilings=ceilings, missing=absent, left_out=left_out)
    print()
    for op in args.op:
        for line in summary(op, [row for row in rows if row["op"] == op]):
            print(line, flush=True)
    for step in left_out:
        print(f"left out after {args.seconds:g} s: {step['op']} {step['shape']}", flush=True)
    for process in processes.values():
        process.close()
    if args.plot:
        groups: dict[str, dict[str, float]] = {}
        for row in rows:
            groups.setdefault(f"{row['op']} {row['shape']} {row['pass']}", {})[row["contender"]] = row["ms"]
        _report.plot(args.plot, groups, title=f"ops, {args.dtype} on {args.device}", unit="ms, median")
    return int(any(one["reason"].startswith(WRONG) for one in absent))


if __name__ == "__main__":
    sys.exit(main())
