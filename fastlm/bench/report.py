"""One page from recorded results, no number typed by hand: the program of benchmarks/report.py.

For each directory with an ops.json (bench_ops.py) or a train.json (bench_train.py) it writes report.md, ops.png and
train.png beside them, and a summary into README.md between the lines "<!-- results -->" and "<!-- /results -->".
report.md shows curves.png (bench_train.py --curve-plot) where it exists.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from fastlm.bench import ops, passes
from fastlm.bench.results import SAME, against_peers, geometric_mean, is_ours, mark, without_allocator, write_text
from fastlm.bench.training import plot_rates, step_label

BEGIN, END = "<!-- results -->\n", "<!-- /results -->\n"
FLOAT32 = "fastlm float32"
SHIPPED = "transformers"  # as shipped; the contenders in TUNED are the same model as an expert runs it
PURE = ("transformers pure", "transformers pure compiled")  # those of TUNED without float32 weights: less exact
TUNED = ("transformers sdpa", "transformers compiled", "transformers tuned", "transformers tuned compiled")
TUNED += ("transformers packed", *PURE)


_ON_GPU = (
    " ms is the device's time, by replays of a CUDA graph over inputs that fill its cache twice. host ms: until "
    "the call returns to Python, all kernels launched. *: could not be captured, timed by launches queued ahead."
)


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
    """A row of fastlm's each, beside the best peer; on a GPU with the host's time."""
    out, on_gpu = [], any(row.get("host_ms") is not None for row in rows)
    for row, peer in against_peers(rows):
        rate = f"{row['tflops']:.3g} TFLOP/s" if row["tflops"] else f"{row['gbps']:.0f} GB/s"
        spread = 50 * row["ms_iqr"] / row["ms"]
        out.append(
            [
                f"{row['op']} {row['shape']}",
                passes.label(row["op"], row["pass"]),
                row["contender"].removeprefix("fastlm:") + mark(row),
                f"{row['ms']:.3f} ±{spread:.0f}%",
                *([f"{row['host_ms']:.3f}"] if on_gpu else []),
                rate,
                f"{row['of_ceiling']:.0%}",
                f"{peer['ms'] / row['ms']:.2f} {peer['contender']}{mark(peer)}" if peer else "",
            ]
        )
    host = ["host ms"] if on_gpu else []
    return _table(["op and shape", "pass", "backend", "ms", *host, "rate", "of ceiling", "× best peer"], out)


def contenders_tables(rows: list[dict]) -> str:
    """A table for each op with all that was measured: a row a shape and pass, a column a contender."""
    out = []
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        names = sorted({row["contender"] for row in of_op}, key=lambda name: (not name.startswith("fastlm"), name))
        lines: dict[tuple[str, str, str], dict[str, str]] = {}
        for row in of_op:
            memory = "" if row["peak_mb"] is None else f", {row['peak_mb']:,.0f} MB"
            cell = f"{row['ms']:.3f}{mark(row)} ±{50 * row['ms_iqr'] / row['ms']:.0f}%{memory}"
            where = row["shape"], row["dtype"], passes.label(op, row["pass"])
            lines.setdefault(where, {})[row["contender"]] = cell
        cells = [[*where, *(line.get(name, "") for name in names)] for where, line in lines.items()]
        out.append(f"### {op}\n\n{_table(['shape', 'dtype', 'pass', *names], cells)}")
    return "\n".join(out)


def ops_summary(rows: list[dict]) -> str:
    """For each op and backend the geometric mean over its shapes of (best peer's time / fastlm's), a column a pass.

    The forward of an op that also computes its gradient has no mean, and a footnote.
    """
    ratios: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row, peer in against_peers(rows):
        if peer and row["op"] != "call overhead":
            backend = without_allocator(row["contender"]).removeprefix("fastlm:")
            ratios.setdefault((row["op"], backend), {}).setdefault(row["pass"], []).append(peer["ms"] / row["ms"])

    def cell(op, which, values):
        if which == "fwd" and passes.gradient_in_forward(op):
            return "¹"
        return f"{geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""

    lines = [
        [f"`{op}`", backend, *(cell(op, which, by_pass.get(which)) for which in passes.PASSES)]
        for (op, backend), by_pass in ratios.items()
    ]
    out = _table(["op", "backend", "forward", "forward and backward"], lines)
    if any("¹" in line for line in lines):
        out += "\n¹ This forward also computes the gradient, a peer's does not: only both passes together compare.\n"
    return out


def _contenders_of(row: dict, rows: list[dict]) -> dict[str, dict]:
    """{contender: row} of the same step."""
    return {r["contender"]: r for r in rows if all(r.get(key) == row.get(key) for key in SAME)}


def _percent(share: float | None) -> str:
    return "n/a" if share is None or math.isnan(share) else f"{share:.0%}"


def train_table(rows: list[dict]) -> str:
    """Every contender of every step."""
    out = []
    for row in rows:
        ours = _contenders_of(row, rows).get("fastlm")
        out.append(
            [
                f"{step_label(row['recipe'], row['shape'])} {row['dtype']}, {row['threads']} threads",
                row["contender"],
                f"{row['tokens_per_s']:,.0f}",
                f"{row['ms']:.1f} ±{50 * row['ms_iqr'] / row['ms']:.0f}%",
                _percent(row.get("mfu")),
                _percent(row.get("of_bound")),
                f"{row['peak_mb']:,.0f}",
                f"{row['step_mb']:,.0f}",
                "" if row is ours or ours is None else f"{ours['tokens_per_s'] / row['tokens_per_s']:.2f}",
            ]
        )
    return _table(["step", "contender", "tokens/s", "ms", "MFU", "of bound", "MB", "of the step", "fastlm is ×"], out)


def train_summary(rows: list[dict]) -> str:
    """A line for each step: fastlm's tokens/s, over Transformers' as shipped and over its fastest tuned form.

    Where some step was timed in float32 too, a column has fastlm's tokens/s over fastlm's in float32.
    """
    out, low = [], any(row["contender"] == FLOAT32 for row in rows)
    for row in rows:
        if row["contender"] != "fastlm":
            continue
        others = _contenders_of(row, rows)
        shipped = others.get(SHIPPED)
        tuned = max((others[name] for name in TUNED if name in others), key=lambda r: r["tokens_per_s"], default=None)
        beside = (shipped, tuned, others.get(FLOAT32)) if low else (shipped, tuned)
        times = [f"{row['tokens_per_s'] / other['tokens_per_s']:.2f}" if other else "" for other in beside]
        step = f"{step_label(row['recipe'], row['shape'])}, {row['dtype']}, {row['threads']} threads"
        out.append([step, f"{row['tokens_per_s']:,.0f}", *times, _percent(row.get("of_bound"))])
    ratios = ["× as shipped", "× tuned", *(["× its float32"] if low else [])]
    return _table(["training step", "tokens/s", *ratios, "of the bound"], out)


def steps_note(rows: list[dict]) -> str:
    """What `train_summary` compares, as far as its columns do not say it."""
    names, out = {row["contender"] for row in rows}, ""
    if names.intersection(PURE):
        out += (
            " For a step in bfloat16 the tuned forms include those that keep weights and moments in bfloat16, which "
            "is less exact; fastlm keeps float32 ones."
        )
    if FLOAT32 in names:
        out += " Its float32 is fastlm's own step in float32."
    return out


def curves_note(rows: list[dict]) -> str:
    """The largest distance of a curve from fastlm's, and each that noise does not explain; "" without curves."""
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
    """A line for each reason, with its contenders, ops and steps; and one for the shapes left out for want of time."""
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
    rest = ", ".join(step_label(one["op"], one["shape"]) for one in left_out)
    return out + (f"- left out for want of time: {rest}\n" if rest else "")


