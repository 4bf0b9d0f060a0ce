"""The C++ core: built on demand, kept in a cache directory, called through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

CORE = Path(__file__).parent / "core"
# No contraction: what is written is what is done. -frounding-math: rounding modes are honoured.
FLAGS = ["-std=c++20", "-march=native", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"]
FLAGS += ["-ffp-contract=off", "-frounding-math", "-fno-trapping-math", "-fno-math-errno"]
OPTIMISED = ["-O2", "-ftree-vectorize"]
SCALAR = {"api", "ops_convert", "ops_half", "ops_system"}  # nothing to vectorise: half the time to compile with -O1

FIELD, RECORD = "\x1f", "\x1e"


def cache_directory() -> Path:
    """Where compiled things are kept: PTX_CACHE_DIR, or a directory of this user's in the temporary one."""
    path = Path(os.environ.get("PTX_CACHE_DIR") or Path(tempfile.gettempdir(), f"fastlm-ptx-{os.getuid()}"))
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def once(target: Path):
    """True for the one process that is to make `target`; the others wait until it has."""
    if target.exists():
        yield False
        return
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not target.exists()


def _build() -> Path:
    compiler = os.environ.get("CXX", "g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    native = subprocess.run([compiler, "-march=native", "-Q", "--help=target"], capture_output=True, text=True).stdout
    key = hashlib.sha256("\n".join([version, native, *FLAGS, *OPTIMISED, *sorted(SCALAR)]).encode())
    for path in sorted(CORE.iterdir()):
        key.update(path.read_bytes())
    target = cache_directory() / f"core-{key.hexdigest()[:16]}.so"
    with once(target) as missing:
        if missing:
            _compile(compiler, target)
    return target


def _compile(compiler: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_one(path):
            out = Path(scratch, path.stem + ".o")
            options = [*FLAGS, *(["-O1"] if path.stem in SCALAR else OPTIMISED)]
            done = subprocess.run([compiler, *options, "-c", str(path), "-o", str(out)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{path} does not compile:\n{done.stderr}")
            return str(out)

        objects = list(pool.map(compile_one, sorted(CORE.glob("*.cpp"), key=lambda path: -path.stat().st_size)))
        linked = Path(scratch, "core.so")
        subprocess.run([compiler, "-shared", "-pthread", *objects, "-o", str(linked)], check=True)
        linked.replace(target)


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    out = ctypes.CDLL(str(_build()))
    out.ptx_handlers.restype = ctypes.c_char_p
    out.ptx_program.restype = ctypes.c_void_p
    out.ptx_launch.restype = ctypes.c_void_p
    for name in ("ptx_findings", "ptx_printed"):
        getattr(out, name).restype = ctypes.c_char_p
    for name in ("ptx_findings", "ptx_printed", "ptx_result_free", "ptx_program_free"):
        getattr(out, name).argtypes = [ctypes.c_void_p]
    return out


@functools.lru_cache(maxsize=1)
def handlers() -> frozenset[str]:
    """The names of all handlers."""
    return frozenset(library().ptx_handlers().decode().rstrip(RECORD).split(RECORD))


def _integers(values) -> tuple[np.ndarray, ctypes.c_void_p]:
    array = np.ascontiguousarray(values, np.int64)
    return array, ctypes.c_void_p(array.ctypes.data)


class NativeProgram:
    """A Program of the core.

    code: (handler, guard, results, sources, imm, aux, target, table); an operand is (space, words, register, bytes,
    negated). sizes: words, predicates, registers, bytes of local and of shared memory. locals, shared: (offset, bytes)
    of the variables. special: (name, operand) of the special registers.
    """

    def __init__(self, code, constants: bytes, sizes, locals_, shared, special):
        names = {name: k for k, name in enumerate(dict.fromkeys(item[0] for item in code))}
        operands, tables, records = [], [], []
        for handler, guard, results, sources, imm, aux, target, table in code:
            guard_index = 0
            if guard is not None:
                operands.append(guard)
                guard_index = len(operands)
            first = len(operands)
            operands += [*results, *sources]
            aux = [*aux, 0, 0, 0, 0, 0, 0][:6]
            records.append(
                [
                    names[handler],
                    guard_index,
                    first,
                    len(results),
                    len(sources),
                    imm,
                    *aux,
                    target,
                    len(tables),
                    len(table or ()),
                ]
            )
            tables += table or ()
        kept = [
            _integers(values)
            for values in (
                [len(code), *sizes, len(locals_), len(shared)],
                records,
                operands,
                tables,
                [*locals_, *shared],
                [operand for _, operand in special],
            )
        ]
        header, records, operands, tables, ranges, special_operands = (pointer for _, pointer in kept)
        self.size = len(code)
        self.pointer = library().ptx_program(
            header,
            records,
            operands,
            tables,
            RECORD.join(names).encode(),
            constants,
            ctypes.c_uint64(len(constants)),
            ranges,
            RECORD.join(name for name, _ in special).encode(),
            special_operands,
        )
        weakref.finalize(self, library().ptx_program_free, self.pointer)

    def launch(self, config: list[int], params: bytes, buffers: list[tuple]):
        """Runs it, without the interpreter lock. config: see ptx_launch. buffers: (..., name).

        Returns the findings, what was printed, and for every instruction its executions and its bank conflicts.
        """
        kept = [_integers(values) for values in (config, [buffer[:-1] for buffer in buffers])]
        counts, conflicts = np.zeros((2, self.size), np.uint64)
        names = RECORD.join(buffer[-1] for buffer in buffers).encode()
        result = library().ptx_launch(
            ctypes.c_void_p(self.pointer),
            kept[0][1],
            params,
            ctypes.c_uint64(len(params)),
            kept[1][1],
            names,
            ctypes.c_void_p(counts.ctypes.data),
            ctypes.c_void_p(conflicts.ctypes.data),
        )
        try:
            text = library().ptx_findings(result).decode(errors="replace")
            printed = library().ptx_printed(result).decode(errors="replace")
        finally:
            library().ptx_result_free(result)
        findings = []
        for record in filter(None, text.split(RECORD)):
            kind, message, *numbers = record.split(FIELD)
            findings.append((kind, message, *map(int, numbers)))
        return findings, printed, counts, conflicts
