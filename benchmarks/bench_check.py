"""Whether fastlm is as fast beside its peers as was recorded: the ops in their first shapes, and BERT-mini's step.

    python benchmarks/bench_check.py               against benchmarks/results/cpu
    python benchmarks/bench_check.py --only ops    or train

What is compared is a ratio, the best peer's time over fastlm's, both from one run: a machine that is slow today is slow
for both. A ratio may fall below the recorded one by FLOOR and by the spread of both runs (the interquartile ranges of
the four times, relative, squares added). A row that falls further is measured again, and fails if it does so twice.
Who computes something else than eager, fastlm or peer, is named below the table and fails at once.
Exit status: 0 as recorded, 1 slower, missing or wrong, 2 where there is nothing to compare with.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastlm import info

HERE = Path(__file__).parent
FLOOR = 0.10  # what the same code differs by from one day to another, on two virtual cores
STEP = "bert-mini"  # the recorded recipe that begins so
WRONG = "WRONG: "  # how bench_ops.py begins to say that a contender computes something else


class Incomparable(Exception):
    """Why there is nothing to compare with."""


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the best peer fastlm is, the spread of that, relative, and who the peer is."""

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
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        what = row.get("recipe") or row["op"]
        where = [str(row[key]) for key in ("shape", "dtype", "pass") if row.get(key)]
        groups.setdefault((what, " ".join([what, *where, *_threads(row)])), []).append(row)
    out = {}
    for (what, name), group in groups.items():
        peer = min((r for r in group if not _is_ours(r)), key=lambda r: r["ms"], default=None)
        for contender in dict.fromkeys(r["contender"].partition("+")[0] for r in group if _is_ours(r)):
            ours = min((r for r in group if r["contender"].partition("+")[0] == contender), key=lambda r: r["ms"])
            if peer is not None:
                spread = math.hypot(*(r["ms_iqr"] / r["ms"] for r in (ours, peer)))
                out[what, f"{name} {contender}"] = Ratio(peer["ms"] / ours["ms"], spread, peer["contender"])
    return out


def _is_ours(row: dict) -> bool:
    return row["contender"].startswith("fastlm")


def _threads(row: dict) -> list[str]:
    return [f"{row['threads']} threads"] if row.get("threads") else []


def compare(recorded: list[dict], now: list[dict]) -> list[Row]:
    """A row for each that was measured, and for each recorded one whose shape was measured with other contenders."""
    old, new = ratios(recorded), ratios(now)
    measured = {_shape(row) for row in now}
    kept = ratios([row for row in recorded if _shape(row) in measured])
    return [Row(key[1], old.get(key), new.get(key)) for key in dict.fromkeys([*new, *kept])]


def _shape(row: dict) -> tuple:
    return tuple(row.get(key) for key in ("op", "recipe", "shape", "dtype", "pass", "threads"))


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


def check(recorded: list[dict], measure) -> tuple[list[str], str]:
    """(the table, the verdict, "" where all is as recorded).

    measure(None or the ops and recipes to measure again) -> (rows, {who is wrong: how}).
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


def measure_ops(names: list[str] | None) -> tuple[list[dict], dict[str, str]]:
    return _run("bench_ops.py", "--quick", "--whole", "--op", ",".join(names) if names else "all")


def _run(script: str, *arguments: str) -> tuple[list[dict], dict[str, str]]:
    """(the rows that a benchmark writes, {who is wrong: how}); what it prints is shown where it fails otherwise."""
    with tempfile.TemporaryDirectory(prefix="fastlm-check-") as directory:
        path = Path(directory) / "out.json"
        command = [sys.executable, str(HERE / script), "--device", "cpu", *arguments, "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        content = json.loads(path.read_text()) if path.exists() else {"provenance": {}, "rows": []}
        wrong = {
            " ".join([one.get("recipe") or one["op"], one.get("shape", ""), one["contender"]]): one["reason"]
            for one in content["provenance"].get("missing", ())
            if one["reason"].startswith(WRONG)
        }
        if done.returncode != 0 and (done.returncode != 1 or not wrong or "Traceback" in done.stderr):
            raise RuntimeError(f"{script} failed with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return content["rows"], wrong


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--results", type=Path, default=HERE / "results" / "cpu", help="where ops.json and train.json lie"
    )
    parser.add_argument("--only", choices=("ops", "train"))
    args = parser.parse_args(arguments)
    machine, status = info.machine(), 0
    for part in [args.only] if args.only else ["ops", "train"]:
        try:
            recorded, measure = read(args.results / f"{part}.json", machine), measure_ops
            if part == "train":
                recipes = {row["recipe"] for row in recorded if row["recipe"].startswith(STEP)}
                if not recipes:
                    raise Incomparable(
                        f"{args.results / 'train.json'} has no step of {STEP}; record it with `make bench`"
                    )
                recipe = min(recipes)
                recorded = [row for row in recorded if row["recipe"] == recipe]

                def measure(names, recipe=recipe):
                    return _run("bench_train.py", "--recipe", recipe)
        except Incomparable as why:
            print(f"{part}: {why}", flush=True)
            status = max(status, 2)
            continue
        lines, bad = check(recorded, measure)
        print("\n".join(lines), flush=True)
        print(f"{part}: {bad or 'as recorded'}", flush=True)
        status = 1 if bad else status
    return status


if __name__ == "__main__":
    sys.exit(main())
