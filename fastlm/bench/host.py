"""What a call costs the host, without the kernel: the program of benchmarks/bench_host.py.

Python, dispatcher and allocation are timed, on small CPU tensors (of eight columns in CALLS) with launches left out:
the CUDA kernels' where they would be launched (csrc/cuda/launch.h), Triton's in its launcher
(fastlm/testing/ahead_of_time.py). Neither a GPU nor its driver counts. aten's functions compute such a row in a
fraction of a microsecond. Contenders take turns; a round is the mean of its calls, and the best round counts, since
another process can only make a round slower. "fwd" is without gradients, "fwd, graph" makes the autograd graph,
"fwd+bwd" takes all gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastlm import _native, ops
from fastlm.bench import results, timing
from fastlm.bench.clock import Clock
from fastlm.bench.peers import PEERS
from fastlm.info import version
from fastlm.ops import _registry
from fastlm.testing.ahead_of_time import compile_for
from fastlm.testing.cases import CASES

ROWS, COLS, CLASSES = 4, 8, 8
BACKENDS = ("cuda", "triton", "cpu")
PASSES = ("fwd", "fwd, graph", "fwd+bwd")
GOALS = {"fwd": 15.0, "fwd, graph": 35.0}  # of layer_norm with backend="cuda", microseconds


def tensors() -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(ROWS, COLS),
        "weight": torch.ones(COLS),
        "bias": torch.zeros(COLS),
        "target": torch.zeros(ROWS, dtype=torch.int64),
    }


# op -> contender -> f(tensors(), backend): the output whose gradient is taken, if it has one. An op without an entry is
# called on the first test shape of its OpCase, beside SDPA or eager.
CALLS: dict[str, dict[str, Callable]] = {
    "layer_norm": {
        "fastlm": lambda t, backend: ops.layer_norm(t["x"], t["weight"], t["bias"], backend=backend),
        "aten": lambda t, _: F.layer_norm(t["x"], (COLS,), t["weight"], t["bias"]),
    },
    "rms_norm": {
        "fastlm": lambda t, backend: ops.rms_norm(t["x"], t["weight"], backend=backend),
        "aten": lambda t, _: F.rms_norm(t["x"], (COLS,), t["weight"]),
    },
    "gelu": {
        "fastlm": lambda t, backend: ops.gelu(t["x"], t["bias"], backend=backend),
        "aten": lambda t, _: F.gelu(t["x"] + t["bias"]),
    },
    "cross_entropy": {
        "fastlm": lambda t, backend: ops.cross_entropy(t["x"], t["target"], backend=backend),
        "aten": lambda t, _: F.cross_entropy(t["x"], t["target"]),
    },
    "mlm_mask": {
        "fastlm": lambda t, backend: ops.mlm_mask(
            t["target"].view(2, 2), mask_token_id=4, vocab_size=8, special_ids=(0,), seed=1, backend=backend
        ),
    },
}


@dataclass(frozen=True)
class HostCall:
    """What is timed: function(inputs(), backend)."""

    inputs: Callable[[], dict]
    function: Callable[[dict, str], object]
    backend: str


def contenders(op: str, only: list[str]) -> dict[str, HostCall]:
    """fastlm's of the backends in `only` that the op has, and aten's."""
    case, variant = CASES[op], CASES[op].tests[0]
    backends = [backend for backend in only if backend in _registry.backends(op)]
    if op in CALLS:
        out = {f"fastlm {backend}": HostCall(tensors, CALLS[op]["fastlm"], backend) for backend in backends}
        return out | ({"aten": HostCall(tensors, CALLS[op]["aten"], "aten")} if "aten" in CALLS[op] else {})

    def inputs():
        return case.inputs(variant, 0, torch.float32)

    def fastlm(inputs, backend):
        return case.function(**inputs, **variant.options, backend=backend)

    peer = PEERS[op].get("sdpa") or PEERS[op]["eager"]
    adapt = peer.adapt or (lambda inputs, options: (inputs, options, None))
    _, options, _ = adapt(inputs(), variant.options)

    def adapted():
        return adapt(inputs(), variant.options)[0]

    def aten(inputs, _):
        return peer.function(**inputs, **options)

    out = {f"fastlm {backend}": HostCall(inputs, fastlm, backend) for backend in backends}
    return out | {"aten": HostCall(adapted, aten, "aten")}


@contextlib.contextmanager
def without_launches(backend: str):
    """Inside, `backend` takes CPU tensors and launches nothing."""
    if backend == "cuda":
        _native.drop_cuda_launches(True)
        try:
            yield
        finally:
            _native.drop_cuda_launches(False)
    elif backend == "triton":
        with compile_for(90):
            yield
    else:
        yield


WARMUP = 10  # calls


def timed(contender: HostCall, which: str, calls: int, clock: Clock) -> float:
    """Microseconds a call."""
    inputs = contender.inputs()
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.dtype.is_floating_point]
    for x in leaves:
        x.requires_grad_(which != "fwd")

    def call():
        out = contender.function(inputs, contender.backend)
        if which == "fwd+bwd":
            out = out[0] if isinstance(out, tuple) else out
            torch.autograd.grad(out.sum(), leaves, allow_unused=True)

    with torch.set_grad_enabled(which != "fwd"):
        for _ in range(WARMUP):
            call()
        return timing.time_calls(call, calls, clock) * 1e3


def measure(op: str, only: list[str], rounds: int, calls: int, clock: Clock) -> list[dict]:
    times: dict[tuple[str, str], list[float]] = {}
    have = contenders(op, only)
    for _ in range(rounds):
        for name, contender in have.items():
            with without_launches(contender.backend):
                for which in PASSES if CASES[op].gradients else PASSES[:1]:
                    times.setdefault((name, which), []).append(timed(contender, which, calls, clock))
    return [
        {
            "op": op,
            "pass": which,
            "contender": name,
            "us": round(min(t), 2),
            "median_us": round(statistics.median(t), 2),
        }
        for (name, which), t in times.items()
    ]


def table(rows: list[dict]) -> list[str]:
    """Lines: an op and a pass each, a column for every contender; microseconds, best of the rounds (median)."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines = [f"{'us, best (median)':<28}" + "".join(f"{name:>20}" for name in names)]
    for op, which in dict.fromkeys((row["op"], row["pass"]) for row in rows):
        cells = {row["contender"]: row for row in rows if (row["op"], row["pass"]) == (op, which)}
        texts = [f"{cells[n]['us']:.1f} ({cells[n]['median_us']:.1f})" if n in cells else "-" for n in names]
        lines.append(f"{op + ', ' + which:<28}" + "".join(f"{text:>20}" for text in texts))
    return lines


def main(arguments=None, *, clock: Clock | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--op", choices=CASES, action="append", help="default: all")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: all that are built or installed")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--calls", type=int, default=60, help="of a contender in a round")
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    have = {"cuda": _native.cuda() is not None, "triton": bool(version("triton")), "cpu": _native.missing_cpu() is None}
    only = []
    for backend in args.backend or BACKENDS:
        if have[backend]:
            only.append(backend)
        else:
            print(f"{backend} is left out: it is not built or not installed here")
    rows = []
    for op in args.op or CASES:
        rows += measure(op, only, args.rounds, args.calls, clock or Clock())
    print("\n".join(table(rows)))
    for row in rows:
        if row["op"] == "layer_norm" and row["contender"] == "fastlm cuda" and row["pass"] in GOALS:
            print(f"goal of layer_norm, {row['pass']} on cuda: {GOALS[row['pass']]:.0f} us; it takes {row['us']:.1f}")
    if args.json:
        results.write_json(args.json, rows, rounds=args.rounds, calls=args.calls)

    return 0
