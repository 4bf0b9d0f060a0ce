"""Integer, warp, memory and matrix instructions of the interpreter, from PTX written by hand."""

from fractions import Fraction

import numpy as np
import ptx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx.snippets import assemble, evaluate, warp

WORDS = np.random.default_rng(11).integers(0, 1 << 32, (3, 300), dtype=np.uint32)
WORDS[0, :9] = [0, 1, 31, 32, 33, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
WORDS[1, 20:29] = WORDS[0, :9]
LANES = np.arange(32)
VALUES = WORDS[0, :32].copy()

words = st.integers(0, 2**32 - 1)


def signed(x):
    return x - (1 << 32) if x >> 31 else x


def bfe(a, position, length, is_signed):
    position, length = position & 255, length & 255
    sign = is_signed and length and a >> min(position + length - 1, 31) & 1
    out = 0
    for k in range(32):
        out |= (a >> (position + k) & 1 if k < length and position + k <= 31 else bool(sign)) << k
    return out


def bfi(a, b, position, length):
    for k in range(length & 255):
        if (position & 255) + k < 32:
            b = b & ~(1 << (position & 255) + k) | (a >> k & 1) << (position & 255) + k
    return b


def prmt(a, b, selector):
    table = [(a | b << 32) >> 8 * k & 255 for k in range(8)]
    out = 0
    for k in range(4):
        s = selector >> 4 * k & 15
        byte = table[s & 7]
        out |= (byte if s < 8 else 255 * (byte >> 7)) << 8 * k
    return out


def lop3(a, b, c, table=0xCA):
    return sum((table >> ((a >> k & 1) << 2 | (b >> k & 1) << 1 | c >> k & 1) & 1) << k for k in range(32))


def truncated(a, b):
    return 0xFFFFFFFF if b == 0 else int(Fraction(signed(a), signed(b)).__trunc__())


def s8(x, k):
    byte = x >> 8 * k & 255
    return byte - 256 if byte > 127 else byte


INTEGER = {
    "add.u32 y, x0, x1;": lambda a, b, c: a + b,
    "mul.hi.u32 y, x0, x1;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 y, x0, x1;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.lo.s32 y, x0, x1, x2;": lambda a, b, c: a * b + c,
    "mad.hi.u32 y, x0, x1, x2;": lambda a, b, c: (a * b >> 32) + c,
    "mul24.lo.u32 y, x0, x1;": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "div.s32 y, x0, x1;": lambda a, b, c: truncated(a, b),
    "div.u32 y, x0, x1;": lambda a, b, c: a // b if b else 0xFFFFFFFF,
    "rem.s32 y, x0, x1;": lambda a, b, c: signed(a) - truncated(a, b) * signed(b) if b else a,
    "add.sat.s32 y, x0, x1;": lambda a, b, c: min(max(signed(a) + signed(b), -(2**31)), 2**31 - 1),
    "sad.s32 y, x0, x1, x2;": lambda a, b, c: abs(signed(a) - signed(b)) + c,
    "abs.s32 y, x0;": lambda a, b, c: abs(signed(a)),
    "shl.b32 y, x0, x1;": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 y, x0, x1;": lambda a, b, c: a >> b,
    "shr.s32 y, x0, x1;": lambda a, b, c: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 y, x0, x1, x2;": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.l.clamp.b32 y, x0, x1, x2;": lambda a, b, c: ((b << 32 | a) << min(c, 32)) >> 32,
    "shf.r.wrap.b32 y, x0, x1, x2;": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "shf.r.clamp.b32 y, x0, x1, x2;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "bfe.u32 y, x0, x1, x2;": lambda a, b, c: bfe(a, b, c, False),
    "bfe.s32 y, x0, x1, x2;": lambda a, b, c: bfe(a, b, c, True),
    "bfi.b32 y, x0, x1, x2, 7;": lambda a, b, c: bfi(a, b, c, 7),
    "bfind.u32 y, x0;": lambda a, b, c: a.bit_length() - 1,
    "bfind.s32 y, x0;": lambda a, b, c: (a if a < 2**31 else ~a & 0xFFFFFFFF).bit_length() - 1,
    "brev.b32 y, x0;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "popc.b32 y, x0;": lambda a, b, c: a.bit_count(),
    "clz.b32 y, x0;": lambda a, b, c: 32 - a.bit_length(),
    "lop3.b32 y, x0, x1, x2, 0xCA;": lop3,
    "prmt.b32 y, x0, x1, x2;": prmt,
    "prmt.b32.rc16 y, x0, x1, x2;": lambda a, b, c: prmt(a, b, (0x1010, 0x3232)[c & 1]),
    "prmt.b32.f4e y, x0, x1, x2;": lambda a, b, c: prmt(a, b, (0x3210, 0x4321, 0x5432, 0x6543)[c & 3]),
    "dp4a.s32.s32 y, x0, x1, x2;": lambda a, b, c: sum(s8(a, k) * s8(b, k) for k in range(4)) + c,
    "dp4a.u32.s32 y, x0, x1, x2;": lambda a, b, c: sum((a >> 8 * k & 255) * s8(b, k) for k in range(4)) + c,
    "dp2a.hi.u32.u32 y, x0, x1, x2;": lambda a, b, c: (a & 0xFFFF) * (b >> 16 & 255) + (a >> 16) * (b >> 24) + c,
    "add.cc.u32 %r2, x0, x1; addc.u32 y, 0, 0;": lambda a, b, c: a + b >> 32,
    "sub.cc.u32 %r2, x0, x1; subc.u32 y, x2, 0;": lambda a, b, c: c - (a < b),
    "mad.lo.cc.u32 %r2, x0, x1, x2; madc.hi.u32 y, x0, x1, 0;": lambda a, b, c: a * b + c >> 32,
    "mul.wide.u32 %d1, x0, x1; shr.u64 %d1, %d1, 16; cvt.u32.u64 y, %d1;": lambda a, b, c: a * b >> 16,
    # a source wider than its type: the low half of the register
    "mul.wide.u32 %d1, x0, x1; cvt.s64.s32 %d2, %d1; shr.u64 %d2, %d2, 20; cvt.u32.u64 y, %d2;": lambda a, b, c: (
        signed(a * b & 0xFFFFFFFF) >> 20
    ),
    "mov.b32 {%h1, %h2}, x0; mov.b32 y, {%h2, %h1};": lambda a, b, c: a >> 16 | a << 16,
    "setp.lt.s32 %p1, x0, x1; selp.b32 y, x0, x2, %p1;": lambda a, b, c: a if signed(a) < signed(b) else c,
    "setp.hi.u32 %p1, x0, x1; @!%p1 mov.b32 y, 7; @%p1 mov.b32 y, x2;": lambda a, b, c: c if a > b else 7,
    "slct.u32.s32 y, x0, x1, x2;": lambda a, b, c: a if signed(c) >= 0 else b,
    "set.ne.u32.s32 y, x0, x1;": lambda a, b, c: 0xFFFFFFFF if a != b else 0,
    "cvt.pack.sat.s16.s32 y, x0, x1;": lambda a, b, c: (
        (min(max(signed(a), -(2**15)), 2**15 - 1) & 0xFFFF) << 16 | min(max(signed(b), -(2**15)), 2**15 - 1) & 0xFFFF
    ),
}


@pytest.mark.parametrize("instruction", INTEGER)
def test_integer_instruction(instruction):
    small = WORDS.copy()
    small[1:] &= 63  # amounts of shifts, positions of fields
    small[1, :40] = np.resize([0, 1, 7, 31, 32, 33, 63], 40)
    for x in (WORDS, small):
        got = evaluate(instruction, "b32", *x)
        expected = [INTEGER[instruction](*map(int, row)) & 0xFFFFFFFF for row in x.T]
        np.testing.assert_array_equal(got, np.array(expected, np.uint32))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 255), st.lists(st.tuples(words, words, words), min_size=1, max_size=32))
