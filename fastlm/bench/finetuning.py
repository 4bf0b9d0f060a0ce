"""Fine-tuning beside the same recipe in Transformers' Trainer, each contender in a process of its own.

    fastlm                        packed batches, fastlm's kernels and AdamW, allocator tuned
    transformers                  Trainer's defaults: padded batches, SDPA, fused AdamW; glibc's allocator as shipped
    transformers tuned            the same with fastlm's allocator settings
    transformers tuned, grouped   and with batches of texts of similar length (group_by_length)

By default a few steps of each are timed in turn, round by round, so that a slow moment of the machine affects all of
them; what is printed is the median of the rounds, and the median of the ratios within each round. Collating is part of
a step. With --whole each trains to the end, seed by seed, and is evaluated on the same held-out examples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median, stdev

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fastlm import _malloc
from fastlm.bench.finetune_worker import CONTENDERS
from fastlm.bench.results import write_json

GOALS = {"transformers": 0.60, "transformers tuned": 0.75, "transformers tuned, grouped": 0.90}


class Worker:
    """The parent's end of a contender's process."""

    def __init__(self, name: str, spec: Path):
        environment = {k: v for k, v in os.environ.items() if k not in _malloc.VARIABLES}
        self.name, self._errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastlm.bench.finetune_worker", name, str(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def ask(self, command: str) -> dict:
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self.read()

    def read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-3:]
            raise ValueError(f"{self.name}: ended with status {self._process.returncode}: {' '.join(last)}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()


def timed_steps(names: list[str], spec: Path, steps: int, rounds: int) -> list[dict]:
    """Rows {"contender", "ms", "ratio": fastlm's time over its own, median over the rounds}."""
    workers = [Worker(name, spec) for name in names]
    try:
        for worker in workers:
            worker.read()
        seconds = {name: [] for name in names}
        for _ in range(rounds):
            for worker in workers:
                seconds[worker.name].append(worker.ask(f"time {steps}")["seconds"])
    finally:
        for worker in workers:
            worker.close()
    ours = seconds.get("fastlm", [])
    return [
        {
            "contender": name,
            "ms": 1e3 * median(times),
            "ms_rounds": [1e3 * value for value in times],
            "ratio": median(a / b for a, b in zip(ours, times)) if ours else None,
            "goal": GOALS.get(name),
        }
        for name, times in seconds.items()
    ]


def whole_runs(names: list[str], spec: dict, folder: Path, seeds: range) -> Iterator[dict]:
    """Rows {"contender", "seed", "seconds", "figures"}, of one run after another."""
    for seed in seeds:
        path = folder / f"seed-{seed}.json"
        path.write_text(json.dumps({**spec, "settings": [*spec["settings"], f"train.seed={seed}"]}))
        for name in names:
            worker = Worker(name, path)
            try:
                worker.read()
                yield {"contender": name, "seed": seed, **worker.ask("finish")}
            finally:
                worker.close()


def paired(rows: list[dict], figure: str) -> str:
    """The differences of a figure between fastlm and Transformers as shipped, seed by seed."""
    by = {(row["contender"], row["seed"]): row["figures"][figure] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    apart = [by["fastlm", seed] - by["transformers", seed] for seed in seeds]
    mean = sum(apart) / len(apart)
    error = stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else float("nan")
    return f"{figure}: fastlm - transformers {mean:+.4f}, standard error {error:.4f}, of {len(apart)} seeds"


def show(rows: list[dict], console: Console) -> None:
    table = Table(box=box.SIMPLE)
    for name in ("contender", "ms a step", "fastlm's time / its", "goal"):
        table.add_column(name, justify="left" if name == "contender" else "right")
    for row in rows:
        goal, ratio = row["goal"], row["ratio"]
        verdict = "" if goal is None or ratio is None else f"<= {goal:.0%} {'met' if ratio <= goal else 'missed'}"
        shown = "" if ratio is None else f"{ratio:.0%}"
        table.add_row(row["contender"], f"{row['ms']:.1f}", shown, verdict)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="classify", choices=("classify", "regress", "tag"))
    parser.add_argument("--model", required=True, help="a BERT in Transformers' layout")
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--steps", type=int, default=25, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--whole", action="store_true", help="train to the end")
    parser.add_argument("--seeds", type=int, default=1, help="with --whole")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    spec = {
        "task": args.task,
        "model": args.model,
        "data": args.data,
        "settings": args.settings,
        "threads": args.threads,
    }
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.whole:
            rows = []
            for row in whole_runs(args.contenders, spec, Path(folder), range(args.seeds)):
                rows.append(row)
                figures = ", ".join(
                    f"{name.removeprefix('val_')} {value:.4f}" for name, value in row["figures"].items()
                )
                console.print(f"{row['contender']:<28} seed {row['seed']}  {row['seconds']:.1f} s  {figures}")
            if {"fastlm", "transformers"} <= set(args.contenders):
                console.print(paired(rows, "val_f1" if args.task == "tag" else next(iter(rows[-1]["figures"]))))
        else:
            path = Path(folder) / "spec.json"
            path.write_text(json.dumps(spec))
            rows = timed_steps(args.contenders, path, args.steps, args.rounds)
            show(rows, console)
    if args.json:
        write_json(args.json, rows, spec=spec)
    return 0
