"""What a fine-tuning leaves to read: metrics.json, curves.png, and confusion.png where the task has classes or numbers.

metrics.json:
    task, model, metrics {name: figure on the held-out examples}, test {name: figure}, best_step, steps, epochs
    seconds {"training": of the steps, "other": of evaluations and checkpoints}
    examples {"train", "validation", "test"}, labels
    read {"data": {"rows", "examples", "set_aside", "cut", "told"}, the same for "validation" and "test" of other files}
    classes {name: {"precision", "recall", "f1", "support"}}, confusion {"labels", "counts"}
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fastlm.data.labelled import Examples
from fastlm.run.directory import MODEL, RECIPE, REPORTS
from fastlm.run.metrics import RERUN
from fastlm.run.progress import duration
from fastlm.run.summary import columns
from fastlm.storage import atomic_directory, atomic_file, replace_json
from fastlm.tasks._labelled import LabelledTask, best_sign

FIGURES, CURVES, CONFUSION = REPORTS
_SHOWN = 24  # classes whose names and counts have room in a plot


class Outcome(Protocol):
    """What the reports need of an evaluation's figures ("val_accuracy") and outputs; fastlm.train.evaluation.Final."""

    validation: tuple[dict[str, float], np.ndarray] | None
    test: tuple[dict[str, float], np.ndarray] | None
    test_task: LabelledTask | None


def write_reports(out: Path, task: LabelledTask, rows: list[dict], summary: dict, outcome: Outcome) -> None:
    """Write the files. rows: of metrics.jsonl; summary: what summary.json will hold."""
    details = {} if outcome.validation is None else task.details(outcome.validation[1])
    scatter, train = details.pop("scatter", None), task.dataset
    held, test = task.validation, None if outcome.test_task is None else outcome.test_task.validation
    read = {"data": train, "validation": held if task.apart else None, "test": test}
    content = {
        "task": task.recipe.task,
        "metrics": _named(outcome.validation),
        "test": _named(outcome.test),
        "metric": task.figure(),
        "best_step": summary["best_step"],
        "steps": summary["steps"],
        "epochs": round(summary["steps"] * task.recipe.batch_rows / train.rows, 3),
        "seconds": {"training": summary["seconds"], "other": summary["other_seconds"]},
        "examples_per_s": round(summary["steps"] * task.recipe.batch_rows / summary["seconds"], 1),
        "examples": {
            "train": train.rows,
            "validation": None if held is None else held.rows,
            "test": None if test is None else test.rows,
        },
        "labels": list(train.labels),
        "read": {part: _reading(examples) for part, examples in read.items() if examples is not None},
        "layout": task.layout,
        **details,
    }
    replace_json(out / FIGURES, content, what="the figures", kept=RERUN)
    plot_curves(rows, out / CURVES, figure=f"val_{task.figure()}", best=summary["best_step"], title=task.recipe.name)
    if "confusion" in details:
        plot_confusion(details["confusion"], out / CONFUSION, title=_title(task, outcome))
    elif scatter is not None:
        plot_numbers(scatter, out / CONFUSION, title=_title(task, outcome))


def _reading(examples: Examples) -> dict[str, object]:
    """What became of the rows of the files that the examples are from."""
    report = examples.report
    counts = {"rows": report.read, "examples": report.kept, "set_aside": report.set_aside}
    return {**counts, "cut": examples.cut, "told": examples.told}


def _named(evaluation) -> dict[str, float] | None:
    return None if evaluation is None else {k.removeprefix("val_"): v for k, v in evaluation[0].items()}


def _title(task: LabelledTask, outcome: Outcome) -> str:
    name = task.figure()
    value = outcome.validation[0][f"val_{name}"]
    return f"{task.validation.rows:,} held-out examples, {name.replace('_', ' ')} {value:.3f}"


def write_seeds(out: Path, runs: Sequence[Path]) -> None:
    """OUT/metrics.json with the mean and the spread of the runs' figures, and OUT/hf, the model of the best run.

    OUT/recipe.json is that of the best run, and metrics.json has its null_threshold: `predict` reads both.
    """
    found = [json.loads((run / FIGURES).read_text(encoding="utf-8")) for run in runs]
    figure = found[0]["metric"]
    content = {"task": found[0]["task"], "metric": figure, "runs": [run.name for run in runs]}
    for part in ("metrics", "test"):
        if found[0][part] is not None:
            content[part] = {name: _spread([one[part][name] for one in found]) for name in found[0][part]}
    content["seconds"] = {name: _spread([one["seconds"][name] for one in found]) for name in found[0]["seconds"]}
    chosen = 0
    if found[0]["metrics"] is not None:
        values = [best_sign(figure) * one["metrics"][figure] for one in found]
        chosen = max(range(len(runs)), key=lambda i: -math.inf if math.isnan(values[i]) else values[i])
    best = runs[chosen]
    content["best"] = best.name
    if "null_threshold" in found[chosen]:
        content["null_threshold"] = found[chosen]["null_threshold"]
    with atomic_directory(out / MODEL, what="the best model", kept=RERUN) as partial:
        shutil.copytree(best / MODEL, partial, dirs_exist_ok=True)
        if (out / MODEL).exists():
            shutil.rmtree(out / MODEL)
    with atomic_file(out / RECIPE, what="the recipe of the best model", kept=RERUN) as partial:
        shutil.copyfile(best / RECIPE, partial)
    replace_json(out / FIGURES, content, what="the figures", kept=RERUN)