def test_lop3_for_any_table(table, rows):
    x = np.array(rows, np.uint32).T
    got = evaluate(f"lop3.b32 y, x0, x1, x2, {table};", "b32", *x)
    np.testing.assert_array_equal(got, np.array([lop3(*map(int, row), table) for row in rows], np.uint32))


# ---- warps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffle(mode, width):
    """As the CUDA intrinsics of a given width: c = (32 - width) << 8, and 31 but for up."""
    for offset in (0, 1, 3, 16, 31):
        c = (32 - width) << 8 | (0 if mode == "up" else 31)
        got = warp(f"shfl.sync.{mode}.b32 y|%p1, x0, {offset}, {c}, -1; @!%p1 xor.b32 y, y, 1;", VALUES)
        first, last = LANES // width * width, LANES // width * width + width - 1
        source = {
            "up": LANES - offset,
            "down": LANES + offset,
            "bfly": LANES ^ offset,
            "idx": first | offset & (width - 1),
        }[mode]
        inside = source >= first if mode == "up" else source <= last
        expected = np.where(inside, VALUES[np.where(inside, source, 0)], VALUES ^ 1)
        np.testing.assert_array_equal(got, expected, err_msg=f"offset {offset}")


def test_votes_matches_and_reductions():
    few = (VALUES % 3).astype(np.uint32)
    setp = "setp.eq.u32 %p1, x0, 1; "
    mask = int(((few == 1) << LANES.astype(np.uint64)).sum())
    assert (warp(setp + "vote.sync.ballot.b32 y, %p1, -1;", few) == mask).all()
    assert (warp(setp + "vote.sync.any.pred %p2, %p1, -1; selp.b32 y, 1, 0, %p2;", few) == 1).all()
    assert (warp(setp + "vote.sync.all.pred %p2, !%p1, -1; selp.b32 y, 1, 0, %p2;", few) == 0).all()
    matches = [int(((few == v) << LANES.astype(np.uint64)).sum()) for v in few]
    np.testing.assert_array_equal(warp("match.any.sync.b32 y, x0, -1;", few), matches)
    assert (warp("match.all.sync.b32 y|%p1, x0, -1; @%p1 mov.b32 y, 5;", few) == 0).all()
    assert (warp("redux.sync.add.s32 y, x0, -1;", VALUES) == VALUES.sum(dtype=np.uint32)).all()
    assert (warp("redux.sync.min.s32 y, x0, -1;", VALUES) == VALUES.view(np.int32).min().view(np.uint32)).all()
    assert (warp("redux.sync.max.u32 y, x0, -1;", VALUES) == VALUES.max()).all()
    assert (warp("redux.sync.and.b32 y, x0, -1;", VALUES) == np.bitwise_and.reduce(VALUES)).all()
    assert (warp("redux.sync.xor.b32 y, x0, -1;", VALUES) == np.bitwise_xor.reduce(VALUES)).all()
    halves = "mov.u32 %r1, %laneid; shr.u32 %r1, %r1, 4; neg.s32 %r1, %r1; xor.b32 %r1, %r1, 0xFFFF;"
    half = warp(halves + "redux.sync.add.u32 y, x0, %r1;", VALUES)  # 0xFFFF, and its complement
    np.testing.assert_array_equal(half, np.repeat(VALUES.reshape(2, 16).sum(1, dtype=np.uint32), 16))


