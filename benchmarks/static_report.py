"""What the compiler made of every production configuration: registers, spills, shared memory, instructions, loads.

    python benchmarks/static_report.py            writes benchmarks/results/static/triton.csv
    python benchmarks/static_report.py --check    says what differs from that file, and exits with 1 if anything does

No GPU is needed. A configuration is an OpCase's `production` variant in bfloat16, forward and backward, on each of
ARCHITECTURES; its launchers choose the blocks. The numbers belong to one version of triton, which the file names.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from fastlm.info import version
from fastlm.ops import _registry
from fastlm.testing.ahead_of_time import compile_for
from fastlm.testing.cases import CASES

ARCHITECTURES = (80, 90, 100, 120)
FILE = Path(__file__).parent / "results" / "static" / "triton.csv"
COLUMNS = (
    "op", "variant", "kernel", "arch", "warps", "registers", "spill_bytes", "shared_bytes", "occupancy", "matrix",
    "loads",
)  # fmt: skip


def configurations() -> list[tuple[str, int, int]]:
    """(op, index of the production variant, architecture)."""
    ops = [case for case in CASES.values() if "triton" in _registry.backends(case.op)]
    return [(case.op, i, arch) for case in ops for i in range(len(case.production)) for arch in ARCHITECTURES]


def compile_one(configuration: tuple[str, int, int]) -> list[dict[str, str]]:
    """The rows of one configuration."""
    op, index, arch = configuration
    case = CASES[op]
    variant = case.production[index]
    inputs = case.inputs(variant, 0, torch.bfloat16)
    with compile_for(arch) as compiled:
        case.everything(case.function, variant, inputs, 0, backend="triton")
    rows = []
    for kernel in compiled:
        used = kernel.resources()
        loads = " ".join(f"{count}x{size}B" for size, count in reversed(kernel.load_bytes().items()))
        values = (
            op, str(variant), kernel.name, f"sm_{arch}", kernel.num_warps, used.registers, used.spills, used.shared,
            f"{kernel.occupancy(used):.2f}", kernel.matrix_instruction(), loads,
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, map(str, values))))
    return rows


def report(workers: int = 2) -> list[dict[str, str]]:
    """All rows, sorted."""
    # Not forked: torch's threads would not survive it.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        rows = [row for rows in pool.map(compile_one, configurations()) for row in rows]
    # A kernel that two calls of one configuration compile alike is one row.
    values = sorted({tuple(row[name] for name in COLUMNS) for row in rows})
    return [dict(zip(COLUMNS, row)) for row in values]


def as_text(rows: list[dict[str, str]]) -> str:
    out = io.StringIO()
    out.write(f"# triton {version('triton')}\n")
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def differences(old: str, new: str) -> list[str]:
    """Lines that only one of two reports has, with - and +."""
    a, b = old.splitlines(), new.splitlines()
    return [f"- {line}" for line in a if line not in set(b)] + [f"+ {line}" for line in b if line not in set(a)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed file; write nothing")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    arguments = parser.parse_args()
    text = as_text(report(arguments.workers))
    if not arguments.check:
        FILE.parent.mkdir(parents=True, exist_ok=True)
        FILE.write_text(text)
        print(f"{len(text.splitlines()) - 2} kernels: {FILE}")
        return 0
    changed = differences(FILE.read_text(), text)
    print("\n".join(changed) or "as committed")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
