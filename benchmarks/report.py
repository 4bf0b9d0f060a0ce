"""One page from recorded results: Markdown and pictures, no number typed by hand.

    python benchmarks/report.py                    every directory of benchmarks/results/ that has results
    python benchmarks/report.py --check            says whether the pages and README.md are what the results say

For each directory with an ops.json (bench_ops.py) or a train.json (bench_train.py) it writes report.md, ops.png and
train.png beside them, and a summary into README.md between the lines "<!-- results -->" and "<!-- /results -->".
report.md shows curves.png (bench_train.py --curve-plot) where that is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import _report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->\n"


def is_ours(row: dict) -> bool:
    return row["contender"].startswith("fastlm")


def against_peers(rows: list[dict]) -> list[tuple[dict, dict | None]]:
    """(row of ours, the fastest peer's of the same op, shape, dtype and pass); rows of ours are kept in their order.

    Of ours with the allocator as shipped and tuned (+malloc) the faster counts, as of the peers.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("op", "shape", "dtype", "pass")), []).append(row)
    out = []
    for group in groups.values():
        peer = min((row for row in group if not is_ours(row)), key=lambda row: row["ms"], default=None)
        best: dict[str, dict] = {}
        for row in filter(is_ours, group):
            name = row["contender"].partition("+")[0]
            if name not in best or row["ms"] < best[name]["ms"]:
                best[name] = row
        out += [(row, peer) for row in best.values()]
    return out


def machine(provenance: dict) -> str:
    """What the results were measured on, in a line."""
    cpu = f"{provenance.get('cpu', 'unknown machine')}, {provenance.get('cores', '?')} cores"
    chip = ", ".join(provenance.get("gpu") or []) or cpu
    versions = [f"{name} {provenance[name]}" for name in ("torch", "triton", "driver") if provenance.get(name)]
    commit = (provenance.get("commit") or "unknown")[:7] + (" with changes" if provenance.get("dirty") else "")
    return f"{chip}; {', '.join(versions)}; commit {commit}; {provenance.get('time', '')[:10]}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def ops_table(rows: list[dict]) -> str:
    out = []
    for row, peer in against_peers(rows):
        rate = f"{row['tflops']:.3g} TFLOP/s" if row["tflops"] else f"{row['gbps']:.0f} GB/s"
        spread = 50 * row["ms_iqr"] / row["ms"]
        out.append(
            [
                f"{row['op']} {row['shape']}",
                row["pass"],
                row["contender"].removeprefix("fastlm:"),
                f"{row['ms']:.3f} ±{spread:.0f}%",
                rate,
                f"{row['of_ceiling']:.0%}",
                f"{peer['ms'] / row['ms']:.2f} {peer['contender']}" if peer else "",
            ]
        )
    return _table(["op and shape", "pass", "backend", "ms", "rate", "of ceiling", "× best peer"], out)


def contenders_tables(rows: list[dict]) -> str:
    """A table for each op with all that was measured: a row a shape and pass, a column a contender."""
    out = []
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        names = sorted({row["contender"] for row in of_op}, key=lambda name: (not name.startswith("fastlm"), name))
        lines: dict[tuple[str, str, str], dict[str, str]] = {}
        for row in of_op:
            memory = "" if row["peak_mb"] is None else f", {row['peak_mb']:,.0f} MB"
            cell = f"{row['ms']:.3f} ±{50 * row['ms_iqr'] / row['ms']:.0f}%{memory}"
            lines.setdefault((row["shape"], row["dtype"], row["pass"]), {})[row["contender"]] = cell
        cells = [[*where, *(line.get(name, "") for name in names)] for where, line in lines.items()]
        out.append(f"### {op}\n\n{_table(['shape', 'dtype', 'pass', *names], cells)}")
    return "\n".join(out)


