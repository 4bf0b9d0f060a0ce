"""exp, log and division for outputs in float32, as close as nvcc's.

tl.exp, tl.log and `/` are the chip's approximations, ex2, lg2 and div.full. The first two multiply by log2 e and ln 2,
and lose what the products round. Outputs of 16 bits do not show it, and keep them.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.92596298909109e-08)  # log2 e minus its float32
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp_float32(x):
    """e^x for x <= 88, corrected by what rounding x·log2 e (and log2 e) lost."""
    x = tl.maximum(x, -150.0, propagate_nan=tl.PropagateNan.ALL)  # finite, and e^x is still 0
    y = x * LOG2E
    lost = tl.fma(x, tl.full(x.shape, LOG2E, tl.float32), -y) + x * LOG2E_LOW
    p = tl.exp2(y)
    return p + p * (lost * LN2)


@triton.jit
def exp(x, FLOAT32: tl.constexpr):
    """e^x. FLOAT32: whether it is for outputs in float32; then x <= 88."""
    if FLOAT32:
        return exp_float32(x)
    else:
        return tl.exp(x)


@triton.jit
def log(x, FLOAT32: tl.constexpr):
    """ln x. FLOAT32: of 0, 2^-126 <= x, or NaN; the series of atanh, error below 1e-7 of the value."""
    if FLOAT32:
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F2AAAAB) >> 23  # the rest lies in [2/3, 4/3)
        rest = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
        s = tl.div_rn(rest - 1.0, rest + 1.0)
        z = s * s
        p = (((z * (1.0 / 9.0) + (1.0 / 7.0)) * z + 0.2) * z + (1.0 / 3.0)) * z
        y = exponent.to(tl.float32) * LN2 + (2.0 * s + 2.0 * s * p)
        return tl.where(x < float("inf"), tl.where(x > 0.0, y, -float("inf")), x)
    else:
        return tl.log(x)


@triton.jit
def divide(x, y, FLOAT32: tl.constexpr):
    """x / y, of the same shape. FLOAT32: rounded to the nearest, where tl's `/` is 2 units off."""
    if FLOAT32:
        return tl.div_rn(x, y)
    else:
        return x / y
