"""One rule per opcode.

A rule takes the decoder, the instruction and its modifiers, and emits the name of a handler (core/ops_*.cpp says what
its numbers mean) with operands. A modifier that a rule does not take is an UnknownInstruction, like an opcode without a
rule.
"""

from __future__ import annotations

import re

from ptx.decode import (
    CLUSTER,
    FLOATS,
    GENERIC,
    GLOBAL,
    LOCAL,
    PARAM,
    SHARED,
    Decoder,
    Modifiers,
    Program,
    parse_integer,
    rule,
)
from ptx.parse import SIZES, Function, Instruction, Module, PtxError

INTEGERS = {"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"}
PAIRS = {"u16x2", "s16x2"}  # of integers
HALVES = {"f16", "bf16", "f16x2", "bf16x2"}
INTEGRAL = {"rni": 0, "rzi": 1, "rmi": 2, "rpi": 3}
SIGNED, VOLATILE, NONCOHERENT, ACQUIRE, RELEASE, IN_BLOCK = 1, 2, 4, 8, 16, 64
SPACES = {
    "global": GLOBAL,
    "const": GLOBAL,
    "shared": SHARED,
    "shared::cta": SHARED,
    "shared::cluster": CLUSTER,
    "local": LOCAL,
    "param": PARAM,
    "param::entry": PARAM,
    "param::func": PARAM,
}
SCOPES = {"cta", "gpu", "sys", "cluster", "gl"}
WINDOWS = {"shared": 0x7000_0000_0000, "local": 0x7100_0000_0000, "param": 0x7200_0000_0000}
ORDERED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
# Bit by bit: 1 less, 2 equal, 4 greater, 8 unordered.
COMPARISON_NAMES = "lt eq le gt ne ge num nan ltu equ leu gtu neu geu"
COMPARISONS = {name: bits for bits, name in enumerate(COMPARISON_NAMES.split(), 1)}
BOOLEANS = {"and": 1, "or": 2, "xor": 3}
CLOCKS = {"%clock", "%clock_hi", "%clock64", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi"}
XORSIGN = 128


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def bits_type(type_: str) -> str:
    return "pred" if type_ == "pred" else f"b{8 * SIZES[type_]}"


def unsigned(type_: str) -> str:
    return type_.replace("b", "u") if type_.startswith("b") and not type_.startswith("bf") else type_


def simple(d: Decoder, ins: Instruction, handler: str, types: list[str], result: str, aux=()) -> None:
    """d = handler(sources)."""
    if not 0 < len(ins.operands) - 1 <= len(types):
        raise d.unknown(f"{len(ins.operands)} operands")
    sources = [d.source(token, type_) for token, type_ in zip(ins.operands[1:], types)]
    d.emit(handler, [d.result(ins.operands[0], result)], sources, aux=aux)


def floating(d: Decoder, ins: Instruction, opcode: str, type_: str, flags: int) -> None:
    count = len(ins.operands) - 1
    handler = f"{opcode}.{type_}"
    if type_ in FLOATS and flags:
        handler += "+"
    simple(d, ins, handler, [type_] * count, type_, [flags])


def last_type(m: Modifiers, d: Decoder) -> str:
    if not m.words or m.words[-1] not in SIZES:
        raise d.unknown()
    return m.words.pop()


@rule("add", "sub")
def decode_add(d, ins, m):
    type_ = last_type(m, d)
    opcode = ins.opcode.split(".")[0]
    if type_ in PAIRS:
        d.needs(90)
        return simple(d, ins, f"{opcode}.{type_}", [type_] * 2, type_)
    if type_ in INTEGERS:
        if m.take("cc"):
            return simple(d, ins, f"{opcode}.carry.{type_}", [type_] * 2, type_, [2])
        return simple(d, ins, f"{opcode}.sat.{type_}" if m.take("sat") else f"{opcode}.{type_}", [type_] * 2, type_)
    floating(d, ins, opcode, type_, m.flags())


@rule("addc", "subc")
def decode_addc(d, ins, m):
    type_ = last_type(m, d)
    simple(d, ins, f"{ins.opcode[:3]}.carry.{type_}", [type_] * 2, type_, [1 | 2 * m.take("cc")])


@rule("mul", "mad", "madc")
def decode_mul(d, ins, m):
    type_ = last_type(m, d)
    opcode = ins.opcode.split(".")[0]
    if type_ not in INTEGERS:
        return floating(d, ins, "fma" if opcode == "mad" else "mul", type_, m.flags())
    part = m.choose(("lo", "hi", "wide"))
    carry = 2 * m.take("cc") | (opcode == "madc")
    if carry:
        return simple(d, ins, f"mad.carry.{type_}", [type_] * 3, type_, [carry, part == "hi"])
    wide = type_[0] + str(16 * SIZES[type_]) if part == "wide" else type_
    simple(d, ins, f"{opcode}.{part}.{type_}", [type_, type_, wide], wide)


@rule("mul24", "mad24")
def decode_mul24(d, ins, m):
    type_ = last_type(m, d)
    simple(d, ins, f"{ins.opcode.split('.')[0]}.{m.choose(('lo', 'hi'))}.{type_}", [type_] * 3, type_)


@rule("fma")
def decode_fma(d, ins, m):
    type_ = last_type(m, d)
    floating(d, ins, "fma", type_, m.flags())


@rule("div", "rem", "sad")
def decode_div(d, ins, m):
    type_ = last_type(m, d)
    opcode = ins.opcode.split(".")[0]
    if type_ in INTEGERS:
        return simple(d, ins, f"{opcode}.{type_}", [type_] * 3, type_)
    approximate, flags = m.take("approx", "full"), m.flags()
    if approximate:
        return simple(d, ins, f"div.approx.{type_}", [type_] * 2, type_, [flags])
    floating(d, ins, opcode, type_, flags)


@rule("rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh")
def decode_approximate(d, ins, m):
    type_ = last_type(m, d)
    opcode = ins.opcode.split(".")[0]
    approximate = m.take("approx")
    flags = m.flags()
    if approximate and type_ in FLOATS:
        return simple(d, ins, f"{opcode}.approx.{type_}", [type_], type_, [flags])
    floating(d, ins, opcode, type_, flags)


@rule("min", "max")
def decode_min(d, ins, m):
    type_ = last_type(m, d)
    opcode = ins.opcode.split(".")[0]
    if type_ in PAIRS:
        d.needs(90)
    if type_ in INTEGERS | PAIRS:
        return simple(d, ins, f"{opcode}.relu.{type_}" if m.take("relu") else f"{opcode}.{type_}", [type_] * 2, type_)
    flags = m.flags()
    if m.take("xorsign"):
        m.take("abs")
        flags |= XORSIGN
    floating(d, ins, opcode + ("3" if len(ins.operands) == 4 else ""), type_, flags)


@rule("abs", "neg")
def decode_abs(d, ins, m):
    type_ = last_type(m, d)
    opcode = ins.opcode.split(".")[0]
    if type_ in INTEGERS:
        return simple(d, ins, f"{opcode}.{type_}", [type_], type_)
    flags = m.flags()
    if type_ in FLOATS:
        return floating(d, ins, opcode, type_, flags)
    sign = 0x80008000 if type_.endswith("x2") else 0x8000
    whole = 0xFFFFFFFF if type_.endswith("x2") else 0xFFFF
    aux = [flags, 0, whole & ~sign] if opcode == "abs" else [flags, sign, whole]
    simple(d, ins, f"sign.{type_}", [type_], type_, aux)


@rule("copysign")
def decode_copysign(d, ins, m):
    floating(d, ins, "copysign", last_type(m, d), 0)


@rule("testp")
def decode_testp(d, ins, m):
    type_ = last_type(m, d)
    tests = ("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    simple(d, ins, f"testp.{type_}", [type_], "pred", [1 << tests.index(m.choose(tests))])


# ---- bits ----------------------------------------------------------------------------------------------------------


@rule("and", "or", "xor", "not", "cnot")
def decode_logic(d, ins, m):
    type_ = last_type(m, d)
    simple(d, ins, f"{ins.opcode.split('.')[0]}.{type_}", [type_] * 2, type_)


@rule("shl", "shr")
def decode_shift(d, ins, m):
    type_ = last_type(m, d)
    handler = f"shl.{bits_type(type_)}" if ins.opcode.startswith("shl") else f"shr.{unsigned(type_)}"
    simple(d, ins, handler, [type_, "u32"], type_)


@rule("shf", "bmsk", "fns", "brev", "popc", "clz", "bfi")
def decode_bits(d, ins, m):
    type_ = m.words[-1]
    types = {
        "shf": ["b32", "b32", "u32"],
        "bmsk": ["u32"] * 2,
        "fns": ["b32", "b32", "s32"],
        "bfi": [type_] * 2 + ["u32"] * 2,
    }
    opcode = ins.opcode.split(".")[0]
    result = "u32" if opcode in ("popc", "clz") else type_
    m.words.clear()  # the whole opcode names the handler
    simple(d, ins, ins.opcode, types.get(opcode, [type_]), result)


@rule("bfe", "bfind")
def decode_bfe(d, ins, m):
    type_ = last_type(m, d)
    if ins.opcode.startswith("bfe"):
        return simple(d, ins, f"bfe.{type_}", [type_, "u32", "u32"], type_)
    simple(d, ins, f"bfind.shiftamt.{type_}" if m.take("shiftamt") else f"bfind.{type_}", [type_], "u32")


@rule("lop3")
def decode_lop3(d, ins, m):
    last_type(m, d)
    a, b, c, table = ins.operands[1:]
    sources = [d.source(token, "b32") for token in (a, b, c)]
    d.emit("lop3.b32", [d.result(ins.operands[0], "b32")], sources, aux=[parse_integer(table)])


@rule("prmt")
def decode_prmt(d, ins, m):
    modes = ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    m.take("b32")
    mode = m.choose(modes)
    simple(d, ins, "prmt.b32", ["b32"] * 3, "b32", [modes.index(mode) + 1 if mode else 0])


@rule("dp4a", "dp2a")
def decode_dot(d, ins, m):
    types = [m.words.pop(), m.words.pop()][::-1]
    aux = [(types[0] == "s32") | 2 * (types[1] == "s32"), 1 if ins.opcode.startswith("dp4a") else 2]
    upper = m.choose(("lo", "hi")) == "hi"
    sources = [d.source(token, "b32") for token in ins.operands[1:]]
    d.emit("dot", [d.result(ins.operands[0], "b32")], sources, imm=int(upper), aux=aux)


# ---- comparisons, selection, moves, conversions --------------------------------------------------------------------


def comparison(d: Decoder, ins: Instruction, m: Modifiers, type_: str, results: list, opcode: str, true: int) -> None:
    word = m.choose(set(COMPARISONS) | set(ORDERED))
    if word is None:
        raise d.unknown()
    boolean = BOOLEANS.get(m.choose(BOOLEANS), 0)
    ftz = m.take("ftz")
    a, b, *c = ins.operands[1:]
    sources = [d.source(a, type_), d.source(b, type_)] + [d.source(token, "pred") for token in c]
    if type_ in FLOATS | HALVES:
        return d.emit(f"{opcode}.{type_}", results, sources, aux=[boolean, true, COMPARISONS[word], ftz])
    d.emit(f"{opcode}.{ORDERED.get(word, word)}.{unsigned(type_)}", results, sources, aux=[boolean, true])


@rule("setp")
def decode_setp(d, ins, m):
    type_ = last_type(m, d)
    comparison(d, ins, m, type_, d.pair(ins.operands[0], "pred"), "setp", 0)


@rule("set")
def decode_set(d, ins, m):
    type_ = last_type(m, d)
    result = last_type(m, d)
    true = {"f32": 0x3F800000, "f16": 0x3C00, "f16x2": 0x3C00, "bf16": 0x3F80, "bf16x2": 0x3F80}.get(result)
    if true is None:
        true = 0xFFFF if type_.endswith("x2") or SIZES[result] == 2 else 0xFFFFFFFF
    comparison(d, ins, m, type_, [d.result(ins.operands[0], result)], "set", true)


@rule("selp")
def decode_selp(d, ins, m):
    type_ = last_type(m, d)
    simple(d, ins, f"selp.{bits_type(type_)}", [type_, type_, "pred"], type_)


@rule("slct")
def decode_slct(d, ins, m):
    m.take("ftz")
    choice = last_type(m, d)
    type_ = last_type(m, d)
    simple(d, ins, f"slct.{bits_type(type_)}.{choice}", [type_, type_, choice], type_)


@rule("mov")
def decode_mov(d, ins, m):
    type_ = last_type(m, d)
    to, value = ins.operands
    if to.startswith("{"):
        parts = d.vector(to)
        size = SIZES[type_] // len(parts)
        results = [d.result(part, f"b{8 * size}") for part in parts]
        return d.emit("unpack", results, [d.source(value, type_)], aux=[size])
    if value.startswith("{"):
        parts = d.vector(value)
        size = SIZES[type_] // len(parts)
        return d.emit("pack", [d.result(to, type_)], [d.source(part, f"b{8 * size}") for part in parts], aux=[size])
    if value in CLOCKS:
        return d.emit("clock", [d.result(to, type_)])
    simple(d, ins, f"mov.{bits_type(type_)}", [type_], type_)


@rule("cvt")
def decode_cvt(d, ins, m):
    if m.take("pack"):
        return decode_cvt_pack(d, ins, m)
    source = last_type(m, d)
    result = last_type(m, d)
    integral = m.choose(INTEGRAL)
    flags = m.flags()
    if result in INTEGERS and source in INTEGERS:
        narrower = min(result, source, key=SIZES.get)
        aux = [flags, 0, SIZES[narrower], narrower.startswith("s"), SIZES[source]]
        return simple(d, ins, f"cvt.{result}.{source}", [source], result, aux)
    if result in INTEGERS:
        if integral is None:
            raise d.unknown("no rounding to an integer")
        return simple(d, ins, f"cvt.{result}.{source}", [source], result, [flags | INTEGRAL[integral]])
    if result in ("bf16x2", "f16x2"):
        fast = result == "bf16x2" and flags == 0
        return simple(d, ins, f"cvt.{'rn.' if fast else ''}{result}.f32", [source] * 2, result, [flags])
    if result == "bf16" and source == "f32" and flags == 0:
        return simple(d, ins, "cvt.rn.bf16.f32", [source], result)
    if result == "f32" and source == "bf16" and flags == 0:
        return simple(d, ins, "cvt.exact.f32.bf16", [source], result)
    simple(d, ins, f"cvt.{result}.{source}", [source], result, [flags, 1 + INTEGRAL[integral] if integral else 0])


def decode_cvt_pack(d, ins, m):
    m.take("sat")
    m.choose(("b32",))
    m.choose(("s32",))
    result = m.words.pop(0)
    m.words.clear()
    simple(d, ins, "cvt.pack", ["s32", "s32", "b32"], "b32", [0, 8 * SIZES.get(result, 0), result.startswith("s")])


# ---- memory --------------------------------------------------------------------------------------------------------


def memory_words(d: Decoder, m: Modifiers) -> tuple[int, int]:
    """The space, and the flags of order; hints for the caches are dropped."""
    m.words = [word for word in m.words if not word.startswith(("L1::", "L2::", "level::"))]
    flags = 0
    if m.take("volatile", "relaxed", "mmio"):
        flags |= VOLATILE
    if m.take("acquire"):
        flags |= VOLATILE | ACQUIRE
    if m.take("release"):
        flags |= VOLATILE | RELEASE
    if m.take("acq_rel"):
        flags |= VOLATILE | ACQUIRE | RELEASE
    if m.take("nc"):
        flags |= NONCOHERENT
    if m.take("cta"):
        flags |= IN_BLOCK
    m.take("weak", "ca", "cg", "cs", "cv", "lu", "wb", "wt", "unified", *SCOPES)
    word = m.choose(SPACES)
    space = GENERIC if word is None else SPACES[word]
    if flags & VOLATILE and space in (GLOBAL, GENERIC):
        d.ordered = True
    return space, flags


def parameter_space(d: Decoder, space: int, symbol: int | None) -> int:
    """.param is a kernel's parameter or, in calls and functions, local memory."""
    if space != PARAM:
        return space
    return symbol if symbol is not None else PARAM if d.function.is_entry else LOCAL


@rule("ld", "ldu")
def decode_ld(d, ins, m):
    type_ = last_type(m, d)
    m.take("v2", "v4", "v8")
    space, flags = memory_words(d, m)
    base, offset, symbol = d.address(ins.operands[1])
    results = [d.result(part, type_) for part in d.vector(ins.operands[0])]
    flags |= SIGNED * type_.startswith("s")
    aux = [parameter_space(d, space, symbol), SIZES[type_], flags, len(results)]
    d.emit("ld", results, [base], imm=offset, aux=aux)


@rule("st")
def decode_st(d, ins, m):
    type_ = last_type(m, d)
    m.take("v2", "v4", "v8")
    if m.take("async"):
        return decode_st_async(d, ins, m, type_)
    space, flags = memory_words(d, m)
    base, offset, symbol = d.address(ins.operands[0])
    values = [d.source(part, type_) for part in d.vector(ins.operands[1])]
    aux = [parameter_space(d, space, symbol), SIZES[type_], flags, len(values)]
    d.emit("st", [], [base, *values], imm=offset, aux=aux)


def decode_st_async(d, ins, m, type_):
    d.needs(90)
    m.take("weak")
    if not m.take("shared::cluster") or not m.take("mbarrier::complete_tx::bytes"):
        raise d.unknown()
    to, offset, _ = d.address(ins.operands[0])
    signal, at, _ = d.address(ins.operands[2])
    values = [d.source(part, type_) for part in d.vector(ins.operands[1])]
    d.emit("st.async", [], [to, signal, *values], imm=offset, aux=[at, SIZES[type_]])


@rule("mapa")
def decode_mapa(d, ins, m):
    d.needs(90)
    type_ = last_type(m, d)
    generic = not m.take("shared::cluster")
    sources = [d.source(ins.operands[1], type_), d.source(ins.operands[2], "u32")]
    d.emit(f"mapa.{type_}", [d.result(ins.operands[0], type_)], sources, aux=[generic])


@rule("getctarank")
def decode_getctarank(d, ins, m):
    d.needs(90)
    type_ = last_type(m, d)
    m.take("shared::cluster")
    d.emit("getctarank", [d.result(ins.operands[0], "u32")], [d.source(ins.operands[1], type_)])


@rule("atom", "red")
def decode_atom(d, ins, m):
    type_ = last_type(m, d)
    operations = ("add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas")
    operation = m.choose(operations)
    m.take("noftz")
    space, flags = memory_words(d, m)
    if space in (GLOBAL, GENERIC):
        d.ordered = True
    if operation in ("and", "or", "xor", "exch", "cas"):
        type_ = bits_type(type_)
    operands = list(ins.operands)
    results = [] if ins.opcode.startswith("red") else [d.result(operands.pop(0), type_)]
    base, offset, _ = d.address(operands[0])
    count = 2 if operation == "cas" else 1
    values = [d.source(token, type_) for token in operands[1 : 1 + count]]
    d.emit(f"atom.{operation}.{type_}", results, [base, *values], imm=offset, aux=[space, SIZES[type_], flags, 1])


@rule("cp")
def decode_cp(d, ins, m):
    if not m.take("async"):
        raise d.unknown()
    if m.take("bulk"):
        return decode_bulk(d, ins, m)
    if m.take("commit_group"):
        return d.emit("cp.async.commit_group")
    if m.take("wait_all"):
        return d.emit("cp.async.wait_group", imm=0, aux=[1])
    if m.take("wait_group"):
        return d.emit("cp.async.wait_group", imm=parse_integer(ins.operands[0]))
    m.words = [word for word in m.words if not word.startswith("L2::")]
    m.take("ca", "cg")
    if not m.take("shared", "shared::cta") or not m.take("global"):
        raise d.unknown()
    to, to_offset, _ = d.address(ins.operands[0])
    source, offset, _ = d.address(ins.operands[1])
    sources = [to, source]
    if len(ins.operands) > 3:
        size = d.register(ins.operands[3])
        if size is None or size[3] != 8:  # eight bytes are a cache policy
            sources.append(d.source(ins.operands[3], "u32"))
    d.emit("cp.async", [], sources, imm=offset, aux=[0, parse_integer(ins.operands[2]), 0, 0, to_offset])


def decode_bulk(d, ins, m):
    d.needs(90)
    if m.take("commit_group"):
        return d.emit("cp.async.bulk.commit_group")
    if m.take("wait_group"):
        return d.emit("cp.async.bulk.wait_group", imm=parse_integer(ins.operands[0]), aux=[m.take("read")])
    tensor = m.take("tensor")
    rank = int(m.choose(("1d", "2d", "3d", "4d", "5d"))[0]) if tensor else 0
    m.take("tile")
    spaces = [word for word in m.words if word in ("global", "shared::cta", "shared::cluster")]
    from_shared = spaces == ["shared::cluster", "shared::cta"] and not tensor
    load = from_shared or spaces[-1:] == ["global"]
    m.take(*spaces)
    if len(spaces) != 2 or not m.take("mbarrier::complete_tx::bytes" if load else "bulk_group"):
        raise d.unknown()
    operands = list(ins.operands)
    if m.take("L2::cache_hint"):
        operands.pop()
    multicast = m.take("multicast::cluster")
    if multicast and (not load or from_shared):
        raise d.unknown()
    targets = [d.source(operands.pop(), "u16")] if multicast else []

    def tensor_map(token):
        found = re.fullmatch(r"\[\s*([^,\s]+)\s*,\s*(\{[^}]*\})\s*\]", token)
        if not found:
            raise d.unknown(f"address {token}")
        return f"[{found[1]}]", [d.source(part, "u32") for part in d.vector(found[2])]

    there = operands.pop(1 if load else 0)
    there, coordinates = tensor_map(there) if tensor else (there, [])
    if len(coordinates) != rank:
        raise d.unknown(f"{len(coordinates)} coordinates")
    shared, at, _ = d.address(operands.pop(0))
    world, offset, _ = d.address(there)
    sources, offsets = [shared, world], [at, offset]
    size = [] if tensor else [d.source(operands.pop(0), "u32")]
    if load:
        signal, at, _ = d.address(operands.pop(0))
        sources, offsets = [*sources, signal], [*offsets, at]
    if operands:
        raise d.unknown(f"operand {operands[0]}")
    aux = [load | 2 * from_shared | 4 * multicast, rank, *offsets]
    d.emit("cp.async.bulk", [], [*sources, *size, *coordinates, *targets], aux=aux)


@rule("mbarrier")
def decode_mbarrier(d, ins, m):
    type_ = m.take("b64")
    across = m.take("shared::cluster")
    m.take("shared", "shared::cta", "cta", "cluster", "acquire", "release")
    relaxed = m.take("relaxed")
    kind = m.choose(("init", "inval", "arrive", "expect_tx", "try_wait", "test_wait"))
    if kind is None or not type_:
        raise d.unknown()
    operands = list(ins.operands)
    if across and kind not in ("arrive", "expect_tx"):
        raise d.unknown()
    if kind in ("try_wait", "test_wait"):
        parity = m.take("parity")
        result, phase = d.result(operands[0], "pred"), d.source(operands[2], "u32" if parity else "u64")
        base, offset, _ = d.address(operands[1])
        return d.emit("mbarrier.wait", [result], [base, phase], imm=offset, aux=[parity | 2 * relaxed])
    results = []
    if kind == "arrive" and not operands[0].startswith("["):
        state = operands.pop(0)
        results = [] if state == "_" else [d.result(state, "b64")]
        if across and results:
            raise d.unknown("another block's mbarrier returns no state")
    base, offset, _ = d.address(operands[0])
    sources = [base, *(d.source(token, "u32") for token in operands[1:])]
    if kind in ("init", "inval"):
        return d.emit(f"mbarrier.{kind}", [], sources, imm=offset)
    expects = kind == "expect_tx" or m.take("expect_tx")
    if expects and len(sources) != 2:
        raise d.unknown()
    d.emit("mbarrier.arrive", results, sources, imm=offset, aux=[(kind == "arrive") | 2 * expects, relaxed, across])


@rule("setmaxnreg")
def decode_setmaxnreg(d, ins, m):
    m.take("sync", "aligned", "u32")
    count = parse_integer(ins.operands[0])
    if not m.take("inc", "dec") or count is None or count % 8 or not 24 <= count <= 256:
        raise d.unknown("a multiple of 8 from 24 to 256 registers is allowed")
    d.emit("nop")


@rule("ldmatrix", "stmatrix")
def decode_ldmatrix(d, ins, m):
    m.take("sync")
    m.take("aligned")
    if not m.take("m8n8") or not m.take("b16"):
        raise d.unknown()
    tiles = int(m.choose(("x1", "x2", "x4"))[1])
    transposed = m.take("trans")
    space, _ = memory_words(d, m)
    if ins.opcode.startswith("ld"):
        base, offset, _ = d.address(ins.operands[1])
        results = [d.result(part, "b32") for part in d.vector(ins.operands[0])]
        return d.emit("ldmatrix", results, [base], imm=offset, aux=[space, tiles, transposed])
    base, offset, _ = d.address(ins.operands[0])
    values = [d.source(part, "b32") for part in d.vector(ins.operands[1])]
    d.emit("stmatrix", [], [base, *values], imm=offset, aux=[space, tiles, transposed])


@rule("cvta")
def decode_cvta(d, ins, m):
    type_ = last_type(m, d)
    to = "to." if m.take("to") else ""
    space = {"shared::cta": "shared", "shared::cluster": "shared"}.get(word := m.choose(SPACES), word)
    simple(d, ins, f"cvta.{to}{space}.{type_}", [type_], type_)


@rule("isspacep")
def decode_isspacep(d, ins, m):
    names = {"shared::cta": "shared", "shared::cluster": "shared", "const": "global", "param::entry": "param"}
    space = names.get(word := m.choose(SPACES), word)
    source = d.source(ins.operands[1], "u64")
    d.emit(
        "isspacep", [d.result(ins.operands[0], "pred")], [source], imm=WINDOWS.get(space, 0), aux=[space == "global"]
    )


@rule("membar", "fence")
def decode_fence(d, ins, m):
    if m.words[:2] == ["proxy", "async"]:
        d.needs(90)
        m.words = m.words[2:]
        # Of .global alone it orders nothing that wgmma reads.
        return d.emit(
            "nop" if m.choose(("global", "shared::cta", "shared::cluster")) == "global" else "fence.proxy.async"
        )
    if m.take("mbarrier_init"):
        m.take("release", "cluster")
        return d.emit("fence.mbarrier_init")
    if m.words and m.words[0] not in ("acq_rel", "sc", "acquire", "release", "cta", "gl", "gpu", "sys"):
        raise d.unknown()
    # Within a block barriers order, see docs/ptx.md: a fence of its scope publishes nothing to the others.
    in_block = m.take("cta")
    m.take("acq_rel", "sc", "acquire", "release", *SCOPES)
    d.emit("nop" if in_block else "fence")


@rule("prefetch", "prefetchu", "discard", "applypriority", "nanosleep", "griddepcontrol", "pmevent")
def decode_nothing(d, ins, m):
    m.words.clear()
    d.emit("nop")


@rule("createpolicy")
def decode_createpolicy(d, ins, m):
    m.words.clear()
    d.emit("mov.b64", [d.result(ins.operands[0], "b64")], [d.constant(0, 8)])


# ---- warps ---------------------------------------------------------------------------------------------------------


@rule("shfl")
def decode_shfl(d, ins, m):
    m.take("b32")
    modes = ("up", "down", "bfly", "idx")
    mode = modes.index(m.choose(modes))
    if not m.take("sync"):
        raise d.unknown("only shfl.sync exists on sm_70 and later")
    results = d.pair(ins.operands[0], "b32")
    sources = [d.source(token, "b32") for token in ins.operands[1:]]
    d.emit("shfl", results, sources, aux=[mode, 0, 0, 0, 0, 4])


@rule("vote")
def decode_vote(d, ins, m):
    m.take("pred", "b32")
    modes = ("all", "any", "uni", "ballot")
    mode = modes.index(m.choose(modes))
    if not m.take("sync"):
        raise d.unknown("only vote.sync exists on sm_70 and later")
    result = d.result(ins.operands[0], "b32" if mode == 3 else "pred")
    sources = [d.source(ins.operands[1], "pred"), d.source(ins.operands[2], "b32")]
    d.emit("vote", [result], sources, aux=[mode, 0, 0, 0, 0, 2])


@rule("match")
def decode_match(d, ins, m):
    type_ = last_type(m, d)
    every = m.choose(("any", "all")) == "all"
    m.take("sync")
    sources = [d.source(ins.operands[1], type_), d.source(ins.operands[2], "b32")]
    d.emit(f"match.{type_}", d.pair(ins.operands[0], "b32"), sources, aux=[every, 0, 0, 0, 0, 2])


@rule("redux")
def decode_redux(d, ins, m):
    type_ = last_type(m, d)
    m.take("sync")
    operation = m.choose(("add", "min", "max", "and", "or", "xor"))
    sources = [d.source(token, "b32") for token in ins.operands[1:]]
    d.emit(f"redux.{operation}.{type_}", [d.result(ins.operands[0], type_)], sources, aux=[0, 0, 0, 0, 0, 2])


@rule("elect")
def decode_elect(d, ins, m):
    m.take("sync")
    d.emit("elect", d.pair(ins.operands[0], "b32"), [d.source(ins.operands[1], "b32")], aux=[0, 0, 0, 0, 0, 1])


@rule("activemask")
def decode_activemask(d, ins, m):
    m.take("b32")
    d.emit("activemask", [d.result(ins.operands[0], "b32")])


@rule("bar", "barrier")
def decode_bar(d, ins, m):
    if m.take("cluster"):
        return decode_cluster_barrier(d, ins, m)
    m.take("cta")
    if m.take("warp"):
        m.take("sync")
        return d.emit("bar.warp.sync", [], [d.source(ins.operands[0], "b32")])
    kinds = ("sync", "arrive", "red")
    kind = kinds.index(m.choose(kinds))
    aligned = m.take("aligned") or ins.opcode.startswith("bar.")
    operands, results, reduction = list(ins.operands), [], 0
    if kind == 2:
        reduction = ("popc", "and", "or").index(m.choose(("popc", "and", "or")))
        m.take("u32", "pred")
        results = [d.result(operands.pop(0), "pred" if reduction else "u32")]
    predicate = [operands.pop()] if kind == 2 else []
    sources = [d.source(token, "u32") for token in operands] + [d.source(token, "pred") for token in predicate]
    d.emit("barrier", results, sources, aux=[kind, aligned, len(operands) > 1, reduction])


def decode_cluster_barrier(d, ins, m):
    d.needs(90)
    waits = ("arrive", "wait").index(m.choose(("arrive", "wait")))
    aligned, relaxed = m.take("aligned"), m.take("relaxed")
    m.take("acquire" if waits else "release")
    d.emit("barrier.cluster", aux=[waits, aligned, relaxed])


@rule("mma")
def decode_mma(d, ins, m):
    m.take("sync")
    m.take("aligned")
    if not m.take("row") or not m.take("col"):
        raise d.unknown()
    shape = m.choose({word for word in m.words if re.fullmatch(r"m\d+n8k\d+", word)})
    if shape is None or len(m.words) < 4:
        raise d.unknown()
    rows, depth = int(shape[1:].split("n")[0]), int(shape.split("k")[1])
    saturate = m.take("satfinite")
    to, a, b, c = m.words
    m.words = []
    handler = f"mma.{a}.{b}" if a in ("s8", "u8") else f"mma.{a}"
    per_register = {"tf32": 1, "f64": 1, "bf16": 2, "f16": 2, "s8": 4, "u8": 4}.get(a)
    if per_register is None or rows not in (8, 16) or to != c or (rows == 8 and a in ("bf16", "f16", "tf32")):
        raise d.unknown()
    tokens = [d.vector(operand) for operand in ins.operands]
    counts = [len(part) for part in tokens[1:]]
    if counts[1] * 4 * per_register != depth or counts[0] * 4 * per_register * 8 != rows * depth:
        raise d.unknown()
    type_ = "f64" if a == "f64" else "b32"
    results = [d.result(token, type_) for token in tokens[0]]
    sources = [d.source(token, type_) for part in tokens[1:] for token in part]
    d.emit(handler, results, sources, imm=int(saturate), aux=[rows, *counts, to == "f16"])


@rule("wgmma")
def decode_wgmma(d, ins, m):
    d.needs(90)
    m.take("sync")
    m.take("aligned")
    if m.take("fence"):
        return d.emit("wgmma.fence")
    if m.take("commit_group"):
        return d.emit("wgmma.commit_group")
    if m.take("wait_group"):
        return d.emit("wgmma.wait_group", imm=parse_integer(ins.operands[0]))
    shape = m.choose({word for word in m.words if re.fullmatch(r"m64n\d+k\d+", word)})
    if not m.take("mma_async") or shape is None or len(m.words) != 3:
        raise d.unknown()
    columns, depth = map(int, shape[4:].split("k"))
    to, a, b = m.words
    m.words = []
    half = to == "f16"
    if a != b or depth != {"bf16": 16, "f16": 16, "tf32": 8}.get(a) or (to != "f32" and not (half and a == "f16")):
        raise d.unknown()
    accumulators, factor, other, scale, *signs = ins.operands
    results = [d.result(token, "b32") for token in d.vector(accumulators)]
    across = [parse_integer(token) for token in signs[2:]]
    negated = [parse_integer(token) == -1 for token in signs[:2]]
    in_registers = factor.startswith("{")
    fragments = [d.source(token, "b32") for token in d.vector(factor)] if in_registers else [d.source(factor, "u64")]
    transposed = ([0] if in_registers else []) + across if across else [0, 0]
    if len(results) * (4 if half else 2) != columns or len(transposed) != 2 or (in_registers and len(fragments) != 4):
        raise d.unknown()
    flags = in_registers | 2 * negated[0] | 4 * negated[1] | 8 * transposed[0] | 16 * transposed[1] | 32 * half
    sources = [*fragments, d.source(other, "u64"), d.source(scale, "pred")]
    d.emit(f"wgmma.mma_async.{a}", results, sources, aux=[columns, flags])


@rule("movmatrix")
def decode_movmatrix(d, ins, m):
    m.take("sync", "aligned", "m8n8", "trans", "b16")
    d.emit("movmatrix", [d.result(ins.operands[0], "b32")], [d.source(ins.operands[1], "b32")])


# ---- control -------------------------------------------------------------------------------------------------------


@rule("bra")
def decode_bra(d, ins, m):
    m.take("uni")
    d.patches.append((len(d.code), d.function, ins.scope, ins.operands[0]))
    d.emit("bra")


@rule("brx")
def decode_brx(d, ins, m):
    m.take("idx", "uni")
    index = d.source(ins.operands[0], "u32")
    _, labels = ins.scope.find("tables", ins.operands[1])
    if labels is None:
        raise d.unknown(f"no .branchtargets {ins.operands[1]}")
    d.patches.append((len(d.code), d.function, ins.scope, labels))
    d.emit("brx.idx", [], [index])


@rule("ret", "exit", "trap", "brkpt")
def decode_end(d, ins, m):
    m.take("uni")
    d.emit("trap" if ins.opcode == "brkpt" else ins.opcode.split(".")[0])


@rule("call")
def decode_call(d: Decoder, ins: Instruction, m: Modifiers) -> Function | None:
    """Copies the arguments to the callee's parameters, calls, copies the result back. Returns the callee."""
    m.take("uni")
    operands = list(ins.operands)
    results = d.vector(operands.pop(0).replace("(", "{").replace(")", "}")) if operands[0].startswith("(") else []
    name = operands.pop(0)
    arguments = d.vector(operands.pop(0).replace("(", "{").replace(")", "}")) if operands else []
    arguments = [token for token in arguments if token]
    if operands or name not in d.module.functions:
        raise d.unknown("only direct calls are supported")

    def local(token):
        place = d.symbol(token)
        if place is None or place[0] != LOCAL:
            raise d.unknown(f"argument {token}")
        return place[1]

    places = [local(token) for token in arguments]
    if name == "vprintf":
        d.emit("vprintf", aux=[*places, local(results[0])])
        return None
    if name == "__assertfail":
        d.emit("__assertfail", aux=places[:4])
        return None
    callee = d.module.functions[name]
    if not callee.defined:
        raise d.unknown(f"{name} has no body")
    for variable in callee.parameters + callee.results:
        if id(variable) not in d.symbols:
            d.place(variable)
    for at, variable in zip(places, callee.parameters):
        d.emit("copy.parameter", aux=[at, d.symbols[id(variable)][1], variable.bytes])
    d.emit("call", target=name)
    for token, variable in zip(results, callee.results):
        d.emit("copy.parameter", aux=[d.symbols[id(variable)][1], local(token), variable.bytes])
    return callee


def decode(module: Module, entry: str) -> Program:
    """The kernel `entry` of a module, ready to run. Raises UnknownInstruction, PtxError."""
    function = module.functions.get(entry)
    if function is None or not function.is_entry or not function.defined:
        kernels = [name for name, f in module.functions.items() if f.is_entry and f.defined]
        raise PtxError(f"no kernel {entry!r}; the module has {kernels}")
    return Decoder(module, function).decode()
