"""Whether fastlm is as fast beside its peers as recorded: the program of benchmarks/bench_check.py.

It measures the ops in their first shapes, and BERT-mini's step. Compared is a ratio, the best peer's time over
fastlm's, both from one run: a slow day of the machine slows both. A ratio may fall below the recorded one by FLOOR plus
the spread of both runs (the interquartile ranges of the four times, relative, squares added). A row that falls further
is measured again, and fails if it falls further twice. A contender that computes something else than eager, fastlm's or
a peer's, is named below the table and fails at once. Exit status: 0 as recorded, 1 slower, missing or wrong, 2 where
there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastlm import info
from fastlm.bench.results import SAME, WRONG, against_peers, without_allocator

FLOOR = 0.10  # what the same code differs by from one day to another, on two virtual cores
STEP = "bert-mini"  # the recorded recipe that begins so
Measure = Callable[[list[str] | None], tuple[list[dict], dict[str, str]]]


class Incomparable(Exception):
    """Why there is nothing to compare with."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the best peer fastlm is, the relative spread of that, and the peer's name."""

    times: float
    spread: float
    peer: str


@dataclass(frozen=True)
class Row:
    """A ratio as recorded and as measured now, either of which may be missing."""

    name: str
    recorded: Ratio | None
    now: Ratio | None

    @property
    def margin(self) -> float:
        return FLOOR + math.hypot(self.recorded.spread, self.now.spread)

    @property
    def verdict(self) -> str:
        """ "ok", "SLOWER", "GONE" (recorded and no longer measured), or "new" (not recorded)."""
        if self.recorded is None:
            return "new"
        if self.now is None:
            return "GONE"
        return "SLOWER" if self.now.times < self.recorded.times * (1 - self.margin) else "ok"

    @property
    def failed(self) -> bool:
        return self.verdict in ("SLOWER", "GONE")


def ratios(rows: list[dict]) -> dict[tuple[str, str], Ratio]:
    """{(op or recipe, all of the row's name): ratio}, of each of fastlm's contenders that has a peer.

    Of allocators (+malloc) the faster counts, for fastlm as for its peers.
    """
    out = {}
    for ours, peer in against_peers(rows):
        if peer is not None:
            what = ours.get("recipe") or ours["op"]
            words = [what, *(str(ours[key]) for key in ("shape", "dtype", "pass") if ours.get(key))]
            words += [f"{ours['threads']} threads"] if ours.get("threads") else []
            spread = math.hypot(*(row["ms_iqr"] / row["ms"] for row in (ours, peer)))
            name = " ".join([*words, without_allocator(ours["contender"])])
            out[what, name] = Ratio(peer["ms"] / ours["ms"], spread, peer["contender"])
    return out


def compare(recorded: list[dict], now: list[dict]) -> list[Row]:
    """A row for each measured ratio, and for each recorded one of a shape that was now measured without it."""
    old, new = ratios(recorded), ratios(now)
    measured = {_shape(row) for row in now}
    kept = ratios([row for row in recorded if _shape(row) in measured])
    return [Row(key[1], old.get(key), new.get(key)) for key in dict.fromkeys([*new, *kept])]


def _shape(row: dict) -> tuple:
    return tuple(row.get(key) for key in SAME)


def read(path: Path, machine: dict) -> list[dict]:
    """The recorded rows. Incomparable where there are none, or they are of another machine."""
    if not path.exists():
        raise Incomparable(f"{path} is not there: nothing is recorded yet; record it with `make bench`")
    content = json.loads(path.read_text())
    for key in ("cpu", "cores"):
        was, now = content["provenance"].get(key), machine[key]
        if was != now:
            raise Incomparable(
                f"{path} was recorded with {key} = {was}, here it is {now}: ratios of another machine say nothing of "
                "this one; record it here with `make bench`"
            )
    if not content["rows"]:
        raise Incomparable(f"{path} has no rows; record it with `make bench`")
    return content["rows"]


def table(rows: list[Row], again: dict[str, Row]) -> list[str]:
    """An aligned line for every row; `again`: those that were measured twice, as measured the second time."""
    width = max([len(row.name) for row in rows], default=0)
    lines = [f"{'times as fast as the best peer':<{width}} {'recorded':>9} {'now':>9} {'again':>9} {'margin':>7}"]
    for row in rows:
        second = again.get(row.name)
        cells = [f"{x.times:9.2f}" if x else f"{'-':>9}" for x in (row.recorded, row.now, second and second.now)]
        margin = f"{row.margin:7.0%}" if row.recorded and row.now else f"{'-':>7}"
        peer = (row.now or row.recorded).peer
        lines.append(f"{row.name:<{width}} {' '.join(cells)} {margin} {(second or row).verdict:<7} {peer}")
    return lines