def test_activemask():
    """The lanes of the branch, and all of them where they have met again."""
    code = """and.b32 %r1, x0, 1; setp.ne.u32 %p1, %r1, 0; mov.b32 y, 0; @%p1 bra A; bra B;
    A: activemask.b32 y;
    B: bar.warp.sync -1; activemask.b32 %r2; not.b32 %r2, %r2; add.u32 y, y, %r2;"""
    odd = VALUES & 1
    np.testing.assert_array_equal(
        warp(code, VALUES), odd * int((odd.astype(np.uint64) << LANES.astype(np.uint64)).sum())
    )


def test_lanes_that_part_meet_again():
    """Loops of different lengths, a nested branch, and a shuffle of all lanes after them."""
    trips = WORDS[2, :32] % 13
    code = """
    mov.u32 %r1, 0; mov.u32 %r2, 0;
    L0: setp.ge.u32 %p1, %r1, x0; @%p1 bra L3;
      and.b32 %r3, %r1, 1; setp.eq.u32 %p2, %r3, 0; @%p2 bra L1;
      add.u32 %r2, %r2, %r1; bra L2;
    L1: sub.u32 %r2, %r2, 3;
    L2: activemask.b32 %r5; add.u32 %r1, %r1, 1; bra L0;
    L3: shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; add.u32 y, %r2, %r4;
    """
    sums = np.array([sum(i if i % 2 else -3 for i in range(t)) for t in trips.tolist()])
    np.testing.assert_array_equal(warp(code, trips).view(np.int32), sums + sums[LANES ^ 1])


def test_branch_table():
    code = """
    { T: .branchtargets A, B, C; rem.u32 %r1, x0, 3; brx.idx %r1, T; }
    A: mov.b32 y, 10; bra D;
    B: mov.b32 y, 20; bra D;
    C: mov.b32 y, 30;
    D:
    """
    np.testing.assert_array_equal(warp(code, VALUES), (VALUES % 3 + 1) * 10)


