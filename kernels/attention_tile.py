"""What attention's Triton kernels compute inside a block: products, exponentials, dropout's bits, the relative bias.

Scores of 16-bit inputs are kept times log2 e, with the scale and log2 e in one factor, so exp2 needs no multiplication.
float32 would lose precision by it, because lse is rounded where it is stored: there q is scaled first and the base is
e. Every kernel must round a score in the same way, or p would not match its lse.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .exponential import LOG2E, exp_float32
from .philox import INTERPRETED, dropout_key, philox4x32

# ---- products


@triton.jit
def exp(x, FLOAT32: tl.constexpr):
    """2^x; for float32 e^x."""
    if FLOAT32:
        return exp_float32(x)
    else:
        return tl.exp2(x)


@triton.jit
def scaled(x, scale, FLOAT32: tl.constexpr):
    """(x or scale·x, the factor that its products still need, the factor that lse and the bias need)."""
    if FLOAT32:
        return x * scale, 1.0, 1.0
    else:
        return x, scale * LOG2E, LOG2E


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    """x yᵀ (M, N) of x (M, D) and y (N, D).

    A float32 product is one sum in order. Past 64 terms eager's, which has several sums, would be far more accurate, so
    D is split into parts of 64.
    """
    D: tl.constexpr = x.shape[1]
    if x.dtype == tl.float32 and PRECISION == "ieee" and D > 64:
        x = tl.trans(tl.reshape(x, (x.shape[0], D // 64, 64)), 1, 0, 2)
        y = tl.trans(tl.reshape(y, (y.shape[0], D // 64, 64)), 1, 2, 0)
        return tl.sum(tl.dot(x, y, input_precision=PRECISION), axis=0)
    else:
        return tl.dot(x, tl.trans(y), input_precision=PRECISION)


@triton.jit
def accumulate(acc, x, y, zero, PRECISION: tl.constexpr):
    """acc + x y. In float32 each block is summed first: one sum over all blocks would lose more.

    zero: 0 that is not a constant, or the compiler would merge the sums.
    """
    if x.dtype == tl.float32:
        return acc + tl.dot(x, y, tl.zeros_like(acc) + zero, input_precision=PRECISION)
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def settled(acc):
    """acc, once the products before it are done.

    Triton leaves a loop's last wgmma in flight until the next turn. If ptxas then has too few registers to keep the
    operands where they are, it waits after every wgmma of the kernel (its warnings C7513 and C7515).
    """
    if INTERPRETED:
        return acc
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], dtype=acc.dtype, is_pure=True, pack=1)


@triton.jit
def fenced(start):
    """start, a coordinate of a load by a tensor descriptor, behind a fence of the proxies.

    Triton 3.7.1 has none between the initialisation of a loop's mbarriers and the first copy that reports to one, where
    CUDA's programming guide demands it. The compiler puts what a coordinate is made of between the two.
    """
    return tl.inline_asm_elementwise(
        "fence.proxy.async.shared::cta; mov.b32 $0, $1;", "=r,r", [start], dtype=tl.int32, is_pure=True, pack=1
    )


# ---- softcap


@triton.jit
def tanh(x, FLOAT32: tl.constexpr):
    """tanh x; for float32 with a small relative error near 0 too: 1.3 units in the last place.

    The polynomial is a minimax fit made for this file: |x| <= 0.6, relative error 2.7e-9.
    """
    if FLOAT32:
        z = x * x
        p = -5.90587213e-3 * z + 2.08053880e-2
        p = p * z - 5.37866847e-2
        p = p * z + 1.33319583e-1
        p = p * z - 3.33332993e-1
        size = tl.minimum(tl.abs(x), 10.0, propagate_nan=tl.PropagateNan.ALL)  # from 10 on it is 1
        large = 1.0 - tl.div_rn(tl.full(x.shape, 2.0, tl.float32), 1.0 + exp(2.0 * size, FLOAT32))
        return tl.where(tl.abs(x) < 0.6, x + x * (z * p), tl.where(x < 0.0, -large, large))
    else:
        return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def cap(scores, softcap, FLOAT32: tl.constexpr):
    """softcap·tanh(scores/softcap), of scores in their unit."""
    if FLOAT32:
        return softcap * tanh(tl.div_rn(scores, tl.zeros_like(scores) + softcap), FLOAT32)
    else:
        return softcap * tanh(scores / softcap, FLOAT32)


@triton.jit
def uncap(ds, capped, softcap):
    """The gradient of scores, from that of `cap` of them."""
    t = capped / softcap
    return ds * (1.0 - t * t)


# ---- dropout
#
# One Philox call gives the bytes of sixteen keys. They are compared four at a time inside their words, and the sixteen
# answers are packed into bits: only a sixteenth of the tile's elements then changes layout.


class Drop(NamedTuple):
    """The key of a dropout call, and the threshold of its bytes."""

    k0: tl.tensor
    k1: tl.tensor
    threshold: tl.tensor


@triton.jit
def make_drop(rng_ptr, site, threshold):
    k0, k1 = dropout_key(rng_ptr, site)
    return Drop(k0, k1, threshold)


@triton.jit
def _kept(word, threshold):
    """Bits 0..3: which bytes of a word are at least threshold, 1 to 256.

    Two bits decide: the byte's top bit, and the carry out of its low seven bits plus 128 - threshold or
    256 - threshold.
    """
    small = threshold <= 128
    carry = (word & 0x7F7F7F7F) + (tl.where(small, 128, 256) - threshold).to(tl.uint32) * 0x01010101
    either = ((threshold - 129) >> 31).to(tl.uint32)  # all ones if small: the majority of three is one LOP3
    kept = ((carry & word) | (either & (carry | word))) & 0x80808080
    return (kept * 0x00204081) >> 28  # moves bits 7, 15, 23, 31 to 28..31


@triton.jit
def keep_sixteen(drop: Drop, block, query, sequence_head):
    """uint32 whose bit b says that key 16·block + b stays, for positions within the sequence. Arguments broadcast."""
    r0, r1, r2, r3 = philox4x32(block, query, sequence_head, 0, drop.k0, drop.k1)
    low = _kept(r0, drop.threshold) | (_kept(r1, drop.threshold) << 4)
    high = (_kept(r2, drop.threshold) << 8) | (_kept(r3, drop.threshold) << 12)
    return tl.sum(tl.trans(tl.join(low, high), 2, 0, 1), axis=0)


@triton.jit
def keep_tile(
    drop: Drop,
    key,
    query,
    sequence_head,
    M: tl.constexpr,
    N: tl.constexpr,
    ALIGNED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """bool (M, N), transposed (N, M): which probabilities stay.

    key: position in its sequence of the tile's first key, a scalar or (M,). It is a multiple of 16 if ALIGNED; if not,
    sixteen bits straddle two calls. query (M,): positions; sequence_head: a scalar or (M,).
    """
    axis: tl.constexpr = 0 if TRANSPOSED else 1  # of the keys
    query = tl.expand_dims(query, axis)
    if len(key.shape) > 0:
        key = tl.expand_dims(key, axis)
    if len(sequence_head.shape) > 0:
        sequence_head = tl.expand_dims(sequence_head, axis)
    key = query * 0 + key
    if ALIGNED:
        block = (key >> 4) + tl.expand_dims(tl.arange(0, N // 16), 1 - axis)
        keep = keep_sixteen(drop, block, query, sequence_head)
    else:  # three calls give thirty-two bits: two groups of sixteen, so no call is repeated for the next pair
        block = (key >> 4) + 2 * tl.expand_dims(tl.arange(0, N // 32), 1 - axis)
        shift = (key & 15).to(tl.uint32)
        middle = keep_sixteen(drop, block + 1, query, sequence_head)
        even = keep_sixteen(drop, block, query, sequence_head) | (middle << 16)
        odd = middle | (keep_sixteen(drop, block + 2, query, sequence_head) << 16)
        keep = tl.join(even >> shift, odd >> shift)
        if TRANSPOSED:
            keep = tl.reshape(tl.trans(keep, 0, 2, 1), (N // 16, M))
        else:
            keep = tl.reshape(keep, (M, N // 16))
    bit = tl.arange(0, 16).to(tl.uint32)
    if TRANSPOSED:
        return tl.reshape((keep[:, None, :] >> bit[None, :, None]) & 1, (N, M)) != 0
    else:
        return tl.reshape((keep[:, :, None] >> bit[None, None, :]) & 1, (M, N)) != 0


# ---- relative bias


class Bias(NamedTuple):
    """A head's bias: ptr (2 far + 1,) at rel -far..far; it is `left` for rel <= -far, `right` for rel >= far_right."""

    ptr: tl.tensor
    left: tl.tensor
    right: tl.tensor
    far: tl.tensor
    far_right: tl.tensor


