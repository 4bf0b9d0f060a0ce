"""What benchmarks write and read: a JSON file of rows with their provenance, the best peer of a row, and plots."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import NoReturn

from fastlm import info
from fastlm.storage import NoSpace, atomic_file

WRONG = "WRONG: "  # how the reason begins where a contender computes something else
# What a row's "timed" says: replays of a CUDA graph; single launches on a CUDA device, where no graph could be
# captured; or the host's calls.
GRAPH, LAUNCHES, HOST = "graph", "launches", "host"
SAME = ("op", "recipe", "shape", "dtype", "pass", "threads")  # what rows that are compared have in common


def _output(*command: str, cwd: Path | None = None) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


_SETTINGS = ("MALLOC_", "OMP_", "MKL_", "GOMP_", "KMP_")  # environment variables that change timings


def _command(arguments: list[str]) -> str:
    """The line that ran the benchmark, for a shell. Of absolute paths only the name: directories are this machine's."""
    names = [Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments]
    return shlex.join(["python", *names])


def provenance(**more) -> dict:
    """Where a result comes from: machine, versions, settings, commit (None outside a checkout), command, time.

    The checkout is the program's: fastlm may be installed elsewhere.
    """
    here = Path(sys.argv[0]).resolve().parent
    here = here if here.is_dir() else Path.cwd()
    status = _output("git", "status", "--porcelain", "--untracked-files=no", cwd=here)
    return {
        **info.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "environment": {key: value for key, value in os.environ.items() if key.startswith(_SETTINGS)},
        "commit": _output("git", "rev-parse", "HEAD", cwd=here) or os.environ.get("FASTLM_COMMIT"),
        "dirty": None if status is None else bool(status),
        "command": _command(sys.argv),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **more,
    }


def write_json(path: str | Path, rows: list[dict], **more) -> None:
    """{"provenance": ..., "rows": [...]}, complete or not at all."""
    write_text(path, json.dumps({"provenance": provenance(**more), "rows": rows}, indent=1) + "\n", what="the results")


def write_text(path: str | Path, text: str, *, what: str) -> None:
    """Complete or not at all; its directory is made. NoSpace, which calls it `what`, where there is no room."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, what=what, need=len(text.encode())) as partial:
        partial.write_text(text)


def exit_with(main: Callable[..., int], *arguments) -> NoReturn:
    """Ends the process with main(*arguments); without room on a disk with one line and status 2."""
    try:
        status = main(*arguments)
    except NoSpace as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


def geometric_mean(values: Iterable[float]) -> float:
    """NaN of no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def is_ours(row: dict) -> bool:
    return row["contender"].startswith("fastlm")


def mark(row: dict) -> str:
    """ "*" of a contender on a CUDA device that could not be captured as a graph; rows of old files have none."""
    return "*" if row.get("timed") == LAUNCHES else ""


def without_allocator(contender: str) -> str:
    """ "fastlm:cpu" of "fastlm:cpu+malloc"."""
    return contender.partition("+")[0]


def _key(row: dict) -> tuple:
    return tuple(row.get(name) for name in SAME)


def best_peer(row: dict, rows: Iterable[dict]) -> dict | None:
    """The fastest peer in rows of the same op, shape, dtype and pass, whatever its allocator."""
    same = [other for other in rows if _key(other) == _key(row) and not is_ours(other)]
    return min(same, key=lambda other: other["ms"], default=None)


def against_peers(rows: Iterable[dict]) -> list[tuple[dict, dict | None]]:
    """(row of fastlm's, `best_peer`), in the order of the rows.

    Of one contender with the allocator as shipped and tuned (+malloc) the faster counts, as of the peers.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    out = []
    for group in groups.values():
        best: dict[str, dict] = {}
        for row in filter(is_ours, group):
            name = without_allocator(row["contender"])
            if name not in best or row["ms"] < best[name]["ms"]:
                best[name] = row
        out += [(row, best_peer(row, group)) for row in best.values()]
    return out


def save_figure(figure, path: str | Path) -> None:
    """A PNG at the same resolution everywhere; its directory is made."""
    from matplotlib import pyplot

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(Path(path), what="the plot") as partial:
        figure.savefig(partial, dpi=120, format="png")
    pyplot.close(figure)


def pyplot_without_a_display():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(path: str | Path, groups: dict[str, dict[str, float]], *, title: str, unit: str) -> None:
    """A PNG with a line per group (a shape, say) and a mark per contender on it, on a logarithmic axis."""
    pyplot = pyplot_without_a_display()
    names = sorted(
        {name for values in groups.values() for name in values}, key=lambda name: ("fastlm" not in name, name)
    )
    figure, axes = pyplot.subplots(figsize=(10, 1.6 + 0.2 * len(groups)), layout="constrained")
    for name, marker in zip(names, "osD^vPX*<>pdh8" * len(names)):
        points = [(values[name], y) for y, values in enumerate(groups.values()) if name in values]
        filled = {} if "fastlm" in name else {"markerfacecolor": "none"}
        axes.plot(*zip(*points), marker, label=name, **filled)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=7)
    axes.set_ylim(len(groups) - 0.5, -0.5)  # the first on top, no empty lines
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.xaxis.set_minor_formatter("{x:,.10g}" if high < 10 * low else "")
    axes.grid(alpha=0.3)
    axes.set_xlabel(unit)
    axes.set_title(title)
    figure.legend(fontsize=7, loc="outside upper center", ncols=5)
    save_figure(figure, path)


def plot_steps(path: str | Path, steps: dict[str, dict[str, float]], *, title: str) -> None:
    """A PNG of {step: {contender: tokens/s}}: a group of bars a step, in multiples of its slowest contender."""
    pyplot = pyplot_without_a_display()
    names = list(dict.fromkeys(name for rates in steps.values() for name in rates))
    color = {}
    for shades, first, last, ours in (("Reds", 0.7, 0.35, True), ("Greys", 0.3, 0.75, False)):
        those = [name for name in names if name.startswith("fastlm") == ours]
        step = (last - first) / max(1, len(those) - 1)
        color |= {name: pyplot.get_cmap(shades)(first + step * i) for i, name in enumerate(those)}
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.24 * sum(len(rates) + 1 for rates in steps.values())))
    y, ticks = 0.0, []
    for rates in steps.values():
        ticks.append(y + (len(rates) - 1) / 2)
        slowest = min(rates.values())
        for name, rate in rates.items():
            axes.barh(y, rate / slowest, height=0.8, color=color[name])
            axes.text(rate / slowest, y, f" {rate:,.0f} tokens/s", va="center", fontsize=7)
            y += 1
        y += 1
    axes.set_yticks(ticks, list(steps), fontsize=8)
    axes.set_ylim(y - 1.2, -0.8)  # the first on top
    axes.margins(x=0.18)
    axes.set_xlabel("times the tokens/s of the slowest contender of the step")
    axes.set_title(title, fontsize=10)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color[name]) for name in names]
    axes.legend(handles, names, fontsize=7, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_figure(figure, path)
