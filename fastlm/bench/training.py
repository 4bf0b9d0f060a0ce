"""A whole training step beside the same step in Transformers: the program of benchmarks/bench_train.py.

compare.py times it; step_contenders.py lists the contenders, steps.py the fixed steps. A step is one micro-batch of the
recipe: forward, backward, clipping, AdamW. Ids are drawn with the frequencies of words. Rows are full, except those of
the -text steps, which are as long as sentences: peers get them padded, fastlm packed. Only real tokens count. With
--curve the losses of the first steps must match fastlm's within noise. Exit status 1: a contender's first loss (WRONG)
or its curve does not.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from fastlm.bench import results
from fastlm.bench.clock import Clock
from fastlm.bench.compare import EVERY, LEAST_CURVE, StepTime, compare_steps, table
from fastlm.bench.results import WRONG
from fastlm.bench.steps import STEPS, StepInputs, Training, find_step


def row(recipe: Training, inputs: StepInputs, time: StepTime, threads: int | None) -> dict:
    return {
        "op": "training step",
        "recipe": recipe.name,
        "shape": inputs.shape,
        "dtype": recipe.train.dtype,
        "pass": "step",
        "contender": time.contender,
        "ms": time.ms,
        "ms_iqr": time.ms_iqr,
        "tokens_per_s": time.tokens_per_s,
        "mfu": time.mfu,
        "of_bound": time.of_bound,
        "peak_mb": time.peak_mb,
        "step_mb": time.step_mb,
        "threads": threads or torch.get_num_threads(),
        "losses": time.losses,
        "curve_off": time.curve_off,
        "curve_noise": time.curve_noise,
    }


def step_label(name: str, shape: str) -> str:
    """A step with its rows and length: the name of a fixed step has them, a recipe's does not ("bert-mini 64x128")."""
    return name if name in STEPS else f"{name} {shape}"


def plot_rates(path: Path, rows: list[dict], title: str) -> None:
    """A bar for each contender, grouped by step, dtype and threads."""
    steps: dict[str, dict[str, float]] = {}
    for row in rows:
        name = f"{step_label(row['recipe'], row['shape'])}\n{row['dtype']}, {row['threads']} threads"
        steps.setdefault(name, {})[row["contender"]] = row["tokens_per_s"]
    results.plot_steps(path, steps, title=title)


def plot_curves(path: Path, steps: dict[str, list[StepTime]]) -> None:
    """The losses of the first steps: a panel for each title in `steps`, in it a line a contender."""
    pyplot = results.pyplot_without_a_display()
    columns = min(2, len(steps))
    lines = -(-len(steps) // columns)
    figure, _ = pyplot.subplots(lines, columns, figsize=(7 * columns, 4 * lines), layout="constrained")
    panels = figure.axes
    for axes, (title, times) in zip(panels, steps.items()):
        for time in times:
            ours = time.contender == "fastlm"
            style = {"lw": 4, "alpha": 0.4} if ours else {"lw": 1}  # visible behind lines on top of it
            axes.plot(range(1, 1 + len(time.losses)), time.losses, label=time.contender, **style)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats a predicted token)")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for axes in panels[len(steps) :]:
        axes.remove()
    results.save_figure(figure, path)


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    names = f"names or TOML files, or {', '.join(STEPS)} (default bert-mini)"
    parser.add_argument("--recipe", nargs="+", default=["bert-mini"], help=names)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--vocab", type=int, default=30522, help="size of a BERT's vocabulary (default 30522)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="as of `fastlm pretrain`")
    parser.add_argument("--contenders", nargs="+", default=EVERY, choices=EVERY)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="least time of a contender in a round")
    parser.add_argument("--stop-after", type=float, help="no recipe is begun after so many seconds; it is named")
    parser.add_argument("--threads", type=int, nargs="+", default=[None], help="of a CPU; several: one table each")
    parser.add_argument("--curve", type=int, default=0, metavar="N", help="keep the losses of N steps before the clock")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--curve-plot", type=Path, help="PNG of the losses, a panel each recipe")
    args = parser.parse_args(arguments)
    if args.curve_plot and not args.curve:
        parser.error("--curve-plot: expected with --curve N, the number of steps to plot")
    if 0 < args.curve < LEAST_CURVE:
        parser.error(f"--curve: expected at least {LEAST_CURVE} steps, got {args.curve}")
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    try:
        args.steps = {name: find_step(name, args.set, args.vocab, args.device) for name in args.recipe}
    except ValueError as error:
        parser.error(str(error))
    return args


def _write_so_far(path: Path | None, before, recipe, inputs, threads, times: list[StepTime]) -> None:
    """A run that is killed leaves the contenders that it has timed. before: the rows of other steps, and the rest."""
    if path:
        rows, more = before
        new = [row(recipe, inputs, time, threads) for time in times if not time.missing]
        results.write_json(path, rows + new, **more)


def main(arguments=None, *, compare: Callable[..., list[StepTime]] = compare_steps, clock: Clock | None = None) -> int:
    clock = clock or Clock()
    began = clock.now()
    args = parse(arguments)
    console, rows, missing, left_out, curves = Console(highlight=False), [], [], [], {}
    for name, threads in itertools.product(args.recipe, args.threads):
        recipe, inputs = args.steps[name]
        if args.stop_after is not None and clock.now() - began > args.stop_after:
            console.print(f"left out after {args.stop_after:g} s: {step_label(name, inputs.shape)}")
            left_out.append({"op": name, "shape": inputs.shape})
            continue
        before = rows, {"missing": missing, "left_out": left_out}
        with Console(stderr=True).status(f"{name}: {len(args.contenders)} contenders"):  # on a terminal
            times = compare(
                recipe,
                inputs,
                device=args.device,
                contenders=args.contenders,
                rounds=args.rounds,
                seconds=args.seconds,
                threads=threads,
                curve=args.curve,
                progress=partial(_write_so_far, args.json, before, recipe, inputs, threads),
            )
        title = f"{step_label(recipe.name, inputs.shape)}, {inputs.tokens} tokens, {recipe.train.dtype}, {args.device}"
        title += f", {threads} thread{'s'[: threads > 1]}" if threads else ""
        console.print(table(times, title=title))
        curves[title] = [time for time in times if not time.missing]
        rows += [row(recipe, inputs, time, threads) for time in curves[title]]
        missing += [
            {"recipe": recipe.name, "contender": time.contender, "reason": time.missing}
            for time in times
            if time.missing and threads == args.threads[0]
        ]
        if args.json:
            results.write_json(args.json, rows, missing=missing, left_out=left_out)
    if args.json and left_out:
        results.write_json(args.json, rows, missing=missing, left_out=left_out)
    if args.curve_plot:
        plot_curves(args.curve_plot, curves)
    if args.plot:
        plot_rates(args.plot, rows, f"training steps on {args.device}")
    wrong = any(one["reason"].startswith(WRONG) for one in missing)
    return int(wrong or not all(time.learns_alike for times in curves.values() for time in times))
