"""What limits a kernel on a GPU, and how long it takes, from its machine code and its launch alone.

Blocks. A multiprocessor (SM) holds `resident` blocks at once, by its warps, registers and shared memory
(fastlm.testing.ahead_of_time.resident_blocks). A launch of G blocks on N SMs takes ⌈G / (N·resident)⌉ waves. The last
wave has what is left, and its fill is that over N·resident.

Cycles. A pass through the main loop (fastlm.bench.sass) takes of the SM, for each warp:

    issue   instructions / 4                   four schedulers, one instruction a cycle each
    fma     32 · instructions / 128            64 on sm_80
    alu     32 · instructions / 64
    mufu    32 · instructions / 16
    lsu     bytes / 128                        shared memory and L1
    l2      bytes read / (5120 / SMs)          of global memory: what the L2 of an A100 delivers in a cycle [3]
    tensor  FLOPs / (peak / (SMs · clock))     the chip's data sheet; mma.sync on sm_90 makes 62% of it [2]

A warp waits for its products before the exp2 that need them, and the barriers of its block keep the warps in step. So
products and the rest are taken not to overlap, within a warp or between the w warps of the SM; L2 overlaps with both:

    sum   = tensor + the slowest of issue, fma, alu, mufu and lsu
    chain = 4 sum + 30 for each wait of the loop (barrier, copy, matrix product, shuffle)
    wave  = max(w · sum · passes, w · l2 · passes, chain · passes + two latencies of memory, for a block's first loads)

The passes of a block are the launch's work, in FLOPs of products or else in bytes, over what one pass of a block does.
A kernel without such a loop goes once through all of its code.

Memory. A stream reaches 90% of the data sheet's bandwidth (H200: 4.3 of 4.8 TB/s copied [1]). By Little's law the SMs
also need `bandwidth · latency` bytes asked for at any time; a load takes 600 ns under load (assumed: twice the 479
cycles of an idle H100 [2]):

    memory = max(bytes / (0.9 bandwidth), bytes read · 600 ns / (bytes in flight of a thread · resident threads))

    time   = 2 µs + max(memory, the sum of the waves, each with the warps that it has)

Where matrices are multiplied, the waves take 1 / 0.74 of that.

0.74 is calibrated: an H100 took 1.27, 1.29, 1.40 and 1.48 times the time without it for forward and backward of
attention, d 64 and 128 (LOG.md, 2026-11-26). With it, predictions of these four are 5% too long to 13% too short. It
stands for lower clocks, bank conflicts and what else is left out. Attention with dropout, whose wgmma were serialised,
took 1.5 to 1.6 times its prediction. Kernels over rows took 1.17 (gelu) and 1.26 (layer_norm) times theirs, on that
day's configurations, which were up to 1.18 slower. That products do not overlap with the rest was also chosen after
seeing those figures: with overlap between blocks the model was 1.6 to 2.3 times too fast.

The 2 µs (assumed) are a launch from a graph, its first loads and its last stores. The roofline has none of this: the
larger of bytes / bandwidth and FLOPs / peak.

Left out: hits in L2 where memory bounds, bank conflicts, clocks lowered by power, blocks of unequal length, branches
that skip part of a loop.

[1] A large copy. [2] Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv:2402.13499.
[3] NVIDIA A100 Tensor Core GPU Architecture; assumed of later chips. Throughputs of instructions: CUDA C++ Programming
Guide, "Arithmetic Instructions".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from fastlm import chip
from fastlm.bench import sass
from fastlm.testing.ahead_of_time import resident_blocks

COPY_SHARE, LATENCY, LAUNCH = 0.9, 600e-9, 2e-6
MMA_SHARE_OF_SM90 = 0.62
L2_BYTES = 5120  # a cycle
WAIT_CYCLES = 30
PRODUCTS_SHARE = 0.74
LEAST_FILL = 0.6  # of the last wave, where the launcher chooses the number of blocks
_WAITS = {"BAR", "DEPBAR", "WARPGROUP.DEPBAR", "SHFL"}


class Kernel(NamedTuple):
    """A compiled kernel as it is launched."""

    name: str
    arch: int
    warps: int  # of a block
    registers: int
    shared: int  # bytes
    blocks: int
    code: list[sass.Instruction]

    @property
    def resident(self) -> int:
        """Blocks of a multiprocessor at once."""
        return resident_blocks(self.arch, self.warps, self.registers, self.shared)


class Waves(NamedTuple):
    whole: int  # waves with every place taken
    left: int  # blocks of the wave after them
    places: int  # of a wave

    @property
    def last_fill(self) -> float:
        return self.left / self.places if self.left else 1.0

    def __str__(self) -> str:
        return f"{self.whole + self.left / self.places:.2f}"


def waves(kernel: Kernel, multiprocessors: int) -> Waves:
    places = kernel.resident * multiprocessors
    return Waves(*divmod(kernel.blocks, places), places)


def unit_cycles(work: sass.Work, arch: int, flops_of_sm: float, multiprocessors: int) -> dict[str, float]:
    """Cycles that one warp takes of each unit of a multiprocessor."""
    return {
        "issue": work.issued / 4,
        "fma": work.fma * 32 / (64 if arch == 80 else 128),
        "alu": work.alu * 32 / 64,
        "mufu": work.mufu * 32 / 16,
        "lsu": work.lsu_bytes / 128,
        "l2": work.read / (L2_BYTES / multiprocessors),
        "tensor": work.flops / flops_of_sm,
    }


def wave_cycles(
    units: dict[str, float], warps: int, waits: int, passes: float = 1.0, start: float = 0.0
) -> tuple[float, str]:
    """Of `warps` warps on a multiprocessor, and what bounds them: the slowest unit, or "latency" for the chain.

    start: cycles that a block waits for its first loads.
    """
    others = {unit: cycles for unit, cycles in units.items() if unit not in ("tensor", "l2")}
    sum_of_warp = units["tensor"] + max(others.values())
    bounds = {
        max(units, key=lambda unit: units[unit] * (unit != "l2")): warps * sum_of_warp * passes,
        "l2": warps * units["l2"] * passes,
        "latency": (4 * sum_of_warp + WAIT_CYCLES * waits) * passes + start,
    }
    bound = max(bounds, key=bounds.get)
    return bounds[bound], bound


def waits(code: list[sass.Instruction]) -> int:
    """Instructions at which a warp waits; shuffles that follow within five instructions wait together."""
    found, last = 0, -10
    for at, (_, runs, opcode, _) in enumerate(code):
        name = ".".join(opcode.split(".")[: 2 if opcode.startswith("WARPGROUP") else 1])
        if runs and name in _WAITS and (name != "SHFL" or at - last > 5):
            found += 1
            last = at if name == "SHFL" else last
    return found


class Prediction(NamedTuple):
    seconds: float
    bound: str  # a unit, "latency" of the chain, "memory", "in flight" or "launch"
    in_flight: int  # bytes of a multiprocessor
    waves: Waves
    units: dict[str, float]  # cycles of a warp's pass


def _flops_of_sm(product: str, code: list[sass.Instruction]) -> float:
    rate = chip.CHIPS[product].flops_of_sm(chip.data_sheet(product)[0])
    slow = chip.CHIPS[product].arch == 90 and any(i.opcode.startswith("HMMA") for i in code)
    return rate * (MMA_SHARE_OF_SM90 if slow else 1)


def predict(kernel: Kernel, product: str, flops: float, moved: float) -> Prediction:
    """On `product`, a key of chip.CHIPS.

    flops: of the launch's matrix products; moved: bytes that it reads and writes at least.
    """
    gpu = chip.CHIPS[product]
    loop = sass.main_loop(kernel.code)
    work, whole = sass.count(loop), sass.count(kernel.code)
    of_block = kernel.warps * (work.flops if flops else work.read + work.written)
    body, each = (loop, work) if of_block else (kernel.code, whole)
    passes = (flops or moved) / (of_block * kernel.blocks) if of_block else 1.0
    units = unit_cycles(each, kernel.arch, _flops_of_sm(product, kernel.code), gpu.multiprocessors)
    waiting = waits(body)

    filled, hertz = waves(kernel, gpu.multiprocessors), gpu.ghz * 1e9
    last = math.ceil(filled.left / gpu.multiprocessors)  # blocks on the fullest multiprocessor of the last wave
    start = 2 * LATENCY * hertz if of_block else 0.0
    whole_wave, last_wave = (
        wave_cycles(units, kernel.warps * n, waiting, passes, start) for n in (kernel.resident, last)
    )
    compute = (filled.whole * whole_wave[0] + (last_wave[0] if last else 0.0)) / hertz
    if work.flops:
        compute /= PRODUCTS_SHARE
    limit = (whole_wave if filled.whole else last_wave)[1]

    in_flight = sass.bytes_in_flight(kernel.code) * 32 * kernel.warps * kernel.resident
    stream = moved / (COPY_SHARE * gpu.bandwidth)
    if filled.whole == 0:
        in_flight = in_flight * last // kernel.resident
    moves = each.read + each.written
    little = moved * each.read / moves * LATENCY / (in_flight * gpu.multiprocessors) if moves and in_flight else 0.0

    times = {limit: compute, "memory": stream, "in flight": little}
    bound = max(times, key=times.get)
    seconds = LAUNCH + times[bound]
    return Prediction(seconds, bound if times[bound] > LAUNCH else "launch", in_flight, filled, units)


def roofline(product: str, flops: float, moved: float) -> float:
    """Seconds at the data sheet's rates."""
    return max(moved / chip.CHIPS[product].bandwidth, flops / chip.data_sheet(product)[0])


def executed_pairs(
    lengths: Iterable[int], tile: int, *, causal: bool = False, left: int | None = None, packed: bool = False
) -> int:
    """Query-key pairs that attention's tiles of `tile` queries cover, for sequences with as many keys as queries.

    A tile runs over the keys that any of its queries sees. packed: tiles run over all sequences back to back, else each
    sequence has its own. left: keys before a query that it sees.
    """
    starts, total, pairs = [], 0, 0
    for length in lengths:
        starts.append((total, total + length))
        total += length

    def keys(first: int, last: int, spans: list[tuple[int, int]]) -> int:
        low, high = spans[0][0], spans[-1][1]
        if causal:
            high = min(high, last)
        return high - (low if left is None else max(low, first - left))

    if packed:
        for first in range(0, total, tile):
            last = min(total, first + tile)
            spans = [span for span in starts if span[0] < last and span[1] > first]
            pairs += tile * keys(first, last, spans)
        return pairs
    for span in starts:
        pairs += sum(tile * keys(first, min(span[1], first + tile), [span]) for first in range(*span, tile))
    return pairs


def format_units(units: dict[str, float]) -> str:
    return " ".join(f"{unit}:{cycles:.0f}" for unit, cycles in units.items() if cycles >= 0.5)