@triton.jit
def head_bias(bias_ptr, head, far, far_right):
    head_ptr = bias_ptr + head * (2 * far + 1)
    return Bias(head_ptr, tl.load(head_ptr), tl.load(head_ptr + 2 * far), far, far_right)


@triton.jit
def near_bias(bias_ptr, rel, far):
    """bias_ptr (2 far + 1,): the bias at -far..far, in the unit of the scores; past either end it stays the same."""
    return tl.load(bias_ptr + tl.minimum(tl.maximum(rel, -far), far) + far)


@triton.jit
def biased(scores, near, zero):
    """scores + near. zero: 0 that is not a constant, or the compiler begins a float32 product's sum with near.

    `_dkdv` adds it behind the sum. Where forward does not, dk loses digits: lse is of other roundings than its scores.
    """
    return scores * (1.0 + zero) + near


@triton.jit
def bias_of(bias: Bias, to, origin, least, most, single):
    """The bias at rel = to - origin. single: of one sequence, with rel from `least` to `most`."""
    if single & ((most <= -bias.far) | (least >= bias.far_right)):
        near = tl.zeros_like(to - origin) + tl.where(most <= -bias.far, bias.left, bias.right)
    else:
        near = near_bias(bias.ptr, to - origin, bias.far)
    return near