def test_functions_with_locals_called_by_parted_lanes():
    text = assemble(
        """
    mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 3; setp.eq.u32 %p1, %r1, 0;
    { .param .b32 a; .param .b32 b; st.param.b32 [a], %r0; @%p1 bra E;
      call (b), square, (a); ld.param.b32 %r2, [b]; bra F;
    E: st.param.b32 [a], 7; call (b), square, (a); ld.param.b32 %r2, [b];
    F: ld.param.u64 %d1, [out]; mad.wide.u32 %d1, %r0, 4, %d1; st.global.b32 [%d1], %r2; }
    """,
        ".param .u64 out",
    )
    function = """
.func (.param .b32 result) square(.param .b32 x) {
  .local .align 4 .b8 depot[8]; .reg .b32 %r<4>; .reg .b64 %d<2>;
  ld.param.b32 %r1, [x]; mov.u64 %d1, depot; st.local.b32 [%d1+4], %r1; ld.local.b32 %r2, [depot+4];
  mul.lo.u32 %r3, %r1, %r2; st.param.b32 [result], %r3; ret;
}
.visible .entry"""
    out = np.zeros(32, np.uint32)
    ptx.run(text.replace(".visible .entry", function), "k", 1, 32, [out])
    np.testing.assert_array_equal(out, np.where(LANES % 4 == 0, 49, LANES**2))


# ---- memory and matrices -------------------------------------------------------------------------------------------

ATOMICS = {
    "add.u32": lambda old, x: old + x,
    "min.s32": lambda old, x: min(signed(old), signed(x)),
    "max.u32": max,
    "and.b32": lambda old, x: old & x,
    "xor.b32": lambda old, x: old ^ x,
    "exch.b32": lambda old, x: x,
    "inc.u32": lambda old, x: 0 if old >= x else old + 1,
    "dec.u32": lambda old, x: x if old == 0 or old > x else old - 1,
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("op", ATOMICS)
def test_atomic_returns_what_was_there(op, space):
    cell = (
        ""
        if space == "global"
        else ".shared .align 4 .b32 cell; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.b32 [cell], 9; bar.sync 0;"
    )
    body = f"mov.u32 %r0, %tid.x; ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; ld.param.u64 %d2, [p2]; {cell}"
    body += "mad.wide.u32 %d3, %r0, 4, %d0; ld.global.b32 %r1, [%d3];"
    body += f"atom.{space}.{op} %r2, [{'%d1' if space == 'global' else 'cell'}], %r1;"
    body += "mad.wide.u32 %d3, %r0, 4, %d2; st.global.b32 [%d3], %r2;"
    x, cell, out = WORDS[0, :32].copy(), np.array([9], np.uint32), np.zeros(32, np.uint32)
    ptx.run(assemble(body, ".param .u64 p0, .param .u64 p1, .param .u64 p2"), "k", 1, 32, [x, cell, out])
    old, expected = 9, []
    for value in x.tolist():
        expected.append(old)
        old = ATOMICS[op](old, value) & 0xFFFFFFFF
    np.testing.assert_array_equal(out, np.array(expected, np.uint32))
    assert space == "shared" or cell[0] == old


def test_compare_and_swap_and_packed_reductions():
    body = """ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; ld.param.u64 %d2, [p2]; mov.u32 %r0, %tid.x;
    add.u32 %r1, %r0, 1; atom.global.cas.b32 %r2, [%d0], %r0, %r1;
    mov.b32 %r3, 0x3F803F80; red.global.add.noftz.bf16x2 [%d1], %r3;
    mov.b32 %r4, 0f3F000000; red.global.add.f32 [%d2], %r4;"""
    cell, pair, sum_ = np.zeros(1, np.uint32), np.zeros(1, np.uint32), np.zeros(1, np.float32)
    ptx.run(assemble(body, ".param .u64 p0, .param .u64 p1, .param .u64 p2"), "k", 1, 32, [cell, pair, sum_])
    assert (cell[0], pair[0], sum_[0]) == (32, 0x42004200, 16)  # 32 in bf16, twice


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_ldmatrix_stmatrix_and_movmatrix(tiles, transposed):
    trans = ".trans" if transposed else ""
    names = ", ".join(f"%r{10 + k}" for k in range(tiles))
    body = f""".shared .align 16 .b8 s[512]; .shared .align 16 .b8 t[512];
    mov.u32 %r0, %tid.x; ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1];
    mad.wide.u32 %d2, %r0, 16, %d0; ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d2];
    shl.b32 %r5, %r0, 4; mov.u32 %r6, s; add.u32 %r6, %r6, %r5; st.shared.v4.b32 [%r6], {{%r1, %r2, %r3, %r4}};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x{tiles}{trans}.shared.b16 {{{names}}}, [%r6];
    movmatrix.sync.aligned.m8n8.trans.b16 %r10, %r10;
    mov.u32 %r7, t; add.u32 %r7, %r7, %r5; stmatrix.sync.aligned.m8n8.x{tiles}.shared.b16 [%r7], {{{names}}};
    bar.warp.sync -1; setp.lt.u32 %p1, %r0, {8 * tiles}; @!%p1 ret;
    ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r7]; mad.wide.u32 %d2, %r0, 16, %d1;
    st.global.v4.b32 [%d2], {{%r1, %r2, %r3, %r4}};"""
    x = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((tiles, 8, 8), np.uint16)
    ptx.run(assemble(body, ".param .u64 p0, .param .u64 p1"), "k", 1, 32, [x, out])
    expected = x[:tiles].transpose(0, 2, 1).copy() if transposed else x[:tiles].copy()
    expected[0] = expected[0].T
    np.testing.assert_array_equal(out, expected)


# shape: rows, depth, registers of A and B, elements in a register
MMA = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": ("bf16", 16, 16),
    "m16n8k8.row.col.f32.bf16.bf16.f32": ("bf16", 16, 8),
    "m16n8k16.row.col.f32.f16.f16.f32": ("f16", 16, 16),
    "m16n8k16.row.col.f16.f16.f16.f16": ("f16", 16, 16),
    "m16n8k8.row.col.f32.tf32.tf32.f32": ("tf32", 16, 8),
    "m16n8k4.row.col.f32.tf32.tf32.f32": ("tf32", 16, 4),
    "m16n8k32.row.col.s32.s8.s8.s32": ("s8", 16, 32),
    "m16n8k16.row.col.s32.u8.s8.s32": ("u8", 16, 16),
    "m8n8k16.row.col.s32.s8.s8.s32": ("s8", 8, 16),
    "m8n8k4.row.col.f64.f64.f64.f64": ("f64", 8, 4),
}


