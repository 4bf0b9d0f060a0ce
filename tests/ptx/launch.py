"""run(ptx, entry, grid, block, args): a kernel launch over NumPy arrays or CPU tensors, in place."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import weakref
from collections import Counter
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch

from ptx.decode import Program
from ptx.parse import PtxError, parse
from ptx.rules import decode
from ptx.tensor_map import TensorMap

UNWRITTEN, WRITTEN, HOLE = 0, 1, 4  # core.h
FILLING = np.array([0xC5, 0xFF], np.uint8)  # NaN in every floating-point type; no likely integer
TENSORS = 0x5000_0000_0000  # device address of the first tensor
ALIGNMENT = 512  # of an allocation, as torch's allocator gives it on a device
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}  # of a block
GRID_LIMIT, BLOCK_LIMIT, CLUSTER_LIMIT = (2**31 - 1, 65535, 65535), (1024, 1024, 64), (8, 8, 8)
FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}  # parameters that take any Python number

MOST_WARPS = 128  # of a cluster (core.h)
CHIPS = (None, "high", "low", "scattered")  # core.h: Chip

FINDINGS = (
    "bounds",
    "alignment",
    "uninitialised",
    "race",
    "async",
    "divergence",
    "unset register",
    "assert",
    "trap",
    "timeout",
)


@dataclass(frozen=True)
class Finding:
    """What one thread did wrong. `kind` is one of FINDINGS; `count` is how often this instruction did."""

    kind: str
    kernel: str
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    instruction: str
    location: str
    message: str
    origin: str = ""
    count: int = 1

    def __str__(self) -> str:
        where = f" at {self.location}" if self.location else ""
        origin = f"\n    the other: {self.origin}" if self.origin else ""
        return (
            f"{self.kind}: {self.kernel}, block {self.block}, thread {self.thread}{where}: {self.message}\n"
            f"    {self.instruction}{origin}"
        )


class KernelFault(Exception):
    """A launch did something that a kernel must not do. `findings` holds it."""

    def __init__(self, findings: list[Finding]):
        super().__init__("\n".join(map(str, findings)))
        self.findings = findings


@dataclass
class Report:
    """What a launch did: how often each opcode ran (per warp), what it printed, what was found.

    bank_conflicts: extra shared-memory wavefronts by source line, where asked for.
    """

    instructions: Counter
    printed: str
    findings: list[Finding] = field(default_factory=list)
    bank_conflicts: Counter = field(default_factory=Counter)

    def count(self, opcode: str) -> int:
        """Executions of an opcode with all its modifiers: count("mma"), count("ld.global")."""
        return sum(n for text, n in self.instructions.items() if text == opcode or text.startswith(opcode + "."))


# ---- memory --------------------------------------------------------------------------------------------------------

_unwritten: dict[int, np.ndarray] = {}  # id of an allocation's owner -> a state per byte


def _filling(begin: int, end: int) -> np.ndarray:
    """FILLING over and over, bytes [begin, end) of it."""
    return np.full(end // 2 + 1, FILLING.view(np.uint16)[0]).view(np.uint8)[begin:end]


def _owner(array) -> tuple[object, int, int]:
    """The object that owns an array's memory, its address and its bytes."""
    if isinstance(array, torch.Tensor):
        storage = array.untyped_storage()
        return storage, storage.data_ptr(), storage.nbytes()
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array, array.ctypes.data, array.nbytes


def uninitialised(array):
    """Marks the memory of an array or CPU tensor as never written, fills it with NaN, returns it.

    A kernel that reads it before something wrote it is at fault. What no kernel wrote, but no longer holds the filling
    when a kernel starts, was written by the host. The mark lives as long as the memory does.
    """
    owner, address, size = _owner(array)
    _bytes_at(address, size)[:] = _filling(0, size)
    _unwritten[id(owner)] = np.zeros(size, np.uint8)
    weakref.finalize(owner, _unwritten.pop, id(owner), None)
    return array


def _bytes_at(address: int, size: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)) if size else np.empty(0, np.uint8)


def _geometry(array) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    """Address, bytes of an element, shape, strides in bytes."""
    if isinstance(array, torch.Tensor):
        item = array.element_size()
        return array.data_ptr(), item, tuple(array.shape), tuple(stride * item for stride in array.stride())
    return array.ctypes.data, array.itemsize, array.shape, array.strides


