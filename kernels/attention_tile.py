"""What attention's Triton kernels share: where a row's sequence lies, which blocks a tile visits, dropout's bits, bias.

Rows of q and k are counted along a token axis: of all packed sequences, or of one padded sequence. Query i and key j
of one sequence lie on its diagonal where j - i = end_k - end_q, and rel = j - i - (end_k - end_q) is the relative
position of bottom-right alignment. What query i sees of the axis is a range [lo, hi); both ends never fall as i grows,
from sequence to sequence too, so the first and the last row of a tile bound the range of all.

Scores of 16-bit inputs are kept times log2 e, the scale and log2 e one factor, so that exp2 needs no multiplication.
float32 would lose by it, for lse is rounded where it is stored: there q is scaled first, and e is the base. Every
kernel rounds a score in the same way, or p would not fit its lse.
"""

import triton
import triton.language as tl

from .philox import philox4x32

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.92596298909109e-08)  # log2 e less its float32
LN2 = tl.constexpr(0.6931471805599453)

# Arguments whose value is no reason to compile again: nothing is gained by knowing one to be 1, or a multiple of 16.
PLAIN_NUMBERS = (
    "sequences", "sq", "sk", "heads", "tiles", "left", "right", "far", "far_right", "site", "threshold", "items",
    "first_tile", "partials", "fars", "bucket_left", "bucket_right",
)  # fmt: skip


@triton.jit
def find_sequence(cu_ptr, row, first, last):
    """The last sequence s of first..last with cu[s] <= row: int32, like row. The answer is known to be one of them."""
    s = row * 0 + first
    span = tl.cast(last - first, tl.int32)
    while span > 0:
        mid = s + (span + 1) // 2
        below = (mid <= last) & (tl.load(cu_ptr + tl.minimum(mid, last)) <= row)
        s = tl.where(below, mid, s)
        span = span // 2
    return s


@triton.jit
def bounds(cu_ptr, s, size, PACKED: tl.constexpr):
    """[start, end) of sequence s on the token axis; padded: of the one sequence."""
    if PACKED:
        return tl.load(cu_ptr + s), tl.load(cu_ptr + s + 1)
    else:
        return s * 0, s * 0 + size


@triton.jit
def window(centre, start, end, before, after):
    """[centre - before, centre + after] of [start, end), as [lo, hi) inside of it, empty where lo >= hi."""
    lo = tl.minimum(tl.maximum(centre - before, start), end)
    hi = tl.maximum(tl.minimum(centre + after + 1, end), start)
    return lo, hi


@triton.jit
def real_keys(mask_ptr, sk, BLOCK: tl.constexpr):
    """(first, end, holes) of mask_ptr (sk,): the keys that are real lie in [first, end), all of it unless holes."""
    first, end, count = sk, 0, 0
    for start in range(0, sk, BLOCK):
        key = start + tl.arange(0, BLOCK)
        real = tl.load(mask_ptr + key, mask=key < sk, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(real, key, sk), axis=0))
        end = tl.maximum(end, tl.max(tl.where(real, key + 1, 0), axis=0))
        count += tl.sum(real.to(tl.int32), axis=0)
    first = tl.minimum(first, end)
    return first, end, count < end - first


@triton.jit
def exp(x, FLOAT32: tl.constexpr):
    """2^x, of float32 e^x, where what rounding x·log2 e (and log2 e) lost is made up for."""
    if FLOAT32:
        x = tl.maximum(x, -150.0, propagate_nan=tl.PropagateNan.ALL)  # finite, and still e^x is 0
        y = x * LOG2E
        lost = tl.fma(x, tl.full(x.shape, LOG2E, tl.float32), -y) + x * LOG2E_LOW
        p = tl.exp2(y)
        return p + p * (lost * LN2)
    else:
        return tl.exp2(x)


