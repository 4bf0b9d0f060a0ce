"""A parsed kernel to a Program of the C++ core. What an opcode becomes is in rules.py; here is what the rules share.

Registers, literals and variables become operands; labels and calls are resolved; variables get their addresses.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

import numpy as np

from ptx.native import NativeProgram, handlers
from ptx.parse import SIZES, Function, Instruction, Location, Module, PtxError, Variable

FLOATS = {"f32", "f64"}
ROUNDING = {"rn": 0, "rz": 1, "rm": 2, "rp": 3, "rna": 4}
FTZ, SAT, RELU, NAN = 8, 16, 32, 64
GLOBAL, SHARED, LOCAL, PARAM, GENERIC, CLUSTER = range(6)
VARIABLES = 0x6000_0000_0000  # device address of the module's variables
GUARD = 256  # bytes that belong to no variable, between shared variables and between buffers

REGISTERS, CONSTANTS, PREDICATES = range(3)
WIDER = {"ld", "st", "cvt"}  # their registers may be wider than the instruction's type
SPECIAL = re.compile(
    r"%(?:tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyz]"
    r"|%(?:laneid|warpid|nwarpid|lanemask_\w\w|smid|nsmid|gridid|dynamic_smem_size|total_smem_size)"
    r"|%(?:cluster_ctarank|cluster_nctarank|is_explicit_cluster)"
)


class UnknownInstruction(PtxError):
    """An instruction, or a modifier of one, that the interpreter does not know."""


@dataclass
class Program:
    """A decoded kernel. `instructions[pc]` and `locations[pc]` are for messages."""

    entry: str
    native: NativeProgram
    instructions: list[str]
    locations: list[Location | None]
    registers: list[str]
    parameters: list[tuple[Variable, int]]  # with their offsets
    parameter_bytes: int
    variables: list[tuple[str, int, bytes, bool]]  # name, device address, initial bytes, constant
    static_shared: int
    dynamic_align: int
    required_threads: tuple[int, ...] | None
    cluster: tuple[int, ...] | None  # blocks of a cluster, as the kernel demands
    ordered: bool  # blocks meet through atomics or strong accesses: run in order
    arch: int  # 80 for sm_80


# opcode -> rule(decoder, instruction, modifiers), which returns the function that it calls, if any
RULES: dict[str, object] = {}


def rule(*opcodes: str):
    def register(function):
        for opcode in opcodes:
            RULES[opcode] = function
        return function

    return register


class Modifiers:
    """The words after an opcode. Rules take what they understand; what is left over is unknown."""

    def __init__(self, words: list[str]):
        self.words = words

    def take(self, *names: str) -> bool:
        """True if one of them is there."""
        found = [word for word in self.words if word in names]
        self.words = [word for word in self.words if word not in names]
        return bool(found)

    def choose(self, names, default=None):
        """The first word that is among `names`."""
        for k, word in enumerate(self.words):
            if word in names:
                del self.words[k]
                return word
        return default

    def flags(self) -> int:
        """FloatFlags of the words that say how to round."""
        rounding = self.choose(ROUNDING)
        flags = ROUNDING[rounding] if rounding else 0
        for word, flag in (("ftz", FTZ), ("sat", SAT), ("relu", RELU), ("NaN", NAN)):
            flags |= flag * self.take(word)
        return flags


def parse_integer(token: str) -> int | None:
    token = token.rstrip("U")
    try:
        return int(token, 0) if not re.fullmatch(r"-?0[0-7]+", token) else int(token, 8)
    except ValueError:
        return None


def immediate_bits(token: str, type_: str) -> int | None:
    """The bits of a literal as `type_`, or None if it is none."""
    size = SIZES[type_]
    if re.fullmatch(r"-?0[fF][0-9a-fA-F]{8}", token):
        bits = int(token.lstrip("-")[2:], 16) ^ (0x80000000 if token[0] == "-" else 0)
        if type_ == "f64":
            return struct.unpack("<Q", struct.pack("<d", struct.unpack("<f", struct.pack("<I", bits))[0]))[0]
        return bits
    if re.fullmatch(r"-?0[dD][0-9a-fA-F]{16}", token):
        bits = int(token.lstrip("-")[2:], 16) ^ (1 << 63 if token[0] == "-" else 0)
        if type_ == "f32":
            return struct.unpack("<I", struct.pack("<f", struct.unpack("<d", struct.pack("<Q", bits))[0]))[0]
        return bits
    value = parse_integer(token)
    if value is None and re.fullmatch(r"-?\d+\.\d*(?:[eE][-+]?\d+)?|-?\d+[eE][-+]?\d+", token):
        value = float(token)
    if value is None:
        return None
    if type_ in FLOATS or isinstance(value, float):
        return int.from_bytes(struct.pack("<d" if size == 8 else "<f", value), "little")
    return value & ((1 << 8 * size) - 1)


@dataclass
class Decoder:
    module: Module
    entry: Function
    code: list[tuple] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    locations: list = field(default_factory=list)
    names: list[str] = field(default_factory=lambda: ["a constant"])
    ordered: bool = False

    def __post_init__(self):
        self.arch = int(re.match(r"sm_(\d+)|$", self.module.target)[1] or 80)
        self.words = self.predicates = 0
        self.register_table: dict[tuple, tuple] = {}
        self.cache: dict[tuple, tuple] = {}
        self.constant_table: dict[tuple[int, int], int] = {}
        self.constants: list[tuple[int, int]] = []
        self.constant_words = 0
        self.special: list[tuple[str, tuple]] = []
        self.special_table: dict[str, tuple] = {}
        self.symbols: dict[int, tuple[int, int]] = {}  # id of a Variable -> (space, address)
        self.local_bytes = 0
        self.locals: list[tuple[int, int]] = []
        self.shared: list[tuple[int, int]] = []
        self.shared_bytes = 0
        self.dynamic_align = 1
        self.starts: dict[str, int] = {}
        self.patches: list[tuple[int, Function, object, str]] = []
        self.handlers = handlers()
        self.function = self.entry
        self.ins: Instruction | None = None

    # ---- errors and emission ---------------------------------------------------------------------------------------

    def unknown(self, why: str = "") -> UnknownInstruction:
        ins = self.ins
        where = f" at {ins.location}" if ins.location else ""
        reason = f": {why}" if why else ""
        return UnknownInstruction(
            f"the PTX interpreter does not know `{ins.text}`{where} (line {ins.line} of the PTX){reason}"
        )

    def needs(self, arch: int) -> None:
        if self.arch < arch:
            raise self.unknown(f"it needs sm_{arch}, and the module is for sm_{self.arch}")

    def emit(self, handler, results=(), sources=(), imm=0, aux=(), target=0, table=None) -> None:
        if handler not in self.handlers:
            raise self.unknown(f"no handler {handler}")
        guard = self.ins.guard
        if guard is not None:
            guard = self.source(guard, "pred")
        self.code.append(
            (handler, guard, list(results), list(sources), imm, [int(a) & 0xFFFFFFFF for a in aux], target, table)
        )
        self.texts.append(self.ins.text)
        self.locations.append(self.ins.location)

    # ---- operands: (space, words, register, bytes, negated) --------------------------------------------------------

    def register(self, token: str) -> tuple | None:
        key = (id(self.ins.scope), token)
        if key in self.cache:
            return self.cache[key]
        for name in (token, token.rstrip("0123456789")):
            scope, type_ = self.ins.scope.find("registers", name)
            if scope is not None:
                break
        else:
            return None
        own = (id(scope), token)
        if own not in self.register_table:
            self.register_table[own] = self.new_register(token, type_)
        self.cache[key] = self.register_table[own]
        return self.cache[key]

    def new_register(self, name: str, type_: str) -> tuple:
        self.names.append(name)
        number = len(self.names) - 1
        if type_ == "pred":
            self.predicates += 1
            return (PREDICATES, self.predicates - 1, number, 1, False)
        size = max(SIZES[type_], 2)
        words = self.words
        self.words += 64 if size == 8 else 32
        return (REGISTERS, words, number, size, False)

    def constant(self, bits: int, size: int) -> tuple:
        size = 8 if size == 8 else 4
        if (bits, size) not in self.constant_table:
            self.constant_table[bits, size] = self.constant_words
            self.constants.append((bits, size))
            self.constant_words += 8 * size
        return (CONSTANTS, self.constant_table[bits, size], 0, size, False)

    def symbol(self, name: str) -> tuple[int, int] | None:
        """(space, address) of a variable or parameter."""
        _, variable = self.ins.scope.find("variables", name)
        if variable is None:
            return None
        if id(variable) not in self.symbols:
            self.place(variable)
        return self.symbols[id(variable)]

    def place(self, variable: Variable) -> None:
        if variable.space == "shared":
            align = max(variable.align, 128)
            if variable.bytes is None:  # dynamic shared memory: after all others, see finish()
                self.dynamic_align = max(self.dynamic_align, variable.align)
                self.symbols[id(variable)] = (SHARED, -1)
                return
            at = -(-(self.shared_bytes + (GUARD if self.shared else 0)) // align) * align
            self.shared.append((at, variable.bytes))
            self.shared_bytes = at + variable.bytes
            self.symbols[id(variable)] = (SHARED, at)
        else:  # .local, and the parameters of calls
            align = max(variable.align, 16)
            at = -(-(self.local_bytes + 1) // align) * align  # at least a byte that belongs to no variable
            self.locals.append((at, variable.bytes))
            self.local_bytes = at + variable.bytes
            self.symbols[id(variable)] = (LOCAL, at)

    def source(self, token: str, type_: str) -> tuple:
        """An operand that is read: register, special register, literal, or address of a variable."""
        if token.startswith("!"):
            operand = self.source(token[1:].strip(), type_)
            return (*operand[:4], not operand[4])
        operand = self.register(token)
        if operand is None and token.startswith("%"):
            operand = self.special_register(token)
        if operand is not None:
            return self.fitting(token, operand, type_)
        if type_ == "pred":
            value = parse_integer(token)
            if value is None:
                raise self.unknown(f"operand {token}")
            return self.constant(0xFFFFFFFF if value else 0, 4)[:3] + (1, False)
        bits = immediate_bits(token, type_)
        if bits is None:
            found = re.fullmatch(r"(?:generic\()?\s*([$%\w]+)\s*\)?\s*(?:\+\s*(-?\d+))?", token)
            place = self.symbol(found[1]) if found else None
            if place is None:
                raise self.unknown(f"operand {token}")
            address = place[1]
            if address < 0:
                return self.dynamic_shared(int(found[2] or 0), SIZES[type_])
            bits = address + int(found[2] or 0)
        return self.constant(bits, SIZES[type_])

    def dynamic_shared(self, offset: int, size: int) -> tuple:
        """The address of dynamic shared memory, known when all static variables are."""
        key = ("dynamic", offset, size)
        if key not in self.constant_table:
            self.constant_table[key] = self.constant_words
            self.constants.append(key)
            self.constant_words += 64 if size == 8 else 32
        return (CONSTANTS, self.constant_table[key], 0, size, False)

    def special_register(self, token: str) -> tuple:
        if token not in self.special_table:
            if not SPECIAL.fullmatch(token):
                raise self.unknown(f"register {token}")
            operand = self.new_register(token, {"%gridid": "u64", "%is_explicit_cluster": "pred"}.get(token, "u32"))
            self.special_table[token] = operand
            self.special.append((token, operand))
        return self.special_table[token]

    def result(self, token: str, type_: str) -> tuple:
        if token == "_":
            return self.new_register("_", type_)
        operand = self.register(token)
        if operand is None:
            raise self.unknown(f"operand {token}")
        return self.fitting(token, operand, type_)

    def fitting(self, token: str, operand: tuple, type_: str) -> tuple:
        """A register as an operand of `type_`: handlers take its lanes to be as wide as their type."""
        size = 1 if type_ == "pred" else max(SIZES[type_], 2)
        wider = operand[0] != PREDICATES and type_ != "pred" and self.ins.opcode.split(".")[0] in WIDER
        if operand[3] != size and not (wider and operand[3] > size):
            kind = "a predicate" if operand[0] == PREDICATES else f"a register of {8 * operand[3]} bits"
            raise self.unknown(f"{token} is {kind}, as an operand of type .{type_}")
        return operand

    def pair(self, token: str, first: str, second: str = "pred") -> list[tuple]:
        """`d` or `d|p`."""
        tokens = [part.strip() for part in token.split("|")]
        return [self.result(part, type_) for part, type_ in zip(tokens, (first, second))]

    def vector(self, token: str) -> list[str]:
        return [part.strip() for part in token.strip("{}").split(",")] if token.startswith("{") else [token]

    def address(self, token: str) -> tuple[tuple, int, int | None]:
        """`[base+offset]`: the base, the offset, the space of a variable if the base is one."""
        found = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*([^\s\]]+))?\s*\]", token)
        if not found:
            raise self.unknown(f"address {token}")
        offset = parse_integer(found[2]) if found[2] else 0
        if offset is None:
            raise self.unknown(f"address {token}")
        base = self.register(found[1])
        if base is not None:
            return base, offset, None
        place = self.symbol(found[1])
        if place is None:
            value = parse_integer(found[1])
            if value is None:
                raise self.unknown(f"address {token}")
            return self.constant(value & (1 << 64) - 1, 8), offset, None
        space, at = place
        if at < 0:
            return self.dynamic_shared(0, 8), offset, space
        return self.constant(at, 8), offset, space

    # ---- functions -------------------------------------------------------------------------------------------------

    def decode_function(self, function: Function, stack: tuple[str, ...] = ()) -> None:
        self.function, start = function, len(self.code)
        self.starts[function.name] = start
        pcs, called = [], []
        for variable in function.scope.variables.values():
            if variable.space == "local":  # new at every call
                self.place(variable)
                self.ins = Instruction("(entry)", None, [], function.scope, None, 0)
                self.emit("fresh.locals", aux=[self.symbols[id(variable)][1], variable.bytes])
        for ins in function.instructions:
            self.ins = ins
            pcs.append(len(self.code))
            opcode, *words = ins.opcode.split(".")
            if opcode not in RULES:
                raise self.unknown()
            modifiers = Modifiers(words)
            called.append(RULES[opcode](self, ins, modifiers))
            if modifiers.words:
                raise self.unknown(f"modifier .{modifiers.words[0]}")
        self.ins = Instruction("ret", None, [], function.scope, None, 0)
        pcs.append(len(self.code))
        self.emit("ret")
        for pc, owner, scope, label in self.patches:
            if owner is function:
                self.resolve(pc, scope, label, pcs)
        for callee in filter(None, called):
            if callee.name == function.name or callee.name in stack:
                raise PtxError(f"function {callee.name} calls itself, which the interpreter does not support")
            if callee.name not in self.starts:
                self.decode_function(callee, (*stack, function.name))

    def resolve(self, pc: int, scope, label, pcs: list[int]) -> None:
        def target(name):
            _, index = scope.find("labels", name)
            if index is None:
                raise PtxError(f"no label {name}")
            return pcs[index]

        handler, guard, results, sources, imm, aux, _, _ = self.code[pc]
        if isinstance(label, list):
            self.code[pc] = (handler, guard, results, sources, imm, aux, 0, [target(name) for name in label])
        else:
            self.code[pc] = (handler, guard, results, sources, imm, aux, target(label), None)

    # ---- the whole -------------------------------------------------------------------------------------------------

    def decode(self) -> Program:
        parameters, at = [], 0
        for variable in self.entry.parameters:
            at = -(-at // variable.align) * variable.align
            parameters.append((variable, at))
            self.symbols[id(variable)] = (PARAM, at)
            at += variable.bytes
        variables = self.place_variables()
        self.decode_function(self.entry)
        for k, item in enumerate(self.code):
            if item[0] == "call":
                self.code[k] = (*item[:6], self.starts[item[6]], None)
        align = max(128, self.dynamic_align)
        start = -(-(self.shared_bytes + (GUARD if self.shared else 0)) // align) * align if self.shared else 0
        lanes = []
        for constant in self.constants:
            if constant[0] == "dynamic":
                lanes.append(np.full(32, start + constant[1], np.uint64 if constant[2] == 8 else np.uint32))
            else:
                lanes.append(np.full(32, constant[0], np.uint64 if constant[1] == 8 else np.uint32))
        constants = b"".join(array.tobytes() for array in lanes)
        sizes = [self.words, self.predicates, len(self.names), self.local_bytes, start]
        program = NativeProgram(self.code, constants, sizes, self.locals, self.shared, self.special)
        return Program(
            self.entry.name,
            program,
            self.texts,
            self.locations,
            self.names,
            parameters,
            at,
            variables,
            sum(size for _, size in self.shared),
            self.dynamic_align,
            self.entry.required_threads,
            self.entry.cluster,
            self.ordered,
            self.arch,
        )

    def place_variables(self) -> list[tuple[str, int, bytes, bool]]:
        """Addresses of the module's .global and .const variables, then their initial bytes."""
        placed, at = [], VARIABLES
        scopes = [self.module.scope]
        for scope in scopes:
            for variable in scope.variables.values():
                if variable.space in ("global", "const") and variable.bytes is not None:
                    at = -(-at // max(variable.align, 256)) * max(variable.align, 256)
                    self.symbols[id(variable)] = (GLOBAL, at)
                    placed.append(variable)
                    at += variable.bytes + GUARD
        out = []
        for variable in placed:
            data = bytearray(variable.bytes)
            size = SIZES[variable.type]
            if variable.initial:
                for k, token in enumerate(variable.initial.strip("{} ").replace("{", "").replace("}", "").split(",")):
                    data[k * size : (k + 1) * size] = self.initial_bits(token.strip(), variable).to_bytes(
                        size, "little"
                    )
            out.append((variable.name, self.symbols[id(variable)][1], bytes(data), variable.space == "const"))
        return out

    def initial_bits(self, token: str, variable: Variable) -> int:
        bits = immediate_bits(token, variable.type)
        if bits is not None:
            return bits
        found = re.fullmatch(r"(?:generic\()?\s*([$%\w]+)\s*\)?\s*(?:\+\s*(\d+))?", token)
        if found and found[1] in self.module.functions:
            return 0  # nobody can use it: a call through a pointer is an UnknownInstruction
        other = self.module.scope.variables.get(found[1]) if found else None
        if other is None or id(other) not in self.symbols:
            raise PtxError(f"cannot read the initial value {token} of {variable.name}")
        return self.symbols[id(other)][1] + int(found[2] or 0)
