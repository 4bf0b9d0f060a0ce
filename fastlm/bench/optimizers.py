"""A step of each optimizer beside what a user would run instead: the program of benchmarks/bench_optimizer.py.

Every contender updates weights of its own, of all shapes of a model, by gradients of its own. All are timed in turn,
round by round, with a copy of as many bytes as the update must move and a large matrix product beside them. Before the
clock each makes three steps with the same gradients, and its weights must change as those of torch's eager optimizer,
of LAMB as fastlm's. A contender that cannot run is named with the reason.

A step of AdamW or LAMB must read w, g, m and v and write w, m and v; one of Muon w, g and the momentum, and write two.
Of Muon the matrices of linear layers are timed alone, which AdamW does not take then. Its floating-point operations are
those of five iterations of three products, of which fastlm's makes fewer on a CPU. On a GPU the host runs ahead, and
"host" is the time until a step returns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from fastlm import models
from fastlm.bench import ceilings, ops, results, timing
from fastlm.bench.clock import Clock
from fastlm.bench.op_runner import reason
from fastlm.bench.peers import OPTIMIZERS
from fastlm.bench.peers._peer import BETAS, EPS, MOMENTUM
from fastlm.bench.results import WRONG
from fastlm.tasks import TrainTable
from fastlm.train import adamw
from fastlm.train.lamb import LAMB
from fastlm.train.muon import Muon
from fastlm.train.optimizer import parameter_groups

MODELS = {
    "tiny": {
        "vocab_size": 2048,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 512,
    },
    "bert-small": {
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
    },
    "bert-base": {},
}
LR, DECAY, CHECKED_STEPS = 1e-3, 0.01, 3
# RMS difference of the changes of the weights. Muon's iterations amplify rounding, torch's in bfloat16.
AGREEMENT = {"adamw": 1e-3, "lamb": 1e-3, "muon": 0.1}


@dataclass(frozen=True)
class Shape:
    """A parameter: `parts` as of Muon."""

    size: tuple[int, ...]
    weight_decay: float
    parts: int = 1


def shapes(model: str, optimizer: str) -> list[Shape]:
    """Of the parameters of `model` that `optimizer` updates in a run."""
    meta = models.Bert(models.BertConfig(**MODELS[model]), device="meta")
    groups = parameter_groups(meta, TrainTable(optimizer=optimizer, weight_decay=DECAY))
    return [
        Shape(tuple(p.shape), group.weight_decay, group.parts)
        for group in groups
        if group.optimizer == optimizer
        for p in group.parameters
    ]


def moved_bytes(optimizer: str, own: list[Shape]) -> int:
    elements = sum(torch.Size(shape.size).numel() for shape in own)
    return 4 * elements * (5 if optimizer == "muon" else 7)


def flops(optimizer: str, own: list[Shape]) -> float:
    """Of matrix products; with r the shorter side of a part and c the longer, 5 iterations of r·r·c twice and r·r·r."""
    if optimizer != "muon":
        return 0.0
    total = 0.0
    for shape in own:
        r, c = sorted((shape.size[0] // shape.parts, shape.size[1]))
        total += shape.parts * 5 * 2.0 * (2 * r * r * c + r**3)
    return total


class Running:
    """One contender over weights of its own.

    split: whether a fused projection is given as its parts, to an optimizer that does not know of them
    """

    def __init__(self, make: Callable, own: list[Shape], device: torch.device, split: bool):
        torch.manual_seed(0)
        self.weights = [(0.02 * torch.randn(shape.size)).to(device) for shape in own]
        groups: dict[tuple, list[nn.Parameter]] = {}
        self.parameters = []
        for shape, whole in zip(own, self.weights):
            pieces = [nn.Parameter(piece) for piece in (whole.chunk(shape.parts) if split else (whole,))]
            self.parameters.append(pieces)
            groups.setdefault((shape.weight_decay, 1 if split else shape.parts), []).extend(pieces)
        self.optimizer = make(
            [
                {"params": pieces, "weight_decay": decay, **({"parts": parts} if parts > 1 else {})}
                for (decay, parts), pieces in groups.items()
            ],
            LR,
        )
        self.start = [weight.clone() for weight in self.weights]

    def gradients(self, seed: int) -> None:
        """Draws gradients, whose sizes differ from tensor to tensor."""
        generator = torch.Generator().manual_seed(seed)
        for k, (weight, pieces) in enumerate(zip(self.weights, self.parameters)):
            gradient = torch.randn(weight.shape, generator=generator).mul_(10.0 ** (-(k % 4))).to(weight.device)
            for piece, part in zip(pieces, gradient.chunk(len(pieces))):
                piece.grad = part

    def checked(self) -> list[torch.Tensor]:
        """The changes of the weights after CHECKED_STEPS steps."""
        for step in range(CHECKED_STEPS):
            self.gradients(step)
            self.optimizer.step()
        changes = [(weight - start).double() for weight, start in zip(self.weights, self.start)]
        del self.start
        return changes

    def step(self) -> None:
        self.optimizer.step()


def disagreement(changes: list[torch.Tensor], expected: list[torch.Tensor], bound: float) -> str | None:
    for k, (x, y) in enumerate(zip(changes, expected)):
        error = ((x - y).norm() / y.norm()).item()
        if not error <= bound:
            return f"{WRONG}the change of tensor {k}, {tuple(x.shape)}, is {error:.2g} away from the first contender's"
    return None


def _ours(optimizer: str, device: torch.device) -> Callable:
    if optimizer == "lamb":
        return partial(LAMB, betas=BETAS, eps=EPS)
    if optimizer == "muon":
        return partial(Muon, momentum=MOMENTUM, dtype=torch.bfloat16)  # as torch's
    if device.type != "cpu":
        raise ValueError("a run takes torch's fused AdamW on a device")
    return partial(adamw.AdamW, betas=BETAS, eps=EPS)


def contenders(optimizer: str, device: torch.device, vs: tuple[str, ...]) -> dict[str, Callable]:
    """{name: make(groups, lr)}; one that cannot run raises the reason."""

    def ours(groups, lr):
        return _ours(optimizer, device)(groups, lr=lr)

    def needs_device(groups, lr):
        raise ValueError("needs a CUDA device")

    peers = {name: peer for name, peer in OPTIMIZERS.get(optimizer, {}).items() if name in vs}
    missing = {name: needs_device for name, peer in peers.items() if peer.cuda and device.type != "cuda"}
    every = {name: peer.make for name, peer in peers.items()} | missing | {"fastlm": ours}
    # The first is the judge of the others: torch's plainest form where there is one.
    return dict(sorted(every.items(), key=lambda item: (item[0] != "eager", item[0] != "fastlm")))


def measure(optimizer: str, model: str, args, clock: Clock) -> tuple[list[dict], dict[str, str], dict[str, float]]:
    """(rows, {contender: why it is missing}, {"copy_gbps", "matmul_tflops"})."""
    device, own = torch.device(args.device), shapes(model, optimizer)
    running, absent, expected = {}, {}, None
    for name, make in contenders(optimizer, device, args.vs).items():
        try:
            one = Running(make, own, device, split=name != "fastlm")
            changes = one.checked()
        except Exception as error:  # another library's
            absent[name] = reason(error)
            continue
        wrong = None if expected is None else disagreement(changes, expected, AGREEMENT[optimizer])
        expected = changes if expected is None else expected
        if wrong:
            absent[name] = wrong
        else:
            running[name] = one
    del expected
    if not running:
        return [], absent, {}
    moved, products = moved_bytes(optimizer, own), flops(optimizer, own)
    copy, copied = ceilings.copy(device, moved)
    calls = {"copy": copy, "matmul": ceilings.matmul(device, torch.float32)}
    calls |= {name: one.step for name, one in running.items()}
    timers = {name: partial(timing.time_calls, call, clock=clock) for name, call in calls.items()}
    times = timing.interleaved(timers, rounds=args.rounds, min_ms=args.min_ms)
    copy_rate, matmul_rate = copied / times["copy"].ms, ceilings.matmul_flops(device) / times["matmul"].ms
    tensors = len(own)
    rows = [
        {
            "op": optimizer,
            "shape": f"{model}: {tensors} tensors, {moved / (20 if optimizer == 'muon' else 28) / 1e6:.3g} M",
            "dtype": "float32",
            "pass": "step",
            "contender": name,
            "ms": times[name].ms,
            "ms_iqr": times[name].iqr,
            "host_ms": timing.host_ms(one.step, clock) if clock.on_gpu else None,
            "timed": results.LAUNCHES if clock.on_gpu else results.HOST,
            "threads": torch.get_num_threads(),
            "gbps": moved / times[name].ms / 1e6,
            "tflops": products / times[name].ms / 1e9,
            "of_ceiling": products / times[name].ms / matmul_rate if products else moved / times[name].ms / copy_rate,
        }
        for name, one in running.items()
    ]
    return rows, absent, {"copy_gbps": copy_rate / 1e6, "matmul_tflops": matmul_rate / 1e9}


def parse(arguments=None) -> argparse.Namespace:
    names = tuple(dict.fromkeys(name for peers in OPTIMIZERS.values() for name in peers))
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--optimizer", default=",".join(AGREEMENT), help="several with commas; default all")
    parser.add_argument("--model", default="tiny,bert-small", help=f"of {','.join(MODELS)}: whose parameters")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--vs", default=",".join(names), help="peers; default all that are installed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--min-ms", type=float, default=20.0, help="a contender's time in one round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    for name, known in (("optimizer", AGREEMENT), ("model", MODELS), ("vs", names)):
        given = tuple(getattr(args, name).split(","))
        setattr(args, name, given)
        if unknown := set(given) - set(known):
            parser.error(f"--{name}: expected {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return args


def main(arguments=None, *, clock: Clock | None = None) -> int:
    """Exit status 1 where a contender computes something else."""
    args = parse(arguments)
    clock = clock or Clock(args.device)
    rows, ceilings_seen, absent = [], [], []
    for optimizer in args.optimizer:
        print(f"\n{optimizer}, float32 on {args.device}", flush=True)
        for model in args.model:
            new, missing, beside = measure(optimizer, model, args, clock)
            print("\n".join([*ops.lines(new), *ops.missing_lines(missing)]), flush=True)
            rows += new
            ceilings_seen.append({"op": optimizer, "model": model, **beside})
            absent += [{"op": optimizer, "model": model, "contender": n, "reason": why} for n, why in missing.items()]
            if args.json:
                results.write_json(args.json, rows, ceilings=ceilings_seen, missing=absent)
    return int(any(one["reason"].startswith(WRONG) for one in absent))
