"""What the compilers made of the kernels: the program of benchmarks/static_report.py.

Registers, spills, shared memory, instructions, widths of loads; no GPU is needed. For Triton a configuration is an
OpCase's `production` variant in bfloat16, forward and backward, on each of ARCHITECTURES; the launchers choose the
blocks. For CUDA it is every kernel in the module fastlm._cuda as built here, on each of CUDA_ARCHITECTURES. The numbers
belong to one version of triton, or of nvcc, which the file names; Triton 3.7 and 3.6 have a file each. predicted.csv
has times that follow from the same machine code (fastlm/bench/predicted.py), with Triton 3.7.

Two things are faults, whatever is committed: wgmma that ptxas serialises (`warnings`, C7510 to C7519), and a last wave
of blocks under 60% full where the launcher chooses the number of blocks.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import io
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from fastlm import _native
from fastlm.bench import predicted
from fastlm.bench.results import write_text
from fastlm.bench.sass import bytes_in_flight, parse
from fastlm.info import version
from fastlm.ops import _registry
from fastlm.testing.ahead_of_time import compile_for, occupancy
from fastlm.testing.cases import CASES

ARCHITECTURES = (80, 90, 100, 120)
CUDA_ARCHITECTURES = (80, 90, 100)
FILE, CUDA_FILE = "triton.csv", "cuda.csv"
TRITON, OTHER_TRITONS = "3.7", ("3.6",)  # FILE's version, and those whose reports are triton-3.6.csv and so on
_RESOURCES = ("registers", "spill_bytes", "shared_bytes", "occupancy", "matrix", "loads")
COLUMNS = ("op", "variant", "kernel", "arch", "warps", *_RESOURCES, "warnings")
# threads: that a block has at most, where the kernel says so, and occupancy with them and the static shared memory;
# loads: of global memory, to shared memory too, by their width; in_flight: bytes that a thread asks global memory for
# before it waits for the first of them (fastlm/bench/sass.py).
CUDA_COLUMNS = ("kernel", "arch", "threads", *_RESOURCES, "in_flight")


def triton_file() -> str:
    """The report of the triton that is installed. ValueError where there is none of its version."""
    minor = ".".join(version("triton").split(".")[:2])
    if minor not in (TRITON, *OTHER_TRITONS):
        raise ValueError(f"triton: expected {' or '.join((TRITON, *OTHER_TRITONS))}, got {version('triton')}")
    return FILE if minor == TRITON else f"triton-{minor}.csv"


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
        values = [op, variant, kernel.name, f"sm_{arch}", kernel.num_warps, used.registers, used.spills, used.shared]
        values += [f"{kernel.occupancy(used):.2f}", kernel.matrix_instruction(), loads, " ".join(kernel.warnings())]
        rows.append(dict(zip(COLUMNS, map(str, values))))
    return rows


def in_processes(function: Callable, items: list, workers: int) -> list:
    """The lists that function returns for the items, joined."""
    # Not forked: torch's threads would not survive it.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(function, items) for row in rows]


def unique(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Sorted; a kernel that two calls of one configuration compile alike is one row."""
    values = sorted({tuple(row[name] for name in COLUMNS) for row in rows})
    return [dict(zip(COLUMNS, row)) for row in values]


def report(workers: int = 2) -> list[dict[str, str]]:
    """All rows, sorted."""
    return unique(in_processes(compile_one, configurations(), workers))


def serialised(rows: list[dict[str, str]]) -> list[str]:
    """The kernels whose wgmma ptxas serialises."""
    return [
        f"{row['kernel']} of {row['op']} {row['variant']}, {row['arch']}: {row['warnings']}, its wgmma are serialised"
        for row in rows
        if row["warnings"]
    ]


def as_text(rows: list[dict[str, str]], compiler: str | None = None, columns: tuple[str, ...] | None = None) -> str:
    out = io.StringIO()
    out.write(f"# {compiler or 'triton ' + version('triton')}\n")
    columns = columns or (COLUMNS if compiler is None else CUDA_COLUMNS)
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# ---- CUDA: fastlm._cuda, read by cuobjdump


def missing_cuda() -> str | None:
    """Why there is no report of the CUDA kernels here, or None."""
    if _native.cuda() is None:
        return "fastlm._cuda is not built"
    return None if version("triton") else "triton is not installed; its cuobjdump reads the machine code"


def cuda_compiler() -> str:
    return f"nvcc {_native.cuda().compiler()}"


