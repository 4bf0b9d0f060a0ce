"""What a kernel's machine code (SASS, as cuobjdump prints it) asks of a multiprocessor.

    code = parse(text)
    work = count(main_loop(code) or code)      # of one warp, each pass

The main loop is the innermost loop with the most matrix FLOPs or, where nothing multiplies matrices, with the most
bytes loaded from and stored to global memory. Every instruction of it counts as executed: one that a branch inside the
loop skips makes the count too high. `@!PT`, which never holds, takes an issue slot and nothing else.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    runs: bool  # False under @!PT
    opcode: str  # "LDG.E.128.CONSTANT"
    operands: str


class Work(NamedTuple):
    """Of one warp over a stretch of code."""

    issued: int = 0  # instructions
    fma: int = 0  # float32 additions, products and FMA; an integer IMAD counts twice, at half their rate
    alu: int = 0  # integers, logic, comparisons, conversions, selections
    mufu: int = 0  # exp2, log2, reciprocals, roots; conversions between widths of integers and floats
    lsu_bytes: int = 0  # that all its lanes load, store or exchange, in shared and global memory
    flops: float = 0  # of matrix products
    read: int = 0  # bytes from global memory, of all lanes
    written: int = 0  # bytes to it


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d])\s+)?([A-Z][\w.]*)\s*([^;]*);")
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_HMMA = {"16816": 4096, "1688": 2048, "1684": 1024, "16832": 8192}  # FLOPs: 2 m n k
_FMA = {"FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FADD2", "FMUL2"}
_MUFU = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"}
# Neither lane arithmetic nor memory: control, waits, barriers, matrix products.
_OTHER = {"BRA", "EXIT", "NOP", "BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "WARPSYNC", "BSSY", "BSYNC", "HGMMA", "HMMA"}
_OTHER |= {"MEMBAR", "FENCE", "S2R", "S2UR", "CS2R", "R2UR", "LDC", "ULDC", "ERRBAR", "CCTL", "SYNCS", "RET", "CALL"}
_GLOBAL = {"LDG", "STG", "LDGSTS", "LD", "ST"}
_MEMORY = _GLOBAL | {"LDS", "STS", "LDSM", "STSM", "SHFL", "LDL", "STL", "RED", "ATOM", "ATOMG", "ATOMS"}


def parse(text: str) -> list[Instruction]:
    """The instructions of one function, up to the padding behind its last branch to itself."""
    found = []
    for address, guard, opcode, operands in _LINE.findall(text):
        found.append(Instruction(int(address, 16), guard != "!PT", opcode, operands.strip()))
    return found


def _target(instruction: Instruction) -> int | None:
    match = re.search(r"0x([0-9a-f]+)", instruction.operands) if instruction.opcode.startswith("BRA") else None
    return int(match[1], 16) if match else None


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The stretches that a branch backwards repeats."""
    found = []
    for last, instruction in enumerate(code):
        target = _target(instruction)
        if target is not None and target < instruction.address:
            first = next(i for i, other in enumerate(code) if other.address >= target)
            found.append(code[first : last + 1])
    return found


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """See above; [] without a loop that multiplies matrices or moves global memory."""
    found = [(loop, count(loop)) for loop in loops(code)]

    def weight(work: Work) -> float:
        return work.flops if any(other.flops for _, other in found) else work.read + work.written

    working = [(loop, work) for loop, work in found if weight(work)]
    innermost = [
        (loop, work)
        for loop, work in working
        if not any(
            inner is not loop and loop[0].address <= inner[0].address and inner[-1].address <= loop[-1].address
            for inner, _ in working
        )
    ]
    # Of equals the shorter: attention's loop without the mask.
    return max(innermost, key=lambda pair: (weight(pair[1]), -len(pair[0])))[0] if innermost else []


def width(opcode: str) -> int:
    """Bytes of a lane that a memory instruction moves."""
    words = opcode.split(".")
    if words[0] in ("LDSM", "STSM"):
        return 4 * int(words[-1]) if words[-1] in ("2", "4") else 4
    return next((_BITS[word] // 8 for word in words if word in _BITS), 4)


def matrix_flops(opcode: str) -> float:
    """Of one warp; wgmma's are of four warps together."""
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        return 2 * int(match[1]) * int(match[2]) * int(match[3]) / 4
    match = re.match(r"HMMA\.(\d+)", opcode)
    return _HMMA[match[1]] if match else 0


def count(code: list[Instruction]) -> Work:
    fma = alu = mufu = lsu = read = written = 0
    flops = 0.0
    for _, runs, opcode, _ in code:
        name = opcode.split(".")[0]
        if not runs:
            continue
        if name in _MEMORY:
            # Two bytes of a lane take the path as four do.
            lsu += 32 * max(4, width(opcode))
            if name in ("LDG", "LD", "LDGSTS"):
                read += 32 * width(opcode)
            if name in ("STG", "ST"):
                written += 32 * width(opcode)
        elif name in _FMA or name == "IMAD":
            fma += 1 + (name == "IMAD")
        elif name in _MUFU:
            mufu += 1
        elif name in ("HGMMA", "HMMA"):
            flops += matrix_flops(opcode)
        elif name not in _OTHER and not name.startswith("U"):  # U: the path that a warp has once, not per lane
            alu += 1
    return Work(len(code), fma, alu, mufu, lsu, flops, read, written)


def _registers(operand: str, size: int) -> set[int]:
    """The registers of a load's destination; size: bytes."""
    match = re.match(r"R(\d+)", operand)
    return set(range(int(match[1]), int(match[1]) + max(1, size // 4))) if match else set()


_NAMED = re.compile(r"\bR(\d+)(\.64)?")


def _named(operands: str) -> set[int]:
    """The registers that an instruction names; of R2.64 two."""
    found = set()
    for number, wide in _NAMED.findall(operands):
        found.add(int(number))
        if wide:
            found.add(int(number) + 1)
    return found


def bytes_in_flight(code: list[Instruction]) -> int:
    """The most bytes that one thread has asked global memory for before it waits for the first of them.

    A load to registers is out until an instruction names one of its registers; then the loads before it are back too. A
    copy to shared memory (LDGSTS) is out until DEPBAR.LE SB0 allows no more groups than are younger. The main loop is
    read twice, so that what it loads ahead for its next pass counts.
    """
    loop = main_loop(code)
    if loop:
        last = loop[-1].address
        after = [i for i in code if i.address > last]
        code = [i for i in code if i.address <= last] + loop + after
    loads: list[tuple[set[int], int]] = []  # to registers, in order
    groups, most = [0], 0  # of copies to shared memory: closed ones, and the open one last
    for _, runs, opcode, operands in code:
        if not runs:
            continue
        if loads:
            named = _named(operands)
            touched = [i for i, (registers, _) in enumerate(loads) if registers & named]
            if touched:
                loads = loads[touched[-1] + 1 :]
        name = opcode.split(".", 1)[0]
        if name in ("LDG", "LD"):
            size = width(opcode)
            loads.append((_registers(re.sub(r"^P\d+, *", "", operands), size), size))
        elif name == "LDGSTS":
            groups[-1] += width(opcode)
        elif name == "LDGDEPBAR":
            groups.append(0)
        elif name == "DEPBAR" and (match := re.search(r"SB0, 0x([0-9a-f]+)", operands)):
            closed, kept = groups[:-1], int(match[1], 16)
            groups = closed[max(0, len(closed) - kept) :] + groups[-1:]
        if name in ("LDG", "LD", "LDGSTS"):
            most = max(most, sum(size for _, size in loads) + sum(groups))
    return most
