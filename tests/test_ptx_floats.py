"""Floating-point instructions and conversions of the interpreter, against exact arithmetic."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from ptx.snippets import FORMATS, NAN, decode, evaluate, exact, is_special, patterns, round_to, warp


def assert_bits(got, expected, kind, *inputs):
    for k, (g, e) in enumerate(zip(got.tolist(), expected)):
        if e is None:  # NaN of f64, whose payload is open
            assert math.isnan(decode(g, kind))
        else:
            assert g == e, f"{[hex(int(x[k])) for x in inputs]} -> {g:#x}, expected {e:#x}"


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma", "div"])
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_arithmetic_is_rounded_once(kind, op, mode):
    count = 3 if op == "fma" else 2
    inputs = [patterns(kind, 150, seed) for seed in range(count)]
    sources = ", ".join(f"x{k}" for k in range(count))
    got = evaluate(f"{op}.{mode}.{kind} y, {sources};", f"b{8 * FORMATS[kind][2]}", *inputs)
    expected = [exact(op, [decode(x, kind) for x in row], kind, mode) for row in zip(*inputs)]
    assert_bits(got, expected, kind, *inputs)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_arithmetic_is_rounded_once_alone_and_in_pairs(kind, op):
    count = 3 if op == "fma" else 2
    inputs = [patterns(kind, 200, seed) for seed in range(count)]
    sources = ", ".join(f"x{k}" for k in range(count))
    expected = [exact(op, [decode(x, kind) for x in row], kind, "rn") for row in zip(*inputs)]
    assert_bits(evaluate(f"{op}.rn.{kind} y, {sources};", "b16", *inputs), expected, kind, *inputs)
    pairs = evaluate(f"{op}.rn.{kind}x2 y, {sources};", "b32", *(x.view(np.uint32) for x in inputs))
    assert_bits(pairs.view(np.uint16), expected, kind, *inputs)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_half_arithmetic_saturates(op):
    """To [0, 1], NaN to 0, -0 to 0; .relu of an fma only from below, NaN kept; alone and in pairs."""
    count = 3 if op == "fma" else 2
    inputs = [patterns("f16", 200, seed) for seed in range(count)]
    sources = ", ".join(f"x{k}" for k in range(count))
    exact_bits = [exact(op, [decode(x, "f16") for x in row], "f16", "rn") for row in zip(*inputs)]

    def saturated(bits):
        value = decode(bits, "f16")
        return 0 if math.isnan(value) or value <= 0 else min(bits, 0x3C00)

    pairs = [x.view(np.uint32) for x in inputs]
    expected = [saturated(bits) for bits in exact_bits]
    assert_bits(evaluate(f"{op}.rn.sat.f16 y, {sources};", "b16", *inputs), expected, "f16", *inputs)
    got = evaluate(f"{op}.rn.sat.f16x2 y, {sources};", "b32", *pairs).view(np.uint16)
    assert_bits(got, expected, "f16", *inputs)
    if op == "fma":
        expected = [0 if bits >> 15 else bits for bits in exact_bits]
        assert_bits(evaluate(f"fma.rn.relu.f16 y, {sources};", "b16", *inputs), expected, "f16", *inputs)
        got = evaluate(f"fma.rn.relu.f16x2 y, {sources};", "b32", *pairs).view(np.uint16)
        assert_bits(got, expected, "f16", *inputs)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_sqrt_is_rounded_once(mode):
    x = patterns("f32", 150, 0)
    got = evaluate(f"sqrt.{mode}.f32 y, x0;", "b32", x)
    for bits, y in zip(x, got):
        value, root = decode(bits, "f32"), decode(y, "f32")
        if is_special(value) or value < 0:
            assert math.isnan(root) if not value >= 0 else root == math.inf
            continue
        low, high = (decode(int(y) + d, "f32") if int(y) + d >= 0 else 0 for d in (-1, 1))
        if mode == "rn":
            assert (root + low) ** 2 <= 4 * value <= (root + high) ** 2 or root**2 * 1 == value
        elif mode == "rp":
            assert low**2 < value <= root**2 or value == 0
        else:
            assert root**2 <= value < high**2


def test_ftz_and_sat():
    x, y = patterns("f32", 200, 1), patterns("f32", 200, 2)

    def flush(v):
        bits = v.view(np.uint32)
        return np.where(bits & 0x7F800000, bits, bits & 0x80000000).view(np.float32)

    with np.errstate(all="ignore"):
        product = flush(flush(x.view(np.float32)) * flush(y.view(np.float32)))
    expected = np.where(np.isnan(product), np.float32(np.nan), product).view(np.uint32)
    expected[np.isnan(product)] = NAN["f32"]
    np.testing.assert_array_equal(evaluate("mul.ftz.f32 y, x0, x1;", "b32", x, y), expected)
    with np.errstate(all="ignore"):
        clamped = np.clip(x.view(np.float32) + y.view(np.float32), 0, 1)
    clamped = np.where(np.isnan(clamped), 0, clamped) + np.float32(0)
    got = evaluate("add.sat.f32 y, x0, x1;", "b32", x, y).view(np.float32)
    np.testing.assert_array_equal(got, clamped)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_min_and_max_prefer_numbers_and_negative_zero(kind):
    x, y = patterns(kind, 200, 1), patterns(kind, 200, 2)
    result = f"b{8 * FORMATS[kind][2]}"

    def key(bits):
        value = decode(bits, kind)
        return value if not isinstance(value, float) or not math.isnan(value) else None

    for op, choose in (("min", min), ("max", max)):
        got = evaluate(f"{op}.{kind} y, x0, x1;", result, x, y)
        propagated = evaluate(f"{op}.NaN.{kind} y, x0, x1;", result, x, y) if kind != "f64" else None
        for k, (a, b) in enumerate(zip(x, y)):
            u, v = key(a), key(b)
            if u is None or v is None:
                assert propagated is None or propagated[k] == NAN[kind]
                if u is None and v is None:
                    assert kind == "f64" or got[k] == NAN[kind]
                else:
                    assert got[k] == (b if u is None else a)
            elif u == v == 0:
                assert got[k] == (a | b if op == "min" else a & b)
            else:
                assert key(got[k]) == choose(u, v)


def test_comparisons_with_nan():
    x, y = patterns("f32", 200, 3), np.roll(patterns("f32", 200, 3), 1)
    a, b = x.view(np.float32), y.view(np.float32)
    unordered = np.isnan(a) | np.isnan(b)
    with np.errstate(all="ignore"):
        ordered = {"eq": a == b, "ne": (a != b) & ~unordered, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    expected = {
        **ordered,
        **{f"{op}u": truth | unordered for op, truth in ordered.items()},
        "num": ~unordered,
        "nan": unordered,
    }
    for op, truth in expected.items():
        got = evaluate(f"setp.{op}.f32 %p1, x0, x1; selp.b32 y, 1, 0, %p1;", "b32", x, y)
        np.testing.assert_array_equal(got, truth, err_msg=op)
    got = evaluate("setp.lt.and.f32 %p1|%p2, x0, x1, %p3; selp.b32 y, 1, 0, %p2;".replace("%p3", "1"), "b32", x, y)
    np.testing.assert_array_equal(got, ~ordered["lt"])


# ---- conversions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_every_half_to_float(kind):
    x = np.arange(1 << 16, dtype=np.uint16)
    got = evaluate(f"cvt.f32.{kind} y, x0;", "b32", x).view(np.float32)
    expected = x.view(np.float16).astype(np.float32) if kind == "f16" else (x.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_float_to_half(kind, mode):
    x = np.concatenate([patterns("f32", 300, 4), _around_halves(kind)])
    got = evaluate(f"cvt.{mode}.{kind}.f32 y, x0;", "b16", x)
    expected = [round_to(decode(v, "f32"), kind, mode) for v in x]
    assert_bits(got, expected, kind, x)
    relu = evaluate(f"cvt.{mode}.relu.{kind}.f32 y, x0;", "b16", x)
    assert_bits(relu, [0 if e >> 15 else e for e in expected], kind, x)
    y = np.roll(x, 1)
    pair = evaluate(f"cvt.{mode}.{kind}x2.f32 y, x0, x1;", "b32", x, y)
    assert_bits(pair >> 16, expected, kind, x)
    assert_bits(pair & 0xFFFF, np.roll(expected, 1), kind, y)


def _around_halves(kind):
    """Floats at, just below and just above the midpoints between neighbours."""
    halves = np.random.default_rng(0).integers(0, FORMATS[kind][1] * 2 << FORMATS[kind][0], 60)
    out = []
    for h in halves.tolist():
        middle = (Fraction(decode(h, kind)) + Fraction(decode(h + 1, kind))) / 2
        bits = round_to(middle, "f32")
        out += [bits - 1, bits, bits + 1]
    return np.array(out, np.uint32)


@pytest.mark.parametrize("source", ["f16", "f32", "f64"])
@pytest.mark.parametrize("result", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_float_to_integer_clamps(source, result):
    x = patterns(source, 100, 5)
    scale = np.concatenate([patterns(source, 60, 6), _integers_near_limits(source)])
    x = np.concatenate([x, scale])
    bits, signed = int(result[1:]), result[0] == "s"
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    for mode, rounding in (("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)):
        got = evaluate(f"cvt.{mode}.{result}.{source} %d1, x0; mov.b64 y, %d1;", "b64", x)
        for v, g in zip(x, got):
            value = decode(v, source)
            if isinstance(value, float) and math.isnan(value):
                expected = 0 if source != "f64" and bits < 64 else (low if signed else 1 << bits - 1)
            elif isinstance(value, float) and math.isinf(value):
                expected = high if value > 0 else low
            else:
                expected = min(max(rounding(Fraction(value)), low), high)
            assert int(g) == expected & (1 << 64) - 1, (mode, value)


def _integers_near_limits(kind):
    out = []
    for bits in (7, 8, 15, 16, 31, 32, 63, 64):
        for sign, offset in itertools.product((1, -1), (-1, Fraction(-1, 2), 0, Fraction(1, 2), 1)):
            out.append(round_to(sign * (Fraction(2) ** bits + offset), kind))
    return np.array(out, f"u{FORMATS[kind][2]}")


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_integer_to_float(mode):
    rng = np.random.default_rng(7)
    x = rng.integers(0, 1 << 63, 200, dtype=np.uint64) >> rng.integers(0, 63, 200, dtype=np.uint64)
    x = np.concatenate([x, ~x, np.array([0, (1 << 64) - 1, 1 << 63, (1 << 24) + 1, (1 << 53) + 1], np.uint64)])
    for source, view in (("u64", x), ("s64", x.view(np.int64))):
        for result in ("f16", "f32", "f64"):
            size = FORMATS[result][2]
            got = evaluate(f"cvt.{mode}.{result}.{source} y, x0;", f"b{8 * size}", x)
            assert_bits(got, [round_to(Fraction(int(v)), result, mode) for v in view], result, x)


def test_integer_to_integer_extends_and_saturates():
    x = np.random.default_rng(8).integers(0, 1 << 32, 200, dtype=np.uint32)
    x[:8] = [0, 127, 128, 255, 256, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
    signed = x.view(np.int32)
    np.testing.assert_array_equal(evaluate("cvt.s64.s32 y, x0;", "b64", x), signed.astype(np.int64).view(np.uint64))
    np.testing.assert_array_equal(
        evaluate("cvt.s32.s8 y, x0;", "b32", x), x.astype(np.int8).astype(np.int32).view(np.uint32)
    )
    np.testing.assert_array_equal(evaluate("cvt.u32.u16 y, x0;", "b32", x), x & 0xFFFF)
    np.testing.assert_array_equal(
        evaluate("cvt.sat.u8.s32 %r2, x0; mov.b32 y, %r2;", "b32", x), np.clip(signed, 0, 255)
    )
    got = evaluate("cvt.sat.s8.u32 %r2, x0; mov.b32 y, %r2;", "b32", x)
    np.testing.assert_array_equal(got, np.minimum(x, 127))


def test_round_to_integral_and_tf32():
    x = patterns("f32", 200, 9)
    a = x.view(np.float32)
    with np.errstate(all="ignore"):
        for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
            np.testing.assert_array_equal(
                evaluate(f"cvt.{mode}.f32.f32 y, x0;", "b32", x).view(np.float32), function(a)
            )
    got = evaluate("cvt.rna.tf32.f32 y, x0;", "b32", x)
    finite = ~np.isnan(a)
    np.testing.assert_array_equal(
        got[finite], (x[finite].astype(np.uint64) + 0x1000 & ~np.uint64(0x1FFF)).astype(np.uint32)
    )
    assert (got[~finite] == NAN["f32"]).all()


APPROXIMATIONS = {
    "ex2.approx.f32": np.exp2,
    "lg2.approx.f32": np.log2,
    "rcp.approx.f32": lambda x: 1 / x,
    "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x),
    "sqrt.approx.f32": np.sqrt,
    "sin.approx.f32": np.sin,
    "cos.approx.f32": np.cos,
    "tanh.approx.f32": np.tanh,
}


@pytest.mark.parametrize("instruction", APPROXIMATIONS)
def test_approximations_are_within_one_last_bit(instruction):
    """They are computed in double and rounded: closer than the hardware's, whose errors `chip` gives."""
    x = np.concatenate([patterns("f32", 300, 10), np.linspace(-8, 8, 400, dtype=np.float32).view(np.uint32)])
    with np.errstate(all="ignore"):
        exact_value = APPROXIMATIONS[instruction](x.view(np.float32).astype(np.float64))
        expected = exact_value.astype(np.float32)
    got = evaluate(f"{instruction} y, x0;", "b32", x).view(np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    ok = ~np.isnan(expected)
    got, expected = got[ok], expected[ok]
    with np.errstate(all="ignore"):
        assert ((got == expected) | (np.abs(got - expected) <= np.spacing(np.abs(expected)))).all()


def _ulps(n):
    return lambda x, y: n * np.spacing(np.abs(y.astype(np.float32))).astype(np.float64)


# PTX ISA 9.0, "Floating Point Instructions": the largest error of each, by input and exact result.
DOCUMENTED = {
    "ex2.approx.f32": _ulps(2),
    "lg2.approx.f32": lambda x, y: np.where((x > 0.5) & (x < 2), 2**-22.6, 2**-22 * np.abs(y)),
    "rcp.approx.f32": _ulps(1),
    "rsqrt.approx.f32": lambda x, y: 2**-22.9 * y,
    "sqrt.approx.f32": lambda x, y: 2**-23 * y,
    "sin.approx.f32": lambda x, y: np.full_like(x, 2**-20.5),
    "cos.approx.f32": lambda x, y: np.full_like(x, 2**-20.5),
    "tanh.approx.f32": lambda x, y: 2**-11 * np.abs(y),
    "div.full.f32": _ulps(2),
}


@pytest.mark.parametrize("instruction", DOCUMENTED)
def test_a_chips_approximations_are_off_by_what_is_documented(instruction):
    """No more than that, up, down or scattered; zeros and what the ISA lists as exact stay exact."""
    x = np.linspace(2**-7, 6, 999, dtype=np.float32)  # with an exact 1
    inputs = [x.view(np.uint32)] * (2 if instruction.startswith("div") else 1)
    sources = "x0, x1" if len(inputs) == 2 else "x0"
    if len(inputs) == 2:
        inputs[1] = np.roll(inputs[0], 1)
        exact_value = x.astype(np.float64) / np.roll(x, 1)
    else:
        exact_value = APPROXIMATIONS[instruction](x.astype(np.float64))
    most = DOCUMENTED[instruction](x.astype(np.float64), exact_value)
    got = {
        chip: evaluate(f"{instruction} y, {sources};", "b32", *inputs, chip=chip).view(np.float32).astype(np.float64)
        for chip in ("high", "low", "scattered")
    }
    off = {chip: value - exact_value for chip, value in got.items()}
    for error in off.values():
        assert (np.abs(error) <= most * (1 + 1e-12)).all()
    some = most > 1.5 * np.spacing(np.abs(exact_value).astype(np.float32))  # or rounding hides most of it
    assert (off["high"] >= 0).all()
    assert (off["low"] <= 0).all()
    if some.any():
        assert (off["high"][some] > 0.3 * most[some]).all()
        assert (off["low"][some] < -0.3 * most[some]).all()
        share = off["scattered"][some] / most[some]
        assert share.min() < -0.1 < 0.1 < share.max()
    zero = np.zeros(1, np.uint32)
    if instruction in ("ex2.approx.f32", "cos.approx.f32", "sin.approx.f32", "tanh.approx.f32", "rcp.approx.f32"):
        same = [evaluate(f"{instruction} y, x0;", "b32", zero, chip=chip) for chip in (None, "high", "low")]
        assert same[0] == same[1] == same[2]


def test_a_chips_mma_truncates_its_sums():
    """Of the 17 terms eight products at a time, aligned to the largest and cut 24 bits below it; exact without a chip.

    Row g of A and column g of B lie in lanes 4g to 4g+3, two numbers a register; y is row g, column 2t.
    """
    rng = np.random.default_rng(0)

    def drawn(rows):
        """bfloat16 of sizes from 2^-12 to 2^12."""
        x = (rng.standard_normal((rows, 16)) * 2.0 ** rng.integers(-12, 13, (rows, 16))).astype(np.float32)
        return x.view(np.uint32) >> 16

    a, b = drawn(8), drawn(8)
    c = rng.standard_normal(32).astype(np.float32)

    def registers(x):
        lanes = [(lane // 4, 2 * (lane % 4)) for lane in range(32)]
        return [np.array([x[g][k + t] | x[g][k + t + 1] << 16 for g, t in lanes], np.uint32) for k in (0, 8)]

    code = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {y, %r4, %r5, %r6}, {x0, x0, x1, x1}, {x2, x3}, "
    inputs = [*registers(a), *registers(b), c.view(np.uint32)]
    got = warp(code + "{x4, x4, x4, x4};", *inputs, chip="scattered")
    exact_value = warp(code + "{x4, x4, x4, x4};", *inputs)

    def cut(value, bits):
        return Fraction(math.trunc(value * Fraction(2) ** bits)) / Fraction(2) ** bits

    def size(value):
        return math.frexp(float(value))[1] - 1

    differs = 0
    for lane in range(32):
        total = Fraction(float(c[lane]))
        for k0 in (0, 8):
            pairs = [[decode(x[k] << 16, "f32") for x in (a[lane // 4], b[2 * (lane % 4)])] for k in range(k0, k0 + 8)]
            top = max(size(total), *(size(x) + size(y) for x, y in pairs))
            total = sum((cut(x * y, 24 - top) for x, y in pairs), cut(total, 24 - top))
            total = decode(round_to(total, "f32", "rz"), "f32")
        assert decode(got[lane], "f32") == total
        differs += got[lane] != exact_value[lane]
    assert differs > 8