def cuda_architectures() -> list[int]:
    """Those of CUDA_ARCHITECTURES that the module is built for."""
    built = {int(code) // 10 for code in _native.cuda().architectures().split(",")}
    return [arch for arch in CUDA_ARCHITECTURES if arch in built]


def _cuobjdump(*options: str) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, *options, _native.cuda().__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def demangled(name: str) -> str:
    """A kernel's name without its namespace and parameters: layer_norm_fwd_kernel<bf16, 8, 1, 32>."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = library.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value:
        return name
    full = ctypes.string_at(text).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(text))
    full = full.removeprefix("void ").replace("fastlm::cuda::", "")
    for long, short in (("__nv_bfloat16", "bf16"), ("__half", "f16"), ("float", "f32")):
        full = re.sub(rf"\b{long}\b", short, full)
    depth = 0
    for at, letter in enumerate(full):  # up to the parameters: the first parenthesis outside of <>
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return full[:at]
    return full


def block_sizes(ptx: str) -> dict[str, int]:
    """The most threads of a block, of the kernels that have __launch_bounds__."""
    found = re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)(?:, (\d+), (\d+))?", ptx)
    return {name: int(x) * int(y or 1) * int(z or 1) for name, x, y, z in found}


def load_widths(sass: str) -> dict[int, int]:
    """How many instructions load 1, 2, 4, 8 or 16 bytes from global memory, to registers or to shared memory."""
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    counts = Counter()
    for modifiers in re.findall(r"LDG(?:STS)?((?:\.\w+)*)\s", sass):
        counts[next((sizes[word] for word in modifiers.split(".") if word in sizes), 4)] += 1
    return dict(sorted(counts.items()))


def matrix_unit(sass: str) -> str:
    """ "tcgen05", "wgmma", "mma" or "": what multiplies matrices."""
    return next(
        (name for word, name in (("UTCHMMA", "tcgen05"), ("HGMMA", "wgmma"), ("HMMA", "mma")) if word in sass), ""
    )


def cuda_report(arch: int) -> list[dict[str, str]]:
    """All rows of an architecture that the module is built for, sorted."""
    threads = block_sizes(_cuobjdump("--dump-ptx"))
    usage = _cuobjdump("--dump-resource-usage", "-arch", f"sm_{arch}")
    parts = _cuobjdump("--dump-sass", "-arch", f"sm_{arch}").split("\tFunction : ")[1:]
    sass = dict(part.split("\n", 1) for part in parts)
    rows = []
    for name, text in re.findall(r"Function (\w+):\s*(REG.*)", usage):
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
        block, shared = threads.get(name), used["SHARED"]
        if arch >= 90 and shared:
            shared -= 1024  # of which the system's 1 kB is counted as the kernel's
        share = occupancy(arch, -(-block // 32), used["REG"], shared) if block else None
        loads = " ".join(f"{count}x{size}B" for size, count in reversed(load_widths(sass[name]).items()))
        values = [demangled(name), f"sm_{arch}", block or "", used["REG"], used["STACK"] + used["LOCAL"], shared]
        values += [f"{share:.2f}" if block else "", matrix_unit(sass[name]), loads]
        values += [bytes_in_flight(parse(sass[name]))]
        rows.append(dict(zip(CUDA_COLUMNS, map(str, values))))
    return sorted(rows, key=lambda row: row["kernel"])


def differences(old: str, new: str) -> list[str]:
    """Lines that only one of two reports has, with - and +.

    ptxas is not deterministic: compiled over and over, one float32 attention kernel takes 146 registers or 148. So
    registers may differ by 8, what warps are handed at a time, and with them the occupancy.
    """
    a, b = old.splitlines(), new.splitlines()
    gone, come = [line for line in a if line not in set(b)], [line for line in b if line not in set(a)]
    for line in list(gone):
        match = next((other for other in come if _nearly_same(line, other, a[1], b[1])), None)
        if match is not None:
            gone.remove(line)
            come.remove(match)
    return [f"- {line}" for line in gone] + [f"+ {line}" for line in come]


def _nearly_same(line: str, other: str, header: str, other_header: str) -> bool:
    """Whether two rows of reports differ in at most 8 registers, and in what they allow."""
    if header != other_header:
        return False
    rows = [dict(zip(header.split(","), next(csv.reader([x])))) for x in (line, other)]
    if all("us" in row for row in rows):
        return predicted.nearly_same(*rows)
    if any("registers" not in row for row in rows):
        return False
    registers = [row.pop("registers") for row in rows]
    for row in rows:
        row.pop("occupancy")
    return rows[0] == rows[1] and all(map(str.isdigit, registers)) and abs(int(registers[0]) - int(registers[1])) <= 8


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text, what="the report")
    print(f"{len(text.splitlines()) - 2} kernels: {file}")


def compare(file: Path, text: str) -> bool:
    """Whether the committed file agrees with this text; prints what differs."""
    changed = differences(file.read_text(), text)
    print(f"{file.name}: " + ("\n".join(["", *changed]) if changed else "as committed"))
    return not changed


def main(directory: Path, arguments=None) -> int:
    """directory: of the committed files."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="DIR", help="write the files into this directory")
    where.add_argument("--update", action="store_true", help=f"write the committed files, {directory}")
    parser.add_argument("--only", choices=("triton", "cuda", "predicted"), help="one of the three reports")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    args = parser.parse_args(arguments)
    out = directory if args.update else args.out

    def finish(name: str, text: str, faults: list[str]) -> bool:
        print("\n".join([f"{name}: {len(faults)} faults", *faults]) if faults else f"{name}: no faults")
        if out is None:
            return compare(directory / name, text) and not faults
        write(out / name, text)
        return not faults

    same = True
    if args.only in (None, "triton"):
        rows = report(args.workers)
        same &= finish(triton_file(), as_text(rows), serialised(rows))
    if args.only in (None, "cuda"):
        if missing_cuda() or cuda_architectures() != list(CUDA_ARCHITECTURES):
            wanted = ",".join(map(str, CUDA_ARCHITECTURES))
            print(f"cuda.csv: {missing_cuda() or f'fastlm._cuda is built for {cuda_architectures()}, not {wanted}'}")
            return 1
        rows = [row for arch in CUDA_ARCHITECTURES for row in cuda_report(arch)]
        same &= finish(CUDA_FILE, as_text(rows, cuda_compiler()), [])
    if args.only == "predicted" or (args.only is None and triton_file() == FILE):
        rows = in_processes(predicted.predict, predicted.configurations(), args.workers)
        same &= finish(predicted.FILE, as_text(rows, columns=predicted.COLUMNS), predicted.short_waves(rows))
    return 0 if same else 1
