"""Every op beside what a user would run instead: the program of benchmarks/bench_ops.py.

All contenders of a shape are timed in turn, round by round, on fresh inputs larger than the cache. The ceilings are
timed with them: a copy, on a GPU of as many bytes as the op moves, and a large matrix product. Before the clock every
contender's results are checked against eager's in float32. On a CPU the contenders run in two processes, one with
glibc's allocator as shipped and one ("+malloc") that keeps freed memory, as fastlm's command line does; the best time
of all peers counts. A contender that cannot run is named with the reason. Memory is measured after the clock, in a call
of its own.

On a GPU a time is the device's, by replays of a CUDA graph. "host" is the time until a call returns to Python with its
kernels launched, in a row's JSON "host_ms". A contender that cannot be captured has a "*": single launches are timed,
which the host queues ahead. The JSON says so in "timed" ("graph", "launches"; "host" on a CPU), and why in
"not_captured".

"fwd" is a forward with autograd on, "fwd+bwd" adds all gradients. "(with gradient)" marks a forward of fastlm's that
also computes the gradient, which its peers' do not. GB/s and TFLOP/s count what the maths must read, write and
multiply, not what a contender does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fastlm.bench import passes, results, timing
from fastlm.bench.clock import Clock
from fastlm.bench.op_worker import BENCHMARKS, Process, family, shapes
from fastlm.bench.passes import PASSES
from fastlm.bench.peers import PEERS
from fastlm.bench.results import WRONG, best_peer, is_ours, mark
from fastlm.testing.cases import OpCase, Variant

ALLOCATORS = {"default": "", "tuned": "+malloc"}  # and the suffix of a contender's name
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _families() -> dict[str, bool]:
    """{what --vs takes: whether a CPU's default has it}."""
    out = {"compile": True}
    for peers in PEERS.values():
        for name, peer in peers.items():
            out[family(name)] = out.get(family(name), False) or (peer.by_default and not peer.cuda)
    return out


FAMILIES = _families()


def default_vs(device: str) -> tuple[str, ...]:
    """All on a GPU, on a CPU those that run there."""
    return tuple(name for name, on_cpu in FAMILIES.items() if on_cpu or device == "cuda")


def label(case: OpCase, variant: Variant) -> str:
    """The shape, and the options in which the case's benchmarks differ: "rows8192-cols768-dropout_p=0.1"."""

    def word(name, value, joint=""):
        long = isinstance(value, tuple) and len(value) > 4
        return f"{name}{joint}{f'{len(value)}of{sum(value)}' if long else value}"

    same = next(group for group in (case.benchmarks, case.benchmarks_cuda) if variant in group)
    common = set.intersection(*({(k, str(v)) for k, v in other.options.items()} for other in same))
    options = [word(k, v, "=") for k, v in variant.options.items() if (k, str(v)) not in common]
    return "-".join([*(word(k, v) for k, v in variant.shape.items()), *options])


def bench_shape(processes, op, index, dtype, args) -> tuple[list[dict], dict[str, str], list[dict], dict[str, str]]:
    """(rows of one shape, {contender: why it is missing}, the ceilings as measured beside each pass, {contender and
    pass: why it is not timed by a graph}).

    processes: {suffix of a contender's name: Process}.
    """
    case = BENCHMARKS[op]
    shape = label(case, shapes(case, args.device)[index])
    missing: dict[str, str] = {}
    contenders: dict[str, dict[str, tuple[Process, str]]] = {which: {} for which in PASSES}
    for suffix, process in processes.items():
        have, absent = process("prepare", op, index, DTYPES[dtype], args.device, args.vs)
        missing |= {name + suffix: why for name, why in absent.items()}
        for name, its in have.items():
            for which in its[-1:] if args.whole else its:
                contenders[which][name + suffix] = process, name
    rows, ceilings, launched = [], [], {}
    for which, running in contenders.items():
        if running:
            new, beside, why = _time_pass(processes, op, index, dtype, which, running, args)
            rows += new
            launched |= why
            ceilings.append({"op": op, "shape": shape, **beside})
    return rows, missing, ceilings, launched


def _time_pass(processes, op, index, dtype, which, running, args) -> tuple[list[dict], dict, dict[str, str]]:
    """(rows of one pass, {"copy_gbps", "matmul_tflops"}, {contender and pass: why it is not timed by a graph}).

    running: {contender: (process, its name there)}.
    """
    case = BENCHMARKS[op]
    variant = shapes(case, args.device)[index]
    directions = (False, True)[: 1 + PASSES.index(which)]
    moved = sum(case.bytes(variant.shape, variant.options, DTYPES[dtype].itemsize, way) for way in directions)
    flops = sum(case.flops(variant.shape, variant.options, way) for way in directions)
    first = next(iter(processes.values()))
    amounts = first("prepare_ceilings", DTYPES[dtype], args.device, moved)
    timers = {name: partial(process, "time", plain, which) for name, (process, plain) in running.items()}
    timers |= {name: partial(first, "time_ceiling", name) for name in amounts}
    times = timing.interleaved(timers, rounds=args.rounds, min_ms=args.min_ms)
    copy, matmul = (amounts[name] / times[name].ms for name in ("copy", "matmul"))  # a millisecond
    how = {name: process("how", plain, which) for name, (process, plain) in running.items()}
    rows = [
        {
            "op": op,
            "shape": label(case, variant),
            "dtype": dtype,
            "pass": which,
            "contender": name,
            "ms": times[name].ms,
            "ms_iqr": times[name].iqr,
            "host_ms": how[name][2],
            "timed": how[name][0],
            "gbps": moved / times[name].ms / 1e6,
            "tflops": flops / times[name].ms / 1e9,
            "of_ceiling": flops / times[name].ms / matmul if flops else moved / times[name].ms / copy,
            "peak_mb": process("peak_mb", plain, which),
        }
        for name, (process, plain) in running.items()
    ]
    launched = {f"{name} {which}": why for name, (_, why, _) in how.items() if why is not None}
    return rows, {"copy_gbps": copy / 1e6, "matmul_tflops": matmul / 1e9}, launched


# ---- what is printed


def lines(rows: list[dict]) -> list[str]:
    """An aligned line for each of fastlm's rows; the peers' times stand behind it."""
    out = []
    for row in filter(is_ours, rows):
        others = [r for r in rows if (r["shape"], r["pass"]) == (row["shape"], row["pass"]) and not is_ours(r)]
        peer = best_peer(row, rows)
        columns = (
            f"{row['shape'][:44]:<44} {passes.label(row['op'], row['pass']):<19} {row['contender'] + mark(row):<17}",
            f"{row['ms'] * 1e3:10.1f} us ±{50 * row['ms_iqr'] / row['ms']:3.0f}%",
            *([] if row["host_ms"] is None else [f"host {row['host_ms'] * 1e3:7.1f} us"]),
            f"{row['gbps']:8.1f} GB/s",
            f"{row['tflops']:8.3f} TFLOP/s" if row["tflops"] else " " * 16,
            f"{row['of_ceiling']:5.0%} of {'matmul' if row['tflops'] else 'copy  '}",
            f"x {peer['ms'] / row['ms']:5.2f} of {peer['contender']:<15}" if peer else f"{'no peer':<26}",
        )
        out.append(
            " ".join(columns) + " | " + "  ".join(f"{r['contender']}{mark(r)} {r['ms'] * 1e3:.1f}" for r in others)
        )
    return out


def missing_lines(missing: dict[str, str]) -> list[str]:
    """A line for each reason, behind the contenders that it holds for."""
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
                out.append(
                    f"{op} {passes.label(op, which)}: {name} is x {results.geometric_mean(ratios):.2f} of the best "
                    f"peer, geometric mean of {len(ratios)} shapes"
                )
    return out


# ---- the program


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--op", default="all", help=f"all, or of {', '.join(BENCHMARKS)}; several with commas")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default float32 on cpu, bfloat16 on cuda")
    parser.add_argument(
        "--vs", help=f"peers, of {','.join(FAMILIES)}; default {','.join(default_vs('cpu'))} on cpu, all on cuda"
    )
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
    args.vs = tuple(args.vs.split(",")) if args.vs else default_vs(args.device)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    for what, given, known in (
        ("--op", args.op, BENCHMARKS),
        ("--vs", args.vs, FAMILIES),
        ("--dtype", [args.dtype], DTYPES),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"{what}: expected {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return args


def plot(path: Path, rows: list[dict], title: str) -> None:
    """A line for each shape and pass, a mark for each contender."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        name = f"{row['op']} {row['shape']} {passes.label(row['op'], row['pass'])}"
        groups.setdefault(name, {})[row["contender"]] = row["ms"]
    results.plot(path, groups, title=title, unit="ms, median")


def main(arguments=None, *, start: Callable[[str], Process] = Process, clock: Clock | None = None) -> int:
    """start(allocator): a Process. Exit status 1 where a contender computes something else than eager."""
    args, clock = parse(arguments), clock or Clock()
    allocators = list(ALLOCATORS) if args.malloc == "both" else [args.malloc]
    processes = {ALLOCATORS[name]: start(name) for name in (allocators if args.device == "cpu" else ["default"])}
    states = {name: process("allocator") for name, process in processes.items()}
    plan = [(op, i) for op in args.op for i in range(1 if args.quick else len(shapes(BENCHMARKS[op], args.device)))]
    if args.seconds is not None:
        plan.sort(key=lambda step: step[1])
    rows, ceilings, absent, by_launches, left_out, began, last = [], [], [], [], [], clock.now(), None

    def write():
        more = {"allocator": states, "ceilings": ceilings, "missing": absent, "left_out": left_out}
        more["not_captured"] = by_launches
        if args.json:
            results.write_json(args.json, rows, **more)

    for op, index in plan:
        shape = label(BENCHMARKS[op], shapes(BENCHMARKS[op], args.device)[index])
        if args.seconds is not None and clock.now() - began > args.seconds:
            left_out.append({"op": op, "shape": shape})
            continue
        if op != last:
            print(f"\n{op}, {args.dtype} on {args.device}", flush=True)
        last = op
        new, missing, beside, launched = bench_shape(processes, op, index, args.dtype, args)
        rows, ceilings = rows + new, ceilings + beside
        no_graph = {f"*{name}": f"timed by launches, not captured: {why}" for name, why in launched.items()}
        print("\n".join([*lines(new), *missing_lines(missing | no_graph)]), flush=True)
        by_launches += [{"op": op, "shape": shape, "contender": name, "reason": why} for name, why in launched.items()]
        absent += [{"op": op, "shape": shape, "contender": name, "reason": why} for name, why in missing.items()]
        write()
    write()
    print()
    for op in args.op:
        for line in summary(op, [row for row in rows if row["op"] == op]):
            print(line, flush=True)
    for step in left_out:
        print(f"left out after {args.seconds:g} s: {step['op']} {step['shape']}", flush=True)
    for process in processes.values():
        process.close()
    if args.plot:
        plot(args.plot, rows, f"ops, {args.dtype} on {args.device}")
    return int(any(one["reason"].startswith(WRONG) for one in absent))