def plots(directory: Path, of_ops: list[dict], train: list[dict]) -> None:
    if of_ops:
        ops.plot(directory / "ops.png", of_ops, f"ops, {directory.name}")
    if train:
        plot_rates(directory / "train.png", train, f"training steps, {directory.name}")


def read(directory: Path, name: str) -> tuple[list[dict], dict]:
    """(rows, provenance) of a JSON file; nothing of one that is not there."""
    path = directory / name
    content = json.loads(path.read_text()) if path.exists() else {"rows": [], "provenance": {}}
    return content["rows"], content["provenance"]


def page(directory: Path) -> str:
    """report.md."""
    of_ops, ops_from = read(directory, "ops.json")
    train, train_from = read(directory, "train.json")
    out = [f"# Results: {directory.name}\n"]
    if of_ops:
        out += [
            f"## Ops\n\n{machine(ops_from)}. `{ops_from.get('command', '')}`\n\n"
            "ms: the median of the rounds, ± half of their interquartile range. × best peer: its time over fastlm's; "
            "below 1 fastlm loses. All contenders of a shape, and the ceilings, were timed in turn in one run. Of "
            "ceiling: of a large copy's GB/s, or a large matrix product's TFLOP/s; above 100% where an op reads more "
            "than it writes, which a copy does not."
            + (_ON_GPU if any(row.get("host_ms") for row in of_ops) else "")
            + "\n",
            ops_summary(of_ops),
            ops_table(of_ops),
            not_run(ops_from.get("missing") or [], ops_from.get("left_out") or []),
            "![ops](ops.png)\n",
            "## Every contender\n\nms, and the memory that a call takes at its peak beyond its inputs. +malloc: with "
            "an allocator that keeps freed memory, as fastlm's command line does.\n",
            contenders_tables(of_ops),
        ]
    if train:
        out += [
            f"## Training steps\n\n{machine(train_from)}. `{train_from.get('command', '')}`\n\n"
            "of bound: the time of the step's matrix products alone (3 × forward, attention's included), at the rate "
            "of one large product in the same rounds, over ms. MB: the process's peak, and what of it came after the "
            "model was loaded. Contenders: fastlm/bench/step_contenders.py.\n",
            train_table(train),
            not_run(train_from.get("missing") or [], train_from.get("left_out") or []),
            "![training steps](train.png)\n",
            curves_note(train),
        ]
        if (directory / "curves.png").exists():
            out.append("![losses of the first steps](curves.png)\n")
    return "\n".join(out)


