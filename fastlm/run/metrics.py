"""What a run leaves to read: metrics.jsonl and loss.png."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastlm.storage import atomic_file, is_full, no_space

RERUN = "the last checkpoint is whole; make room, and the same command writes what is missing without training again"
_MEAN_OF = 10  # steps that the first and the final loss are means of; at most half of the run's


class MetricsFile:
    """metrics.jsonl, one JSON object a line: step, loss, tokens, tokens_per_s, lr, grad_norm, mfu.

    `tokens` are the real ones from the start of the run, `grad_norm` is before clipping. A loss or norm that is not
    finite (its step was skipped), the loss of a step that predicted nothing, and an unknown MFU are null. After an
    evaluation the line of its step also has val_loss, val_perplexity and what else the task says of it.

    `rows` is how many lines there were before.
    """

    def __init__(self, path: Path, step: int):
        """Open `path` for appending after `step`: lines of later steps, and a torn last one, are cut off."""
        self.path = path
        self._end = self.rows = 0
        if path.exists():
            with open(path, "rb") as file:
                for row, length in _rows(file):
                    if row["step"] > step:
                        break
                    self._end += length
                    self.rows += 1
        # Without a buffer: closing it after a failed write writes nothing.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._file.truncate(self._end)

    def add(self, row: dict) -> None:
        """Append a line. NoSpace where there is no room for all of it: then none of it is written."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        line = json.dumps(row).encode() + b"\n"
        left = memoryview(line)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(self._end)
            if not is_full(error):
                raise
            kept = "the lines before it and the checkpoints are kept; make room, and the same command continues"
            what = f"the line of step {row.get('step')}"
            raise no_space(self.path, error, what=what, kept=kept, need=len(line)) from error
        self._end += len(line)

    def sync(self) -> None:
        """To the disk: before a checkpoint, so that no checkpoint is ahead of its metrics."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class NoMetrics:
    """In place of a MetricsFile in a process that writes none."""

    rows = math.inf

    def add(self, row: dict) -> None:
        pass

    sync = close = lambda self: None


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl up to the first that is torn."""
    with open(path, "rb") as file:
        return [row for row, _ in _rows(file)]


def _rows(file) -> Iterator[tuple[dict, int]]:
    """(row, bytes of its line) of each line up to the first that is torn."""
    for line in file:
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return
        yield row, len(line)


def first_and_final_loss(rows: list[dict]) -> tuple[float | None, float | None]:
    """Means of the first and of the last ten losses that are finite; None where there is none.

    Of a shorter run each is the mean of a half, so that no step is in both.
    """
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    if not losses:
        return None, None
    count = max(1, min(_MEAN_OF, len(losses) // 2))
    return float(np.mean(losses[:count])), float(np.mean(losses[-count:]))


def plot_loss(rows: list[dict], path: Path, *, levels: dict[str, float], title: str) -> None:
    """The loss against real tokens as a PNG: every step, a running mean, held-out text, a dashed line for each level.

    levels: losses to read the curve against, by name, as `Task.metrics` has them. The axis is of what is smooth: single
    steps far away, as spikes are, lie beyond it and do not flatten the rest.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["loss"] is not None]
    tokens = np.array([row["tokens"] for row in rows], dtype=float)
    losses = np.array([row["loss"] for row in rows], dtype=float)
    figure = Figure(figsize=(7.0, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(tokens, losses, color="#9ecae1", linewidth=0.8, label="training, each step")
    (at, smooth), end = _running_median(losses), first_and_final_loss(rows)[1]
    label = "training, running median" + ("" if end is None else f" ({end:.3f} at the end)")
    axes.plot(tokens[at], smooth, color="#08519c", linewidth=1.8, label=label)
    held = [(row["tokens"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    if held:
        label = f"held-out text ({held[-1][1]:.3f} at the end)"
        axes.plot(*zip(*held), color="#238b45", linewidth=1.6, marker="o", markersize=3.5, label=label)
    if len(losses):
        axes.set_ylim(*_shown(losses, [*smooth, *(loss for _, loss in held), *levels.values()]))
        axes.set_xlim(left=0)
    for name, level in levels.items():
        axes.axhline(level, color="#d94801", linestyle="--", linewidth=1.2)
        axes.annotate(
            f"{name.replace('_', ' ')} {level:.2f}",
            (1.0, level),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color="#d94801",
            fontsize=9,
        )
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats a predicted token)")
    axes.set_title(title)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_file(path, what="the plot of the loss", kept=RERUN) as partial:
        figure.savefig(partial, format="png")


def _shown(losses: np.ndarray, whole: list[float]) -> tuple[float, float]:
    """Ends of the axis: all of `whole`, and of `losses` what is not far beyond their 1st and 99th percentile."""
    low, high = np.percentile(losses, (1, 99))
    spread = max(high - low, 1e-3)
    near = losses[(losses >= low - spread / 2) & (losses <= high + spread / 2)]
    low, high = min(*near, *whole), max(*near, *whole)
    margin = 0.05 * max(high - low, 1e-3)
    return low - margin, high + margin


def _running_median(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places, medians) at no more than 500 places, over a twentieth of the run, centred, narrower at the ends."""
    last = len(values) - 1
    at = np.unique(np.linspace(0, last, min(len(values), 500)).round().astype(int))
    half = np.minimum(max(1, len(values) // 40), np.minimum(at, last - at))
    return at, np.array([np.median(values[i - h : i + h + 1]) for i, h in zip(at, half)])


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
