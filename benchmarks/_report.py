"""What every benchmark writes: a JSON file of rows with their provenance, and a plot."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

from fastlm import info


def _output(*command: str, cwd: Path | None = None) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def provenance(**more) -> dict:
    """Where a result comes from: machine, versions, settings, commit (None outside a checkout), command, time."""
    here = Path(__file__).parent
    status = _output("git", "status", "--porcelain", "--untracked-files=no", cwd=here)
    return {
        **info.machine(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "environment": {key: value for key, value in os.environ.items() if key.startswith(("MALLOC_", "OMP_", "MKL_"))},
        "commit": _output("git", "rev-parse", "HEAD", cwd=here) or os.environ.get("FASTLM_COMMIT"),
        "dirty": None if status is None else bool(status),
        "command": " ".join(["python", *sys.argv]),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **more,
    }


def write_json(path: str | Path, rows: list[dict], **more) -> None:
    """{"provenance": ..., "rows": [...]}, complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps({"provenance": provenance(**more), "rows": rows}, indent=1) + "\n")
    os.replace(partial, path)


def geometric_mean(values: Iterable[float]) -> float:
    """NaN of no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def plot(path: str | Path, groups: dict[str, dict[str, float]], *, title: str, unit: str) -> None:
    """A PNG with a line per group (a shape, a recipe) and a mark per contender on it, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