def summary(directories: list[Path]) -> str:
    """README.md's block: for each directory the training steps, and the ops' geometric means.

    The machine and the commit are named once, or above each of the two where they differ.
    """
    out = []
    for directory in directories:
        of_ops, ops_from = read(directory, "ops.json")
        train, train_from = read(directory, "train.json")
        where = f"benchmarks/results/{directory.name}"
        named = None
        if train:
            named = machine(train_from)
            out.append(
                f"**{named}** ([every row]({where}/report.md))\n\n"
                f"![training steps]({where}/train.png)\n\n"
                "fastlm's training step beside Transformers', as shipped and in the fastest form that was tuned by "
                "hand. The bound is the time of the step's matrix products alone, at the rate of a large product in "
                f"the same run.{steps_note(train)}\n\n{train_summary(train)}"
            )
        if of_ops:
            if machine(ops_from) != named:
                out.append(f"**{machine(ops_from)}** ([every row]({where}/report.md))\n")
            out.append(
                f"How many times as fast as its best peer an op is, geometric mean over shapes (range):\n\n"
                f"{ops_summary(of_ops)}"
            )
    return "\n".join(out)


def with_summary(readme: str, text: str) -> str:
    """README.md with `text` between its two lines. ValueError where it lacks them."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md: expected the lines {BEGIN.strip()} and {END.strip()}")
    return before + begin + text + end + after


def main(root: Path, arguments=None) -> int:
    """root: of the repository."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something would change")
    args = parser.parse_args(arguments)
    recorded = root / "benchmarks" / "results"
    directories = sorted({path.parent for name in ("ops.json", "train.json") for path in recorded.glob(f"*/{name}")})
    wanted = {directory / "report.md": page(directory) for directory in directories}
    readme = root / "README.md"
    wanted[readme] = with_summary(readme.read_text(), summary(directories))
    if args.check:
        changed = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
        print("\n".join(f"not what the results say: {path.relative_to(root)}" for path in changed) or "as recorded")
        return 1 if changed else 0
    for path, text in wanted.items():
        write_text(path, text, what="the report")
    for directory in directories:
        plots(directory, read(directory, "ops.json")[0], read(directory, "train.json")[0])
        print(directory / "report.md")
    return 0
