"""What a checkpoint costs a run: seconds by which steps are later, beside those of a write that they wait for.

Each round times steps alone, two writes that the steps wait for (ours, and torch.save and fsync, as most trainers do),
and steps until a thread has written. What the last takes, less the time of as many steps alone, is the cost of the
thread's write.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch

from fastlm.bench import results
from fastlm.bench.step_contenders import fastlm_step
from fastlm.bench.steps import find_step
from fastlm.run.checkpoint import Writer, snapshot, write_checkpoint
from fastlm.train.optimizer import make_optimizer


@dataclass(frozen=True)
class Time:
    """Seconds of the clock, and of the process's threads on a CPU: all that counts where other programs run too."""

    wall: float
    cpu: float

    @staticmethod
    def now() -> Time:
        return Time(time.perf_counter(), time.process_time())

    def __add__(self, other: Time) -> Time:
        return Time(self.wall + other.wall, self.cpu + other.cpu)

    def __mul__(self, factor: float) -> Time:
        return Time(self.wall * factor, self.cpu * factor)

    def __sub__(self, other: Time) -> Time:
        return self + other * -1

    def __truediv__(self, divisor: float) -> Time:
        return self * (1 / divisor)

    def items(self):
        return asdict(self).items()


def measure(recipe: str, settings: list[str], vocab_size: int, rounds: int, steps: int, directory: Path) -> list[dict]:
    """A row of seconds for each round; `steps` are those that are timed alone, before and after."""
    training, inputs = find_step(recipe, settings, vocab_size, "cpu")
    model = inputs.model
    optimizer = make_optimizer(model, training.train)
    _, step = fastlm_step(model, training.train, inputs.batches, optimizer)
    parameters, number = dict(model.named_parameters()), 0

    def run() -> None:
        nonlocal number
        step(number).tolist()
        number += 1

    def alone() -> Time:
        start = Time.now()
        for _ in range(steps):
            run()
        return (Time.now() - start) / steps

    def take(into=None):
        return snapshot(number, parameters, optimizer, {}, into=into)

    rows, writer = [], Writer()
    alone()
    taken = take()
    write_checkpoint(directory, taken, keep=1)
    with writer:
        for _ in range(rounds):
            before, start = alone(), Time.now()
            write_checkpoint(directory, take(taken), keep=1)
            waited, start = Time.now() - start, Time.now()
            plain_write(directory.with_suffix(".pt"), model, optimizer)
            plain, middle, start = Time.now() - start, alone(), Time.now()
            taken, first = take(taken), number
            copy = Time.now() - start
            writer.submit(partial(write_checkpoint, directory, taken, keep=1))
            while number == first or not writer.idle:
                run()
            writing, count = Time.now() - start, number - first
            each = (before + middle + alone()) / 3
            row = {
                "step": each,
                "synchronous": waited,
                "torch.save": plain,
                "copy": copy,
                "thread": writing - each * count,
            }
            rows.append({"steps": count, **{f"{key}, {kind}": t for key, x in row.items() for kind, t in x.items()}})
    return rows


def plain_write(path: Path, model, optimizer) -> None:
    with open(path, "wb") as file:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--recipe", default="bert-base")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="keys of the recipe, as in pretrain")
    parser.add_argument("--vocab", type=int, default=30522)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="that are timed alone, twice in a round")
    parser.add_argument("--dir", type=Path, help="where to write; default: a temporary directory here")
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=args.dir or Path.cwd()) as directory:
        rows = measure(args.recipe, args.settings, args.vocab, args.rounds, args.steps, Path(directory) / "run")
    for key in rows[0]:
        print(f"{key:<18}" + " ".join(f"{row[key]:8.2f}" for row in rows))
    for kind, other in product(("wall", "cpu"), ("synchronous", "torch.save")):
        shares = [row[f"thread, {kind}"] / row[f"{other}, {kind}"] for row in rows]
        middle, least, most = statistics.median(shares), min(shares), max(shares)
        print(f"thread / {other}, {kind}: median {middle:.0%}, {least:.0%} to {most:.0%}")
    if args.json:
        results.write_json(args.json, rows, threads=torch.get_num_threads())
    return 0
