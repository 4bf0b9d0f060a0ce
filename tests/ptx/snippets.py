"""For the tests: kernels around a few instructions, and exact arithmetic to hold them against."""

import math
from fractions import Fraction

import numpy as np

from ptx.launch import run

SIZES = {"b16": 2, "f16": 2, "bf16": 2, "b32": 4, "f32": 4, "b64": 8, "f64": 8}


def assemble(body, parameters="", registers="", arch=80):
    return f"""
.version 8.7
.target sm_{arch}
.address_size 64
.visible .entry k({parameters}) {{
  .reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<40>; .reg .b64 %d<40>; {registers}
  {body}
  ret;
}}"""


def evaluate(instructions, result, *inputs, arch=80, **options):
    """Runs instructions on every row of the inputs: unsigned arrays of bit patterns in x0, x1, ...; the result is y.

    `result` is the type of y, b16, b32 or b64. options: of `run`.
    """
    n = len(inputs[0])
    pointers = ", ".join(f".param .u64 p{k}" for k in range(len(inputs) + 1))
    code = "mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mad.lo.u32 %r0, %r1, 128, %r0; "
    code += f"setp.ge.u32 %p0, %r0, {n}; @%p0 ret; "
    registers = f".reg .{result} y; "
    for k, x in enumerate(inputs):
        type_ = f"b{8 * x.itemsize}"
        registers += f".reg .{type_} x{k}; "
        code += f"ld.param.u64 %d0, [p{k}]; mad.wide.u32 %d0, %r0, {x.itemsize}, %d0; ld.global.{type_} x{k}, [%d0]; "
    size = SIZES[result]
    code += instructions
    code += f" ld.param.u64 %d0, [p{len(inputs)}]; mad.wide.u32 %d0, %r0, {size}, %d0; st.global.{result} [%d0], y;"
    out = np.zeros(n, f"u{size}")
    inputs = [np.ascontiguousarray(x) for x in inputs]
    run(assemble(code, pointers, registers, arch), "k", -(-n // 128), 128, [*inputs, out], **options)
    return out


def warp(instructions, *inputs, result="b32", threads=32, **options):
    """One warp; inputs and options as in `evaluate`."""
    pointers = ", ".join(f".param .u64 p{k}" for k in range(len(inputs) + 1))
    code, registers = "mov.u32 %r0, %tid.x; ", f".reg .{result} y; "
    for k in range(len(inputs)):
        registers += f".reg .b32 x{k}; "
        code += f"ld.param.u64 %d0, [p{k}]; mad.wide.u32 %d0, %r0, 4, %d0; ld.global.b32 x{k}, [%d0]; "
    code += (
        instructions + f" ld.param.u64 %d0, [p{len(inputs)}]; mad.wide.u32 %d0, %r0, 4, %d0; st.global.b32 [%d0], y;"
    )
    out = np.zeros(threads, np.uint32)
    run(assemble(code, pointers, registers), "k", 1, threads, [*inputs, out], **options)
    return out


# ---- exact arithmetic ----------------------------------------------------------------------------------------------

FORMATS = {"f16": (10, 15, 2), "bf16": (7, 127, 2), "f32": (23, 127, 4), "f64": (52, 1023, 8)}  # mantissa, bias, bytes
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}


def decode(bits, kind):
    """A Fraction, or a float for infinities, NaN and -0."""
    mantissa, bias, size = FORMATS[kind]
    bits = int(bits)
    sign = -1 if bits >> (8 * size - 1) else 1
    exponent, fraction = bits >> mantissa & (2 * bias + 1), bits & ((1 << mantissa) - 1)
    if exponent == 2 * bias + 1:
        return math.nan if fraction else sign * math.inf
    if exponent == 0 and fraction == 0 and sign < 0:
        return -0.0
    value = Fraction(fraction if exponent == 0 else fraction + (1 << mantissa)) * Fraction(2) ** (
        max(exponent, 1) - bias - mantissa
    )
    return sign * value


def round_to(value, kind, mode="rn", negative_zero=False):
    """Bits of a Fraction (or special float) rounded once."""
    mantissa, bias, size = FORMATS[kind]
    sign_bit, infinity = 1 << (8 * size - 1), (2 * bias + 1) << mantissa
    if isinstance(value, float):
        if math.isnan(value):
            return NAN.get(kind)
        if math.isinf(value):
            return infinity | (sign_bit if value < 0 else 0)
        value, negative_zero = Fraction(value), math.copysign(1, value) < 0
    if value == 0:
        return sign_bit if negative_zero else 0
    negative, value = value < 0, abs(value)
    exponent = max(_floor_log2(value), 1 - bias)
    scaled = value / Fraction(2) ** (exponent - mantissa)
    low = math.floor(scaled)
    rest = scaled - low
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low & 1),
        "rz": False,
        "rm": bool(rest) and negative,
        "rp": bool(rest) and not negative,
    }[mode]
    low += bool(up)
    bits = low + ((exponent + bias - 1) << mantissa) if low >= 1 << mantissa or exponent > 1 - bias else low
    if bits >= infinity:
        away = mode == "rn" or mode == ("rm" if negative else "rp")
        bits = infinity if away else infinity - 1
    return bits | (sign_bit if negative else 0)