def _spread(values: list[float]) -> dict[str, object]:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": deviation, "values": values}


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: Path, what: str) -> None:
    with atomic_file(path, what=what, kept=RERUN) as partial:
        figure.savefig(partial, format="png")


def plot_curves(rows: list[dict], path: Path, *, figure: str, best: int, title: str) -> None:
    """The loss of training and of held-out examples, and beside it the figure that the best checkpoint is chosen by."""
    rows = [row for row in rows if row["loss"] is not None]
    held = [row for row in rows if row.get("val_loss") is not None]
    shown = bool(held) and figure != "val_loss"
    canvas = _figure(9.0 if shown else 6.0, 3.6)
    axes = canvas.subplots(1, 2 if shown else 1, squeeze=False)[0]
    steps, losses = np.array([row["step"] for row in rows]), np.array([row["loss"] for row in rows])
    axes[0].plot(steps, losses, color="#9ecae1", linewidth=0.8, label="training, each step")
    width = max(1, len(losses) // 40)
    if len(losses) > 2 * width:
        mean = np.convolve(losses, np.ones(width) / width, "valid")
        axes[0].plot(steps[width - 1 :], mean, color="#08519c", linewidth=1.6, label=f"mean of {width} steps")
    if held:
        at = [row["step"] for row in held]
        axes[0].plot(at, [row["val_loss"] for row in held], "o-", color="#238b45", markersize=4, label="held out")
    axes[0].set_ylabel("loss")
    axes[0].set_ylim(bottom=0)
    if shown:
        name = figure.removeprefix("val_").replace("_", " ")
        axes[1].plot(at, [row[figure] for row in held], "o-", color="#238b45", markersize=4, label=name)
        if best:
            axes[1].axvline(best, color="#d94801", linestyle="--", linewidth=1.2, label=f"best, step {best}")
        axes[1].set_ylabel(f"{name}, held out")
    for one in axes:
        one.set_xlabel("step")
        one.set_xlim(left=0)
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
        one.legend(frameon=False, fontsize=8)
    canvas.suptitle(title, fontsize=10, parse_math=False)
    _save(canvas, path, "the plot of the curves")


def plot_confusion(confusion: dict, path: Path, *, title: str) -> None:
    """Rows are true classes, columns predicted ones; a colour is the share of its row."""
    names, counts = confusion["labels"], np.array(confusion["counts"])
    if len(names) > _SHOWN:  # the most frequent ones, and the rest together
        order = np.argsort(-(counts.sum(0) + counts.sum(1)), kind="stable")
        first, rest = order[: _SHOWN - 1], order[_SHOWN - 1 :]
        groups = [[index] for index in first] + [list(rest)]
        counts = np.array([[counts[np.ix_(a, b)].sum() for b in groups] for a in groups])
        names = [names[index] for index in first] + [f"{len(rest)} others"]
    size = 2.6 + 0.42 * len(names)
    canvas = _figure(max(5.4, size + 0.8), max(3.6, size))
    axes = canvas.add_subplot()
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    canvas.colorbar(image, ax=axes, fraction=0.046, pad=0.03, label="share of the true class")
    ticks = range(len(names))
    turned = {"rotation": 45, "ha": "right"} if len(names) > 3 else {}
    axes.set_xticks(ticks, names, parse_math=False, **turned)  # a label may hold $
    axes.set_yticks(ticks, names, parse_math=False)
    for i in ticks:
        for j in ticks:
            if counts[i, j]:
                colour = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title, fontsize=9)
    _save(canvas, path, "the plot of the confusion")


def plot_numbers(scatter: dict, path: Path, *, title: str) -> None:
    """Predicted against true numbers."""
    canvas = _figure(4.6, 4.4)
    axes = canvas.add_subplot()
    true, predicted = np.array(scatter["true"]), np.array(scatter["predicted"])
    low, high = min(true.min(), predicted.min()), max(true.max(), predicted.max())
    axes.plot([low, high], [low, high], color="#d94801", linestyle="--", linewidth=1.2, label="equal")
    axes.plot(true, predicted, "o", color="#08519c", alpha=0.4, markersize=3)
    axes.set_xlabel("true")
    axes.set_ylabel("predicted")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    _save(canvas, path, "the plot of the numbers")


def report_table(out: Path, width: int | None = None) -> str:
    """The end of a fine-tuning as a person reads it, from metrics.json in `out`: a label and a figure on each line."""
    content = json.loads((out / FIGURES).read_text(encoding="utf-8"))
    lines = []
    for part, label in (("metrics", "held out"), ("test", "test")):
        if content.get(part) is not None:
            shown = [f"{name.replace('_', ' ')} {_text(value)}" for name, value in content[part].items()]
            lines.append((label, ", ".join(shown)))
    if "runs" in content:
        of = f"mean ± standard deviation; {out / MODEL} is that of {content['best']}"
        lines.append(("seeds", f"{len(content['runs'])}: {of}"))
        lines.append(("time", f"{duration(content['seconds']['training']['mean'])} of training each"))
    else:
        if content["metrics"] is not None:
            lines.append(("best", f"step {content['best_step']} of {content['steps']}, by {content['metric']}"))
        rate = f"{content['examples_per_s']:,.0f} examples/s"
        training, other = (duration(content["seconds"][name]) for name in ("training", "other"))
        lines.append(("time", f"{training} of training, {rate}, and {other} for evaluations and checkpoints"))
    lines.append(("model", str(out / MODEL)))
    return columns(lines, width)


def _text(value) -> str:
    return f"{value['mean']:.4f} ± {value['std']:.4f}" if isinstance(value, dict) else f"{value:.4f}"