def ops_summary(rows: list[dict]) -> str:
    """For each op and backend the geometric mean over its shapes of (best peer's time / ours), a column a pass."""
    ratios: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row, peer in against_peers(rows):
        if peer and row["op"] != "call overhead":
            passes = ratios.setdefault((row["op"], row["contender"].partition("+")[0][7:]), {})
            passes.setdefault(row["pass"], []).append(peer["ms"] / row["ms"])
    lines = []
    for (op, backend), passes in ratios.items():
        cells = [
            f"{_report.geometric_mean(passes[which]):.2f} ({min(passes[which]):.2f} to {max(passes[which]):.2f})"
            if which in passes
            else ""
            for which in ("fwd", "fwd+bwd")
        ]
        lines.append([f"`{op}`", backend, *cells])
    return _table(["op", "backend", "forward", "forward and backward"], lines)


def train_table(rows: list[dict]) -> str:
    out = []
    for row in rows:
        same = [r for r in rows if all(r[k] == row[k] for k in ("recipe", "shape", "dtype", "threads"))]
        ours = next((r for r in same if r["contender"] == "fastlm"), None)
        mfu, bound = row.get("mfu"), row.get("of_bound")
        out.append(
            [
                f"{row['recipe']} {row['shape']} {row['dtype']}, {row['threads']} threads",
                row["contender"],
                f"{row['tokens_per_s']:,.0f}",
                f"{row['ms']:.1f} ±{50 * row['ms_iqr'] / row['ms']:.0f}%",
                "n/a" if mfu is None else f"{mfu:.0%}",
                "n/a" if bound is None or math.isnan(bound) else f"{bound:.0%}",
                f"{row['peak_mb']:,.0f}",
                f"{row['step_mb']:,.0f}",
                "" if row is ours or ours is None else f"{ours['tokens_per_s'] / row['tokens_per_s']:.2f}",
            ]
        )
    return _table(["step", "contender", "tokens/s", "ms", "MFU", "of bound", "MB", "of the step", "fastlm is ×"], out)


def curves_note(rows: list[dict]) -> str:
    """How far the losses of the first steps are from fastlm's; nothing where none were kept."""
    rows = [row for row in rows if row.get("curve_off") is not None and not is_ours(row)]
    if not rows:
        return ""
    far = max(rows, key=lambda row: row["curve_off"])
    out = (
        f"Losses of the first {len(far['losses'])} steps: at most {far['curve_off']:.2%} from fastlm's "
        f"({far['recipe']}, {far['contender']}).\n"
    )
    for row in rows:
        if not row["curve_off"] <= row["curve_noise"]:
            out += (
                f"\n**{row['contender']} learns otherwise** in {row['recipe']}: {row['curve_off']:.2%} off, "
                f"noise {row['curve_noise']:.2%}.\n"
            )
    return out


def not_run(missing: list[dict], left_out: list[dict] = ()) -> str:
    """A line for each reason, with the contenders and where it holds; and one for what there was no time for."""
    reasons: dict[str, list[dict]] = {}
    for one in missing:
        reasons.setdefault(one["reason"], []).append(one)
    out = ""
    for reason, those in reasons.items():
        names = dict.fromkeys(one["contender"].partition("+")[0] for one in those)
        where = dict.fromkeys(one.get("recipe") or f"{one['op']} {one['shape']}" for one in those)
        if len(where) > 3:
            where = dict.fromkeys(one.get("recipe") or one["op"] for one in those)
        out += f"- not run in {', '.join(where)}: {', '.join(names)}: {reason}\n"
    rest = ", ".join(f"{one['op']} {one['shape']}" for one in left_out)
    return out + (f"- left out for want of time: {rest}\n" if rest else "")


def plots(directory: Path, ops: list[dict], train: list[dict]) -> None:
    if ops:
        groups: dict[str, dict[str, float]] = {}
        for row in ops:
            groups.setdefault(f"{row['op']} {row['shape']} {row['pass']}", {})[row["contender"]] = row["ms"]
        _report.plot(directory / "ops.png", groups, title=f"ops, {directory.name}", unit="ms, median")
    if train:
        groups = {}
        for row in train:
            name = f"{row['recipe']} {row['shape']}, {row['threads']} threads"
            groups.setdefault(name, {})[row["contender"]] = row["tokens_per_s"]
        _report.plot(directory / "train.png", groups, title=f"training steps, {directory.name}", unit="tokens/s")