def _floor_log2(value):
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


def is_special(*values):
    return any(isinstance(v, float) and v != 0 for v in values)


def exact(op, values, kind, mode):
    """Bits of the correctly rounded result, by Fractions; special values by Python's floats."""
    signs = [math.copysign(1, v) if isinstance(v, float) else (-1 if v < 0 else 1) for v in values]
    floats = [v if isinstance(v, float) else float(v > 0) - float(v < 0) for v in values]  # enough for special values
    fractions = [Fraction(v) if not is_special(v) else None for v in values]
    zero_sum = mode == "rm"
    if op in ("add", "sub"):
        if op == "sub":
            signs[1], floats[1] = -signs[1], -floats[1]
            fractions[1] = -fractions[1] if fractions[1] is not None else None
        if is_special(*values):
            return round_to(floats[0] + floats[1], kind)
        both = signs[0] < 0 and signs[1] < 0 if fractions[0] == fractions[1] == 0 else zero_sum
        if fractions[0] == fractions[1] == 0 and signs[0] != signs[1]:
            both = zero_sum
        return round_to(fractions[0] + fractions[1], kind, mode, both)
    if op == "mul":
        if is_special(*values):
            return round_to(floats[0] * floats[1], kind)
        return round_to(fractions[0] * fractions[1], kind, mode, signs[0] != signs[1])
    if op == "fma":
        if is_special(*values):
            return round_to(floats[0] * floats[1] + floats[2], kind)
        product, sign = fractions[0] * fractions[1], signs[0] * signs[1]
        if product == 0 and fractions[2] == 0:
            negative = sign < 0 if sign == signs[2] else zero_sum
        else:
            negative = zero_sum
        total = product + fractions[2]
        return round_to(total, kind, mode, negative)
    if op == "div":
        if is_special(*values) or fractions[1] == 0:
            with np.errstate(all="ignore"):
                return round_to(float(np.float64(floats[0]) / np.float64(floats[1])), kind)
        return round_to(fractions[0] / fractions[1], kind, mode, signs[0] != signs[1])
    raise AssertionError(op)


def patterns(kind, n, seed):
    """Bit patterns: random, random near one, and everything special, shuffled."""
    mantissa, bias, size = FORMATS[kind]
    rng = np.random.default_rng(seed)
    top, one = (2 * bias + 1) << mantissa, bias << mantissa
    special = [0, 1, 2, (1 << mantissa) - 1, 1 << mantissa, one - 1, one, one + 1, top - 1, top, top + 1]
    special += [x | 1 << (8 * size - 1) for x in special]
    random = rng.integers(0, 1 << (8 * size), n, dtype=np.uint64)
    near = one + rng.integers(-(1 << (mantissa + 2)), 1 << (mantissa + 2), n)
    near = near.astype(np.uint64) | rng.integers(0, 2, n, dtype=np.uint64) << np.uint64(8 * size - 1)
    out = np.concatenate([random, near, np.resize(np.array(special, np.uint64), n)])
    rng.shuffle(out)
    return out.astype(f"u{size}")
