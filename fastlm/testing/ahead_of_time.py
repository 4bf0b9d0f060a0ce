"""Compiles the Triton kernels that a call launches, for any architecture, on a machine without a GPU.

    with compile_for(90) as kernels:
        ops.layer_norm(x, backend="triton")       # CPU tensors; every launch compiles, none runs
    kernels[0].resources().registers

The launchers decide what is compiled, so these are a device's configurations. Outputs stay as they were allocated.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

# Shared memory that one block may have, bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"; and warps and registers of a multiprocessor.
SHARED_OF_BLOCK = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
SHARED_OF_SM = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
WARPS_OF_SM = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
BLOCKS_OF_SM = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
REGISTERS_OF_SM = 65536


@dataclass(frozen=True)
class Resources:
    """Of a kernel, by ptxas: registers a thread, bytes of spills a thread, bytes of shared memory a block."""

    registers: int
    spills: int
    shared: int


def resident_blocks(arch: int, warps: int, registers: int, shared: int) -> int:
    """Blocks of so many warps, registers a thread and bytes of shared memory that a multiprocessor holds at once."""
    return min(
        BLOCKS_OF_SM[arch],
        WARPS_OF_SM[arch] // warps,
        REGISTERS_OF_SM // (-(-registers // 8) * 8 * 32 * warps),  # handed out to warps in units of 256
        SHARED_OF_SM[arch] // (shared + 1024),  # 1 kB of a block's is the system's
    )


def occupancy(arch: int, warps: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's warps that such blocks make resident."""
    return resident_blocks(arch, warps, registers, shared) * warps / WARPS_OF_SM[arch]


def serialised(log: str) -> list[str]:
    """The warnings C7510 to C7519 in what ptxas printed."""
    return sorted(set(re.findall(r"\b(C751\d)\b", log)))


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for sm_`arch`."""

    name: str
    arch: int
    num_warps: int
    shared: int
    ptx: str
    cubin: bytes
    blocks: list[int] = field(default_factory=list, compare=False)  # of each launch

    def warnings(self) -> list[str]:
        """What ptxas says of wgmma that it has to serialise, "C7510" to "C7519": none overlaps with anything then.

        Triton drops what ptxas prints, and its cache has no log. So kernels with wgmma are assembled once more.
        """
        from triton import knobs

        if "wgmma." not in self.ptx:
            return []
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory, "kernel.ptx")
            source.write_text(self.ptx)
            command = [
                knobs.nvidia.ptxas.path,
                "-v",
                f"--gpu-name=sm_{self.arch}a",
                source,
                "-o",
                source.with_suffix(".o"),
            ]
            log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return serialised(log)

    def sass(self) -> str:
        """The machine code, as cuobjdump prints it."""
        return self._cuobjdump("--dump-sass").split(f"Function : {self.name}\n")[1]

    def _cuobjdump(self, option: str) -> str:
        from triton import knobs

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def resources(self) -> Resources:
        text = self._cuobjdump("--dump-resource-usage")
        used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text.split(f"Function {self.name}:")[1]))
        return Resources(int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"]), self.shared)

    def occupancy(self, resources: Resources) -> float:
        """Share of a multiprocessor's warps that can be resident."""
        return occupancy(self.arch, self.num_warps, resources.registers, self.shared)

    def matrix_instruction(self) -> str:
        """ "tcgen05", "wgmma", "mma" or "": what multiplies matrices."""
        for word in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
            if word in self.ptx:
                return word.split(".")[0]
        return ""

    def load_bytes(self) -> dict[int, int]:
        """How many instructions load 1, 2, 4, 8 or 16 bytes from global memory."""
        counts: dict[int, int] = {}
        for vector, bits in re.findall(r"\bld\.global(?:\.[\w:]+)*?(?:\.v([248]))?\.[bfsu](\d+)\b", self.ptx):
            size = int(vector or 1) * int(bits) // 8
            counts[size] = counts.get(size, 0) + 1
        for size in re.findall(r"cp\.async\.c[ag]\.shared\.global\s+\[[^\]]*\],\s*\[[^\]]*\],\s*(0x\w+|\d+)", self.ptx):
            counts[int(size, 0)] = counts.get(int(size, 0), 0) + 1
        return dict(sorted(counts.items()))


class _Driver:
    """Triton's driver interface for a device that is not there."""

    def __init__(self, arch: int, compiled: list[Compiled]):
        self.arch, self.compiled, self.metadata, self.blocks = arch, compiled, None, None
        self.utils = self  # load_binary, get_device_properties
        self.launcher_cls = self.launcher

    # Triton keeps loaded kernels per device; each of these drivers is a device of its own.
    def get_current_device(self):
        return id(self)

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, device):
        shared = SHARED_OF_BLOCK[self.arch]
        return {"max_shared_mem": shared, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": REGISTERS_OF_SM}

    def get_benchmarker(self):
        raise ValueError("autotuning needs a device: give the kernel one configuration")

    def load_binary(self, name, binary, shared, device):
        """module, function, registers, spills, threads of a block"""
        return self, None, 0, 0, 1024

    def launcher(self, source, metadata):
        self.metadata, blocks = metadata, []
        self.blocks = blocks  # both of the kernel whose loading `collect` hears of next
        return lambda x, y, z, *args: blocks.append(x * y * z)

    def collect(self, module, function, name, metadata_group, hash):
        files = {Path(name).suffix: Path(path) for name, path in metadata_group.items()}
        m = self.metadata
        ptx, cubin = files[".ptx"].read_text(), files[".cubin"].read_bytes()
        self.compiled.append(Compiled(name, self.arch, m.num_warps, m.shared, ptx, cubin, self.blocks))


@contextlib.contextmanager
def compile_for(arch: int):
    """Every Triton launch inside is compiled for sm_`arch`, and nothing is run. Yields the list of Compiled, growing.

    Raises triton's OutOfResources where a kernel asks for more shared memory than a block of that architecture has, and
    ValueError for an architecture that SHARED_OF_BLOCK lacks.
    """
    from triton import knobs
    from triton.runtime.driver import driver

    if arch not in SHARED_OF_BLOCK:
        raise ValueError(f"arch: expected one of {sorted(SHARED_OF_BLOCK)}, got {arch}")
    compiled: list[Compiled] = []
    before, stand_in = driver._active, _Driver(arch, compiled)
    driver.set_active(stand_in)
    knobs.runtime.kernel_load_end_hook.add(stand_in.collect)
    try:
        yield compiled
    finally:
        knobs.runtime.kernel_load_end_hook.remove(stand_in.collect)
        driver._active = before