@triton.jit
def scaled(x, scale, FLOAT32: tl.constexpr):
    """(x or scale·x, what a product with it is still to be multiplied by, what lse and the bias are)."""
    if FLOAT32:
        return x * scale, 1.0, 1.0
    else:
        return x, scale * LOG2E, LOG2E


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    """x yᵀ (M, N) of x (M, D) and y (N, D).

    A float32 product adds up in order; past 64 terms eager's, in several sums, would be far closer. So in parts of 64.
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
    """acc + x y. In float32 a block's terms add up by themselves: all of them in order, in one sum, would lose more.

    zero: 0, but no constant, or the compiler would make one sum of it.
    """
    if x.dtype == tl.float32:
        return acc + tl.dot(x, y, tl.zeros_like(acc) + zero, input_precision=PRECISION)
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)


# ---- which blocks
#
# A tile visits the blocks of [lo, hi), cut from lo in steps of BLOCK. In up to two runs of them, [a0, a1) and [b0, b1)
# with a1 <= b0, every pair is visible and, with a relative bias, far from the diagonal. Those are the plain blocks,
# whose loop has no mask. The general loop takes the others. Counts are of blocks.


@triton.jit
def plain_run(lo, begin, end, BLOCK: tl.constexpr):
    """[first, last) of the whole blocks inside [begin, end); lo <= begin."""
    first = (tl.maximum(begin, lo) - lo + BLOCK - 1) // BLOCK
    last = (tl.maximum(end, lo) - lo) // BLOCK
    return first, tl.maximum(first, last)


@triton.jit
def plain_block(t, a0, a1, b0):
    return tl.where(t < a1 - a0, a0 + t, b0 + t - (a1 - a0))


@triton.jit
def general_block(t, a0, a1, b0, b1):
    t = tl.where(t < a0, t, t + a1 - a0)
    return tl.where(t < b0, t, t + b1 - b0)


# ---- dropout
#
# One Philox call gives the bytes of sixteen keys. They are compared four at a time inside of their words, and the
# sixteen answers packed into bits, so that a sixteenth of the tile's elements changes layout, not every one.


@triton.jit
def _kept(word, threshold):
    """Bits 0..3: which bytes of a word are at least threshold, 1 to 256.

    The carry out of a byte's low seven bits, plus 128 - threshold or 256 - threshold, and its top bit decide.
    """
    small = threshold <= 128
    carry = (word & 0x7F7F7F7F) + (tl.where(small, 128, 256) - threshold).to(tl.uint32) * 0x01010101
    either = tl.where(small, 0xFFFFFFFF, 0).to(tl.uint32)
    kept = (((carry & word) | (either & (carry | word))) >> 7) & 0x01010101
    return (kept * 0x01020408) >> 24  # bits 0, 8, 16, 24 meet in 24..27


@triton.jit
def keep_sixteen(block, query, sequence_head, k0, k1, threshold):
    """uint32 whose bit b says that key 16·block + b stays, for positions within the sequence. Arguments broadcast."""
    r0, r1, r2, r3 = philox4x32(block, query, sequence_head, 0, k0, k1)
    low = _kept(r0, threshold) | (_kept(r1, threshold) << 4)
    high = (_kept(r2, threshold) << 8) | (_kept(r3, threshold) << 12)
    return tl.sum(tl.trans(tl.join(low, high), 2, 0, 1), axis=0)


@triton.jit
def keep_tile(
    key, query, sequence_head, k0, k1, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """bool (BLOCK_M, BLOCK_N), transposed (BLOCK_N, BLOCK_M): which probabilities stay.

    key: position in its sequence of the tile's first key, a scalar or (BLOCK_M,); a multiple of 16 if ALIGNED, else
    sixteen bits straddle two calls. query (BLOCK_M,): positions; sequence_head: a scalar or (BLOCK_M,).
    """
    axis: tl.constexpr = 0 if TRANSPOSED else 1  # of the keys
    query = tl.expand_dims(query, axis)
    if len(key.shape) > 0:
        key = tl.expand_dims(key, axis)
    if len(sequence_head.shape) > 0:
        sequence_head = tl.expand_dims(sequence_head, axis)
    key = query * 0 + key
    if ALIGNED:
        block = (key >> 4) + tl.expand_dims(tl.arange(0, BLOCK_N // 16), 1 - axis)
        keep = keep_sixteen(block, query, sequence_head, k0, k1, threshold)
    else:  # thirty-two bits from three calls, two lots of sixteen apart from the other pairs'
        block = (key >> 4) + 2 * tl.expand_dims(tl.arange(0, BLOCK_N // 32), 1 - axis)
        shift = (key & 15).to(tl.uint32)
        middle = keep_sixteen(block + 1, query, sequence_head, k0, k1, threshold)
        even = keep_sixteen(block, query, sequence_head, k0, k1, threshold) | (middle << 16)
        odd = middle | (keep_sixteen(block + 2, query, sequence_head, k0, k1, threshold) << 16)
        keep = tl.join(even >> shift, odd >> shift)
        if TRANSPOSED:
            keep = tl.reshape(tl.trans(keep, 0, 2, 1), (BLOCK_N // 16, BLOCK_M))
        else:
            keep = tl.reshape(keep, (BLOCK_M, BLOCK_N // 16))
    bit = tl.arange(0, 16).to(tl.uint32)
    if TRANSPOSED:
        return tl.reshape((keep[:, None, :] >> bit[None, :, None]) & 1, (BLOCK_N, BLOCK_M)) != 0
    else:
        return tl.reshape((keep[:, :, None] >> bit[None, None, :]) & 1, (BLOCK_M, BLOCK_N)) != 0


# ---- relative bias


@triton.jit
def bucket_of(rel, STARTS: tl.constexpr, BIDIRECTIONAL: tl.constexpr):
    """The bucket of relative positions. STARTS: the smallest distance of each bucket of one direction."""
    distance = tl.abs(rel) if BIDIRECTIONAL else tl.maximum(-rel, 0)
    bucket = rel * 0
    for b in tl.static_range(1, len(STARTS)):
        bucket += (distance >= STARTS[b]).to(tl.int32)
    if BIDIRECTIONAL:
        bucket += tl.where(rel > 0, len(STARTS), 0)
    return bucket


@triton.jit
def near_bias(bias_ptr, rel, far):
    """bias_ptr (2 far + 1,): the bias at -far..far, in the unit of the scores; beyond it is as at the ends."""
    return tl.load(bias_ptr + tl.minimum(tl.maximum(rel, -far), far) + far)