@pytest.mark.parametrize("shape", MMA)
def test_mma_fragments(shape):
    """Against the fragment tables of the PTX manual, with small integers, so exactly."""
    kind, rows, depth = MMA[shape]
    rng = np.random.default_rng(0)
    low = 0 if kind == "u8" else -8
    a, b = rng.integers(low, 9, (rows, depth)), rng.integers(-8, 9, (depth, 8))
    c = rng.integers(-50, 50, (rows, 8))
    element = {"bf16": 2, "f16": 2, "tf32": 4, "s8": 1, "u8": 1, "f64": 8}[kind]
    half = ".f16.f16.f16.f16" in shape

    def encode(matrix):
        if kind == "bf16":
            return (matrix.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return matrix.astype({"f16": np.float16, "tf32": np.float32, "f64": np.float64}.get(kind, np.int8))

    per = max(4 // element, 1)
    fragments = {"a": [], "b": [], "c": []}
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for r in range(rows // 8 * depth // (4 * per)):  # a: rows alternate, then the columns of the next quarter
            row, col = g + 8 * (r % 2 if rows == 16 else 0), t * per + 4 * per * (r // 2 if rows == 16 else r)
            fragments["a"].append(encode(a[row, col : col + per]))
        for r in range(depth // (4 * per)):
            fragments["b"].append(encode(b[t * per + 4 * per * r :, g][:per].copy()))
        for r in range(rows // 8):
            pair = c[g + 8 * r, 2 * t : 2 * t + 2]
            fragments["c"].append(
                pair.astype(
                    np.float16
                    if half
                    else np.float64
                    if kind == "f64"
                    else np.float32
                    if kind in ("bf16", "f16", "tf32")
                    else np.int32
                )
            )
    arrays = [np.concatenate([f.view(np.uint8) for f in fragments[k]]) for k in "abc"]
    width = 8 if kind == "f64" else 4
    counts = [array.size // 32 // width for array in arrays]
    prefix, type_ = ("%d", "b64") if kind == "f64" else ("%r", "b32")
    names, at = [], 10
    for count in counts:
        names.append([f"{prefix}{at + k}" for k in range(count)])
        at += count
    body = "mov.u32 %r0, %tid.x; "
    for k, group in enumerate(names):
        body += f"ld.param.u64 %d0, [p{k}]; mad.wide.u32 %d0, %r0, {width * len(group)}, %d0; "
        body += "".join(f"ld.global.{type_} {name}, [%d0+{width * j}]; " for j, name in enumerate(group))
    result, braces = names[2], ["{" + ", ".join(group) + "}" for group in names]
    body += f"mma.sync.aligned.{shape} {braces[2]}, {braces[0]}, {braces[1]}, {braces[2]}; "
    body += f"ld.param.u64 %d0, [p2]; mad.wide.u32 %d0, %r0, {width * len(result)}, %d0; "
    body += "".join(f"st.global.{type_} [%d0+{width * j}], {name}; " for j, name in enumerate(result))
    ptx.run(assemble(body, ".param .u64 p0, .param .u64 p1, .param .u64 p2"), "k", 1, 32, arrays)
    out = arrays[2].view(
        np.float16
        if half
        else np.float64
        if kind == "f64"
        else np.float32
        if kind in ("bf16", "f16", "tf32")
        else np.int32
    )
    got = np.zeros((rows, 8))
    for k, value in enumerate(out.reshape(32, rows // 8, 2)):
        for r in range(rows // 8):
            got[k // 4 + 8 * r, k % 4 * 2 : k % 4 * 2 + 2] = value[r]
    np.testing.assert_array_equal(got, a @ b + c)


# ---- barriers ------------------------------------------------------------------------------------------------------


def test_named_barriers_order_a_producer_and_its_consumer():
    """Two warps hand a buffer to and fro with bar.sync and bar.arrive; no finding."""
    body = """.shared .align 4 .b32 s[32];
    mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 31; mad.lo.u32 %r2, %r1, 4, 0; mov.u32 %r3, s; add.u32 %r2, %r2, %r3;
    mov.u32 %r4, 0; mov.u32 %r5, 0; setp.ge.u32 %p1, %r0, 32; @%p1 bra CONSUME;
    PRODUCE: add.u32 %r6, %r4, %r1; st.shared.b32 [%r2], %r6; bar.arrive 1, 64; bar.sync 2, 64;
      add.u32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, 4; @%p2 bra PRODUCE; ret;
    CONSUME: bar.sync 1, 64; xor.b32 %r7, %r2, 4; ld.shared.b32 %r6, [%r7]; bar.arrive 2, 64; add.u32 %r5, %r5, %r6;
      add.u32 %r4, %r4, 1; setp.lt.u32 %p2, %r4, 4; @%p2 bra CONSUME;
    ld.param.u64 %d0, [p0]; mad.wide.u32 %d0, %r1, 4, %d0; st.global.b32 [%d0], %r5;"""
    out = np.zeros(32, np.uint32)
    ptx.run(assemble(body, ".param .u64 p0"), "k", 1, 64, [out])
    np.testing.assert_array_equal(out, 4 * (LANES ^ 1) + 6)
    early = body.replace("bar.arrive 2, 64;", "").replace("bar.sync 1, 64;", "bar.sync 1, 64; bar.arrive 2, 64;")
    with pytest.raises(ptx.KernelFault, match="race"):  # the buffer is given back before it is read
        ptx.run(assemble(early, ".param .u64 p0"), "k", 1, 64, [out])


def test_barrier_reductions():
    body = """mov.u32 %r0, %tid.x; setp.lt.u32 %p1, %r0, 40; bar.red.popc.u32 %r1, 0, %p1; bar.red.and.pred %p2, 0, %p1;
    bar.red.or.pred %p3, 0, %p1; selp.b32 %r2, 100, 0, %p2; selp.b32 %r3, 1000, 0, %p3; add.u32 %r1, %r1, %r2;
    add.u32 %r1, %r1, %r3; ld.param.u64 %d0, [p0]; mad.wide.u32 %d0, %r0, 4, %d0; st.global.b32 [%d0], %r1;"""
    out = np.zeros(96, np.uint32)
    ptx.run(assemble(body, ".param .u64 p0"), "k", 1, 96, [out])
    assert (out == 1040).all()