def read(directory: Path, name: str) -> tuple[list[dict], dict]:
    """(rows, provenance) of a JSON file; nothing of one that is not there."""
    path = directory / name
    content = json.loads(path.read_text()) if path.exists() else {"rows": [], "provenance": {}}
    return content["rows"], content["provenance"]


def page(directory: Path) -> str:
    """report.md."""
    ops, ops_from = read(directory, "ops.json")
    train, train_from = read(directory, "train.json")
    out = [f"# Results: {directory.name}\n"]
    if ops:
        out += [
            f"## Ops\n\n{machine(ops_from)}. `{ops_from.get('command', '')}`\n\n"
            "ms: the median of the rounds, ± half of their interquartile range. × best peer: its time over ours, so "
            "that below 1 fastlm loses. All contenders of a shape, and the ceilings, were timed in turn in one run. Of "
            "ceiling: of a large copy's GB/s, or a large matrix product's TFLOP/s; above 100% where an op reads more "
            "than it writes, which a copy does not.\n",
            ops_summary(ops),
            ops_table(ops),
            not_run(ops_from.get("missing") or [], ops_from.get("left_out") or []),
            "![ops](ops.png)\n",
            "## Every contender\n\nms, and the memory that a call takes at its peak beyond its inputs. +malloc: with "
            "an allocator that keeps freed memory, as fastlm's command line has it.\n",
            contenders_tables(ops),
        ]
    if train:
        out += [
            f"## Training steps\n\n{machine(train_from)}. `{train_from.get('command', '')}`\n\n"
            "of bound: the time of the step's matrix products alone (3 × forward, attention's included), at the rate "
            "of one large product in the same rounds, over ms. MB: the process's peak, and what of it came after the "
            "model was loaded. Contenders: fastlm/testing/step_contenders.py.\n",
            train_table(train),
            not_run(train_from.get("missing") or [], train_from.get("left_out") or []),
            "![training steps](train.png)\n",
            curves_note(train),
        ]
        if (directory / "curves.png").exists():
            out.append("![losses of the first steps](curves.png)\n")
    return "\n".join(out)


def summary(directories: list[Path]) -> str:
    """What README.md shows: of each directory the ops' geometric means and fastlm's training steps."""
    out = []
    for directory in directories:
        ops, ops_from = read(directory, "ops.json")
        train, train_from = read(directory, "train.json")
        where = f"benchmarks/results/{directory.name}/report.md"
        out.append(f"**{machine(ops_from or train_from)}** ([every row]({where}))\n")
        if ops:
            out.append(f"Times as fast as the best peer, geometric mean over shapes (range):\n\n{ops_summary(ops)}")
        if train:
            out.append(f"Training steps:\n\n{train_table(train)}")
    return "\n".join(out)


def with_summary(readme: str, text: str) -> str:
    """README.md with `text` between its two lines. ValueError where it lacks them."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: expected the lines {BEGIN.strip()} and {END.strip()}")
    return before + begin + text + end + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something would change")
    args = parser.parse_args()
    directories = sorted({path.parent for name in ("ops.json", "train.json") for path in RESULTS.glob(f"*/{name}")})
    wanted = {directory / "report.md": page(directory) for directory in directories}
    readme = ROOT / "README.md"
    wanted[readme] = with_summary(readme.read_text(), summary(directories))
    if args.check:
        changed = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
        print("\n".join(f"not what the results say: {path.relative_to(ROOT)}" for path in changed) or "as recorded")
        return 1 if changed else 0
    for path, text in wanted.items():
        path.write_text(text)
    for directory in directories:
        plots(directory, read(directory, "ops.json")[0], read(directory, "train.json")[0])
        print(directory / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
