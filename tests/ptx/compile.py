"""PTX from nvcc and from Triton, cached in the directory of `native.cache_directory`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from ptx.native import cache_directory, once

ARCH = 80


@functools.lru_cache(maxsize=1)
def nvcc() -> str | None:
    """The CUDA compiler: CUDA_HOME's, else that on PATH, else None."""
    home = os.environ.get("CUDA_HOME")
    if home and Path(home, "bin", "nvcc").exists():
        return str(Path(home, "bin", "nvcc"))
    return shutil.which("nvcc")


@functools.lru_cache(maxsize=1)
def _nvcc_version() -> str:
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def compile_cuda(
    source: str | Path, defines: tuple[str, ...] = (), includes: tuple[str, ...] = (), arch: int = ARCH
) -> str:
    """PTX of CUDA C++, with source lines.

    source: the path of a .cu file, or its text. defines: ("BLOCK=128", "CAUSAL"). Headers count for the cache by what
    the compiler finds, as preprocessed. Raises ValueError with the compiler's words if it does not compile, or if there
    is no nvcc.
    """
    if nvcc() is None:
        raise ValueError("compile_cuda: nvcc is not on PATH; install the CUDA toolkit or set CUDA_HOME")
    text = str(source)
    is_path = "\n" not in text and Path(text).suffix in (".cu", ".cuh", ".h")
    options = [
        f"-arch=sm_{arch}",
        "-std=c++17",
        "-lineinfo",
        *(f"-D{d}" for d in defines),
        *(f"-I{i}" for i in includes),
    ]
    key = hashlib.sha256("\n".join([_nvcc_version(), *options]).encode())
    directory = cache_directory() / "cuda"
    directory.mkdir(exist_ok=True)
    if is_path:
        path = Path(text).resolve()
    else:
        path = directory / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.cu"
        path.write_text(text)
    # Preprocessing every time would cost as much as compiling: the file and the headers beside it stand for it.
    key.update(str(path).encode())
    for file in _local_includes(path, (path.parent, *map(Path, includes))):
        key.update(file.read_bytes())
    out = directory / f"{path.stem}-{key.hexdigest()[:16]}.ptx"
    with once(out) as missing:
        if missing:
            scratch = out.with_suffix(".tmp")
            command = [nvcc(), "-ptx", *options, str(path), "-o", str(scratch)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"compile_cuda: {path} does not compile:\n{done.stderr}")
            scratch.replace(out)
    return out.read_text()


def _local_includes(path: Path, directories: tuple[Path, ...]) -> list[Path]:
    """A file and the headers that it includes from `directories`, and they in turn."""
    found, queue = [], [path]
    while queue:
        file = queue.pop()
        if file in found:
            continue
        found.append(file)
        for name in re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', file.read_text(), re.M):
            for directory in (file.parent, *directories):
                if (directory / name).is_file():
                    queue.append((directory / name).resolve())
                    break
    return found


# ---- Triton --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompiledTriton:
    """A Triton kernel: its PTX, and what its launch needs."""

    ptx: str
    entry: str
    num_warps: int
    shared_bytes: int

    @property
    def block(self) -> int:
        return 32 * self.num_warps


class _Stages:
    """Triton's hook on its compiler: the last stage hands PTX on, so that ptxas is not needed and its time is saved."""

    def __call__(self, *args):
        if not args:  # asked for what distinguishes this pipeline in the cache
            return "ptx", "ptx"
        stages = args[1]
        stages["cubin"] = lambda ptx, metadata: ptx.encode()


@contextlib.contextmanager
def ptx_pipeline():
    """Triton compiles to PTX alone, into a cache of its own.

    Triton's key leaves out where a kernel's source lies; `.loc` names that in PTX, so here the key has it.
    """
    from triton import knobs
    from triton.compiler import ASTSource

    def hash_with_path(source, of_source=ASTSource.hash):
        path = os.path.abspath(source.fn.fn.__code__.co_filename)
        return hashlib.sha256(f"{of_source(source)} {path}".encode()).hexdigest()

    before = knobs.runtime.add_stages_inspection_hook
    with knobs.cache.scope(), mock.patch.object(ASTSource, "hash", hash_with_path):
        knobs.cache.dir = str(cache_directory() / "triton")
        knobs.runtime.add_stages_inspection_hook = _Stages()
        try:
            yield
        finally:
            knobs.runtime.add_stages_inspection_hook = before


def compile_triton(
    kernel,
    signature: dict[str, str],
    constexprs: dict[str, object],
    num_warps: int = 4,
    num_stages: int = 3,
    arch: int = ARCH,
    **options,
) -> CompiledTriton:
    """PTX of a @triton.jit function for sm_`arch`.

    signature: types of the other arguments by name, {"x_ptr": "*bf16", "n": "i32"}. Pointers are taken to be aligned to
    16 bytes, as a launch finds them; "i32:16" says that an integer is divisible by 16. options: debug=True, ...
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types, attributes = {}, {}
    for k, name in enumerate(kernel.arg_names):
        if name in constexprs:
            types[name] = "constexpr"
            continue
        if name not in signature:
            raise ValueError(
                f"compile_triton: argument {name} of {kernel.__name__} is in neither signature nor constexprs"
            )
        types[name], _, divisor = signature[name].partition(":")
        if types[name].startswith("*") or divisor:
            attributes[(k,)] = [["tt.divisibility", 16]]
    with ptx_pipeline():
        source = ASTSource(fn=kernel, signature=types, constexprs=constexprs, attrs=attributes)
        target = GPUTarget("cuda", arch, 32)
        compiled = compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages, **options})
    metadata = compiled.metadata
    return CompiledTriton(compiled.asm["ptx"], metadata.name, metadata.num_warps, metadata.shared)