def check(recorded: list[dict], measure: Measure) -> tuple[list[str], str]:
    """(the table, the verdict, "" where all is as recorded).

    measure(None, or the ops and recipes to measure again) -> (rows, {a wrong contender: how}).
    """
    now, wrong = measure(None)
    rows = compare(recorded, now)
    flagged = {row.name for row in rows if row.failed}
    again = {}
    if flagged:
        whats = {what for what, name in {**ratios(recorded), **ratios(now)} if name in flagged}
        rows_again, wrong_again = measure(sorted(whats))
        second, wrong = compare(recorded, rows_again), wrong | wrong_again
        again = {row.name: row for row in second if row.name in flagged}
        again |= {name: next(row for row in rows if row.name == name) for name in flagged - again.keys()}
    verdicts = {row.verdict for row in again.values() if row.failed}
    said = {"WRONG": "WRONG results", "SLOWER": "SLOWER than recorded, twice", "GONE": "GONE, twice"}
    bad = [text for verdict, text in said.items() if verdict in verdicts or (verdict == "WRONG" and wrong)]
    return table(rows, again) + [f"{name}  {how}" for name, how in wrong.items()], ", ".join(bad)


def run(script: Path, *arguments: str) -> tuple[list[dict], dict[str, str]]:
    """(the rows that a benchmark writes, {a wrong contender: how}). RuntimeError, with its output, if it fails."""
    with tempfile.TemporaryDirectory(prefix="fastlm-check-") as directory:
        path = Path(directory) / "out.json"
        command = [sys.executable, str(script), "--device", "cpu", *arguments, "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        content = json.loads(path.read_text()) if path.exists() else {"provenance": {}, "rows": []}
        wrong = {
            " ".join([one.get("recipe") or one["op"], one.get("shape", ""), one["contender"]]): one["reason"]
            for one in content["provenance"].get("missing", ())
            if one["reason"].startswith(WRONG)
        }
        if done.returncode != 0 and (done.returncode != 1 or not wrong or "Traceback" in done.stderr):
            said = f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
            raise RuntimeError(f"{script.name} failed with {done.returncode}:\n{said}")
        return content["rows"], wrong


def ops_measure(scripts: Path) -> Measure:
    def measure(names):
        return run(scripts / "bench_ops.py", "--quick", "--whole", "--op", ",".join(names) if names else "all")

    return measure


def step_measure(scripts: Path, recipe: str) -> Measure:
    return lambda names: run(scripts / "bench_train.py", "--recipe", recipe)


def first_step(recorded: list[dict], path: Path) -> str:
    """The recorded step that begins with STEP. Incomparable where there is none."""
    recipes = {row["recipe"] for row in recorded if row["recipe"].startswith(STEP)}
    if not recipes:
        raise Incomparable(f"{path} has no step of {STEP}; record it with `make bench`")
    return min(recipes)


def main(scripts: Path, arguments=None, *, measure_ops: Measure | None = None) -> int:
    """scripts: the directory of bench_ops.py and bench_train.py, and of results/. measure_ops replaces bench_ops.py."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    default = scripts / "results" / "cpu"
    parser.add_argument("--results", type=Path, default=default, help="the directory of ops.json and train.json")
    parser.add_argument("--only", choices=("ops", "train"))
    args = parser.parse_args(arguments)
    machine, status = info.machine(), 0
    for part in [args.only] if args.only else ["ops", "train"]:
        path = args.results / f"{part}.json"
        try:
            recorded, measure = read(path, machine), measure_ops or ops_measure(scripts)
            if part == "train":
                recipe = first_step(recorded, path)
                recorded = [row for row in recorded if row["recipe"] == recipe]
                measure = step_measure(scripts, recipe)
        except Incomparable as why:
            print(f"{part}: {why}", flush=True)
            status = max(status, 2)
            continue
        lines, bad = check(recorded, measure)
        print("\n".join(lines), flush=True)
        print(f"{part}: {bad or 'as recorded'}", flush=True)
        status = 1 if bad else status
    return status