class _Memory:
    """Device addresses of a launch's tensors, and the regions that the core may touch."""

    def __init__(self, identity: bool = False):
        self.identity = identity  # device addresses are the host's
        self.owners: dict[int, tuple[object, int, int]] = {}  # id -> owner, host address, device address
        self.regions: dict[int, list] = {}
        self.next = TENSORS
        self.keep: list = []

    def place(self, array, name: str) -> int:
        """The device address of a tensor, whose elements become accessible."""
        owner, host, size = _owner(array)
        address, item, shape, strides = _geometry(array)
        if id(owner) not in self.owners:
            self.owners[id(owner)] = (owner, host, host if self.identity else self.next)
            self.regions[id(owner)] = []
            self.next += -(-(size + 2 * ALIGNMENT) // ALIGNMENT) * ALIGNMENT
        if prod(shape):
            if any(stride < 0 for stride in strides):
                raise ValueError(f"{name}: negative strides do not exist on a device; make it contiguous")
            end = address + sum((n - 1) * stride for n, stride in zip(shape, strides)) + item
            writable = array.flags.writeable if isinstance(array, np.ndarray) else True
            self.regions[id(owner)].append((address, end, item, shape, strides, writable, name))
        else:
            address = host  # torch says 0 for an empty tensor, whatever its storage
        return self.owners[id(owner)][2] + address - host

    @staticmethod
    def find_host_writes(tracked: np.ndarray, host: int, group: list) -> None:
        """Elements that no longer hold the filling have been written."""
        begin, end = group[0][0] - host, max(region[1] for region in group) - host
        held = _bytes_at(host + begin, end - begin) == _filling(begin, end)
        if any(size == 1 for _, _, size, *_ in group):
            # One byte may hold the filling by chance: the host wrote it if it wrote another of the eight around it.
            written = np.zeros(end // 8 + 1, bool)
            written[(begin + np.flatnonzero(~held & (tracked[begin:end] == UNWRITTEN))) // 8] = True
            held &= ~written[np.arange(begin, end) // 8]
        for address, _, size, shape, strides, _, _ in group:
            at = address - host
            elements = np.lib.stride_tricks.as_strided(tracked[at:], (*shape, size), (*strides, 1))
            same = np.lib.stride_tricks.as_strided(held[at - begin :], (*shape, size), (*strides, 1))
            elements[~same.all(-1)] = WRITTEN

    def buffers(self) -> tuple[list[tuple], list]:
        """Arguments of the core, and what to write back into the states afterwards."""
        out, back = [], []
        for key, regions in self.regions.items():
            owner, host, device = self.owners[key]
            tracked = _unwritten.get(id(owner))
            for group in _overlapping(regions):
                begin, end = group[0][0], max(region[1] for region in group)
                names = "/".join(dict.fromkeys(region[6] for region in group))
                item = min(region[2] for region in group)
                state = None
                if tracked is not None:
                    self.find_host_writes(tracked, host, group)
                if tracked is not None or not any(_is_dense(region) for region in group):
                    state = np.full(end - begin, HOLE, np.uint8)
                    for address, _, size, shape, strides, _, _ in group:
                        elements = np.lib.stride_tricks.as_strided(
                            state[address - begin :], (*shape, size), (*strides, 1), writeable=True
                        )
                        if tracked is None:
                            elements[...] = WRITTEN
                        else:
                            elements[...] = np.lib.stride_tricks.as_strided(
                                tracked[address - host :], (*shape, size), (*strides, 1)
                            )
                    if tracked is not None:
                        back.append((tracked[begin - host : end - host], state))
                    self.keep.append(state)
                shift = {1: 0, 2: 1}.get(item, 2)
                writable = all(region[5] for region in group)
                pointer = 0 if state is None else state.ctypes.data
                out.append((device + begin - host, end - begin, begin, pointer, writable, shift, names))
        return out, back


def _is_dense(region) -> bool:
    begin, end, item, shape, *_ = region
    return prod(shape) * item == end - begin


def _overlapping(regions: list) -> list[list]:
    """Regions in order, those that share bytes together."""
    groups, end = [], -1
    for region in sorted(regions, key=lambda region: region[:2]):
        if region[0] < end:
            groups[-1].append(region)
        else:
            groups.append([region])
        end = max(end, region[1])
    return groups


# ---- arguments -----------------------------------------------------------------------------------------------------


def _pack(program: Program, args, names: list[str], memory: _Memory) -> bytes:
    """The bytes of the kernel's parameters."""
    if len(args) != len(program.parameters):
        raise ValueError(
            f"{program.entry} takes {len(program.parameters)} arguments "
            f"({', '.join(f'.{v.type} {v.name}' for v, _ in program.parameters)}), got {len(args)}"
        )
    out = bytearray(program.parameter_bytes)
    for k, ((variable, offset), value) in enumerate(zip(program.parameters, args)):
        name, size = names[k] if k < len(names) else f"argument {k}", variable.bytes
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            raise ValueError(f"{name}: expected a CPU tensor, got one on {value.device}")
        if isinstance(value, (torch.Tensor, np.ndarray)):
            data = memory.place(value, name).to_bytes(8, "little")
        elif isinstance(value, TensorMap):
            data = value.encode(memory.place(value.tensor, name))
        elif value is None:
            data = bytes(8)
        elif isinstance(value, np.generic):
            data = value.tobytes()
        elif isinstance(value, (bytes, bytearray)):
            data = bytes(value)
        elif variable.type in FLOATS:
            with np.errstate(over="ignore"):  # to infinity, as the host's cast does
                data = FLOATS[variable.type](value).tobytes()
        elif isinstance(value, float):
            raise ValueError(f"{name}: .{variable.type} {variable.name} is no floating-point type, got {value!r}")
        else:
            data = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        if len(data) != size:
            raise ValueError(f"{name}: .{variable.type} {variable.name} has {size} bytes, got {value!r} of {len(data)}")
        out[offset : offset + size] = data
    return bytes(out)


_ENTRY = re.compile(  # a brace at the beginning of a line may end an asm statement of the source, too
    r"^(?:\.(?:visible|weak)\s+)?\.entry\s+([\w$]+).*?^\}$(?!\n\s*// end inline asm)", re.MULTILINE | re.DOTALL
)


def _without_others(ptx: str, entry: str) -> str:
    """Of several modules, one after the other, that of a kernel, less its other kernels.

    Those of a file with a hundred instantiations take seconds to parse, and every module numbers its files anew.
    """
    head, *modules = re.split(r"^(?=\.version)", ptx, flags=re.MULTILINE)
    for module in [head + "".join(modules[:1]), *modules[1:]]:
        if any(match[1] == entry for match in _ENTRY.finditer(module)):
            return _ENTRY.sub(lambda match: match[0] if match[1] == entry else "", module)
    return ptx


@functools.lru_cache(maxsize=256)
def load(ptx: str, entry: str | None = None) -> Program:
    """Parses and decodes a kernel, once. `entry` may be left out if the module has one kernel.

    Raises UnknownInstruction for what the interpreter does not know, PtxError for what it cannot read.
    """
    module = parse(ptx if entry is None else _without_others(ptx, entry))
    if entry is None:
        kernels = [name for name, function in module.functions.items() if function.is_entry and function.defined]
        if len(kernels) != 1:
            raise PtxError(f"name the kernel: the module has {kernels}")
        entry = kernels[0]
    return decode(module, entry)


def _triple(value, what: str, limits: tuple[int, int, int]) -> tuple[int, int, int]:
    value = (value,) if isinstance(value, int) else tuple(value)
    if not 1 <= len(value) <= 3 or any(not 1 <= int(n) <= limit for n, limit in zip(value, limits)):
        raise ValueError(f"{what}: expected one to three positive integers, at most {limits}, got {value}")
    return (*(int(n) for n in value), 1, 1)[:3]


def _cluster(program: Program, cluster, grid: tuple[int, ...], threads: int) -> tuple[int, int, int]:
    """The blocks of a cluster: what the kernel demands, what the launch asks for, or one."""
    required = program.cluster and _triple(program.cluster, "cluster", CLUSTER_LIMIT)
    if cluster is None:
        cluster = required or (1, 1, 1)
    cluster = _triple(cluster, "cluster", CLUSTER_LIMIT)
    if required and cluster != required:
        raise ValueError(f"cluster: {program.entry} requires {required}, got {cluster}")
    if prod(cluster) > 1 and program.arch < 90:
        raise ValueError(f"cluster: sm_{program.arch} has none, got {cluster}")
    if prod(cluster) > 8 or prod(cluster) * -(-threads // 32) > MOST_WARPS:
        raise ValueError(
            f"cluster: expected at most 8 blocks and {32 * MOST_WARPS} threads, got {cluster} of {threads} threads"
        )
    if any(n % k for n, k in zip(grid, cluster)):
        raise ValueError(f"grid: expected a multiple of the cluster {cluster}, got {grid}")
    return cluster


def _index(number: int, extent: tuple[int, int, int]) -> tuple[int, int, int]:
    return number % extent[0], number // extent[0] % extent[1], number // extent[0] // extent[1]


def _describe(program: Program, grid, block, found) -> Finding:
    kind, message, pc, block_number, thread, register, origin, count = found

    def place(match):
        at = int(match[1])
        return f"`{program.instructions[at]}`" + (f" ({program.locations[at]})" if program.locations[at] else "")

    message = message.replace("$reg$", program.registers[register] if register >= 0 else "")
    message = re.sub(r"\$pc(\d+)\$", place, message)
    location = str(program.locations[pc] or "")
    other = "" if origin < 0 else place({1: origin})
    return Finding(
        kind,
        program.entry,
        _index(block_number, grid),
        _index(thread, block),
        program.instructions[pc],
        location,
        message,
        other,
        count,
    )


def run(
    ptx: str | Program,
    entry: str | None,
    grid,
    block,
    args=(),
    *,
    shared_bytes: int = 0,
    cluster=None,
    workers: int | None = None,
    max_instructions: int = 100_000_000,
    max_findings: int = 1,
    check: bool = True,
    races: bool = True,
    bank_conflicts: bool = False,
    chip: str | None = None,
    memory=None,
    names=(),
) -> Report:
    """Launches a kernel and waits for it. Tensors among `args` are read and written in place.

    ptx: text, or what `load` made of it. grid, block: one to three integers.
    args: one value per parameter. NumPy arrays and CPU tensors are pointers, None is the null pointer; Python numbers
    take the parameter's type, a TensorMap is one of 128 bytes; NumPy scalars and bytes (a struct) must have its size.
    shared_bytes: dynamic shared memory. max_instructions: of one block, or cluster, in warp
    instructions, before it counts as hung. cluster: one to three integers, its blocks; the kernel may demand its own.
    Blocks run on `workers` threads (all processors); in order on one where they meet through global atomics, and once
    more so if anything is found: neither results nor findings depend on it.
    memory: tensors at their own addresses, for `args` that are the parameters' bytes with these addresses in them.
    names: of the arguments, for messages.
    chip: None, arithmetic as close as can be where PTX leaves it open. Else approximations are off by the most that the
    ISA allows, all "high", all "low" or "scattered" between, and mma truncates its sums as sm_80 does.
    check: raise KernelFault at the first finding. check=False with max_findings > 1 collects them in the report.
    """
    program = ptx if isinstance(ptx, Program) else load(ptx, entry)
    grid, block = _triple(grid, "grid", GRID_LIMIT), _triple(block, "block", BLOCK_LIMIT)
    threads = prod(block)
    if threads > 1024:
        raise ValueError(f"block: at most 1024 threads, got {block}")
    if program.required_threads and prod(program.required_threads) != threads:
        raise ValueError(f"block: {program.entry} requires {program.required_threads} threads, got {block}")
    limit = SHARED_LIMITS[90 if program.arch >= 90 else 80]
    if program.static_shared + shared_bytes > limit:
        raise ValueError(
            f"shared_bytes: {program.static_shared} static and {shared_bytes} dynamic: over sm_{program.arch}'s {limit}"
        )
    place = _Memory(identity=memory is not None)
    if memory is None:
        params = _pack(program, args, list(names), place)
    else:
        params = bytes(args)
        if len(params) != program.parameter_bytes:
            raise ValueError(
                f"args: {program.entry} has {program.parameter_bytes} bytes of parameters, got {len(params)}"
            )
        for k, tensor in enumerate(memory):
            place.place(tensor, f"tensor {k}")
    buffers, back = place.buffers()
    for name, address, data, constant in program.variables:
        array = np.frombuffer(bytearray(data), np.uint8)
        place.keep.append(array)
        buffers.append((address, len(data), array.ctypes.data, 0, not constant, 0, name))
    buffers.sort()
    if program.ordered:
        workers = 1
    config = [
        *grid,
        *block,
        shared_bytes,
        workers or os.cpu_count() or 1,
        max_instructions,
        max_findings,
        races,
        bank_conflicts,
        CHIPS.index(chip),
        *_cluster(program, cluster, grid, threads),
    ]
    found, printed, counts, extra = program.native.launch(config, params, buffers)
    for tracked, state in back:
        np.copyto(tracked, state, where=state != HOLE)
    findings = [_describe(program, grid, block, f) for f in found]
    if max_findings == 1:
        findings = sorted(findings, key=lambda f: f.block[::-1])[:1]
    if findings and check:
        raise KernelFault(findings)
    executed, conflicts = Counter(), Counter()
    for text, n in zip(program.instructions, counts.tolist()):
        executed[text.split(" ")[1 if text.startswith("@") else 0]] += n
    for location, n in zip(program.locations, extra.tolist()):
        if n:
            conflicts[str(location or "")] += n
    return Report(executed, printed, findings, conflicts)
