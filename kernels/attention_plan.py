"""What attention's Triton kernels share: their arguments, and the plan of the blocks that a tile visits.

Queries and keys are counted along a token axis, that of all packed sequences or that of one padded sequence. Query i
and key j of one sequence lie on its diagonal where j - i = end_k - end_q; rel = j - i - (end_k - end_q) is the relative
position under bottom-right alignment. Query i sees a range [lo, hi) of the axis. Both ends never fall as i grows, from
sequence to sequence too, so the first and the last row of a tile bound the range of the tile.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Integers that must not cause another compilation: nothing is gained by knowing one to be 1, or a multiple of 16. They
# are loose arguments of the kernels because Triton specialises every integer inside a tuple.
PLAIN_NUMBERS = (
    *("sequences", "sq", "sk", "heads", "tiles", "left", "right", "far", "far_right", "site", "threshold"),
    *("items", "first_tile", "partials", "fars", "bucket_left", "bucket_right"),
)


# ---- arguments


class Rows(NamedTuple):
    """A tensor (b, rows, heads, D) with a unit last stride; packed input has b 1."""

    ptr: tl.tensor
    stride_b: tl.tensor
    stride_m: tl.tensor
    stride_h: tl.tensor


class Features(NamedTuple):
    """What all kernels read beside the tensors. None: no packed input, mask, bias, dropout, softcap."""

    cu_q_ptr: tl.tensor  # (sequences + 1,) int32
    cu_k_ptr: tl.tensor
    mask_ptr: tl.tensor  # (b, sk), nonzero where a key is real
    bias_ptr: tl.tensor  # (heads, 2 far + 1), in the unit of the scores
    rng_ptr: tl.tensor  # (2,) int64
    scale: tl.tensor
    dropout_scale: tl.tensor
    softcap: tl.tensor  # in the unit of the scores


@triton.jit
def program(tiles, heads):
    """(tile, head, sequence of the batch) of this program."""
    pid = tl.program_id(0)
    return pid % tiles, (pid // tiles) % heads, (pid // tiles // heads).to(tl.int64)


@triton.jit
def row_ptrs(x: Rows, b, head, row, col):
    """Pointers (rows, columns) into one sequence and head of x."""
    head_ptr = x.ptr + b * x.stride_b + tl.cast(head, tl.int64) * x.stride_h
    return head_ptr + row.to(tl.int64)[:, None] * x.stride_m + col[None, :]


@triton.jit
def load_rows(ptrs, in_col, D: tl.constexpr):
    """Rows that all exist; 0 in the columns from D on."""
    if in_col.shape[0] == D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=in_col[None, :], other=0.0)


@triton.jit
def load_block(x: Rows, ptrs, desc, b, head, start, in_col, D: tl.constexpr):
    """Rows from `start` on that all exist, 0 in the columns from D on.

    desc: of (b, heads, rows, D) in blocks of (1, 1, rows, columns). If it is None, by ptrs, row_ptrs from row 0 on.
    """
    if desc is not None:
        tile = desc.load([tl.cast(b, tl.int32), head, start, 0])
        return tl.reshape(tile, (desc.block_shape[2], desc.block_shape[3]))
    else:
        return load_rows(ptrs + tl.cast(start, tl.int64) * x.stride_m, in_col, D)


@triton.jit
def counted(N: tl.constexpr):
    """0..N-1, to load numbers of rows by. With tl.arange, Triton 3.6 copies them in the layout of a tile's columns.

    Every thread then copies sixteen of them, four bytes at a time, 32 of the 40 copies in a turn of `_dkdv`'s loop; a
    scan's result stays in the layout that it has.
    """
    return tl.cumsum(tl.full((N,), 1, tl.int32), axis=0) - 1


# ---- which columns a row sees


class Axis(NamedTuple):
    """Queries or keys on their token axis: the bounds of the packed sequences, or None and a padded sequence's size."""

    cu_ptr: tl.tensor
    size: tl.tensor


class Sight(NamedTuple):
    """How the rows of a tile see columns: rows are queries and columns keys, or the reverse.

    before, after: the window, in columns before and after the diagonal. The bias is constant at near_before columns and
    more before the diagonal, and at near_after and more after it.
    """

    rows: Axis
    cols: Axis
    before: tl.tensor
    after: tl.tensor
    near_before: tl.tensor
    near_after: tl.tensor


class RealKeys(NamedTuple):
    """The keys that a mask calls real lie in [first, end); they are all of it unless there are holes."""

    first: tl.tensor
    end: tl.tensor
    holes: tl.tensor


class Seen(NamedTuple):
    """What rows see, one row or a tile of them: columns [lo, hi); `diagonal` is the column on a row's diagonal.

    start, col_start: where the row's sequence starts on either axis.
    """

    sequence: tl.tensor
    start: tl.tensor
    col_start: tl.tensor
    diagonal: tl.tensor
    lo: tl.tensor
    hi: tl.tensor


@triton.jit
def find_sequence(cu_ptr, row, first, last):
    """The last sequence s of first..last with cu[s] <= row: int32, like row. The answer must be one of them."""
    s = row * 0 + first
    span = tl.cast(last - first, tl.int32)
    while span > 0:
        mid = s + (span + 1) // 2
        below = (mid <= last) & (tl.load(cu_ptr + tl.minimum(mid, last)) <= row)
        s = tl.where(below, mid, s)
        span = span // 2
    return s


# Nothing on a device can refuse wrong cu_seqlens: `bounds` keeps all accesses inside the tensors, and results are NaN.


@triton.jit
def in_no_sequence(cu_ptr, sequences, row):
    """Which packed rows precede the first sequence or follow the last."""
    return (row < tl.load(cu_ptr)) | (row >= tl.load(cu_ptr + sequences))


@triton.jit
def are_wrong(queries: Axis, keys: Axis, sequences, BLOCK: tl.constexpr):
    """Whether cu_seqlens of queries or of keys fall or leave the tensors."""
    wrong = tl.zeros((BLOCK,), tl.int1)
    for first in range(0, sequences, BLOCK):
        s = first + tl.arange(0, BLOCK)
        mask = s < sequences
        start_q = tl.load(queries.cu_ptr + s, mask=mask, other=0)
        end_q = tl.load(queries.cu_ptr + s + 1, mask=mask, other=0)
        start_k = tl.load(keys.cu_ptr + s, mask=mask, other=0)
        end_k = tl.load(keys.cu_ptr + s + 1, mask=mask, other=0)
        wrong |= (start_q < 0) | (start_q > end_q) | (end_q > queries.size)
        wrong |= (start_k < 0) | (start_k > end_k) | (end_k > keys.size)
    return tl.max(wrong.to(tl.int32), axis=0) > 0


@triton.jit
def bounds(axis: Axis, s):
    """[start, end) of sequence s, cut to the tensor; padded: of the one sequence."""
    if axis.cu_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(axis.cu_ptr + s), 0), axis.size)
        return start, tl.minimum(tl.maximum(tl.load(axis.cu_ptr + s + 1), start), axis.size)
    else:
        return s * 0, s * 0 + axis.size


@triton.jit
def window(centre, start, end, before, after):
    """[centre - before, centre + after] cut to [start, end), as [lo, hi) inside it, empty where lo >= hi."""
    lo = tl.minimum(tl.maximum(centre - before, start), end)
    hi = tl.maximum(tl.minimum(centre + after + 1, end), start)
    return lo, hi


@triton.jit
def look(sight: Sight, row, s, real: RealKeys):
    """What rows of sequences s see. real: where the real columns lie, or None."""
    start, end = bounds(sight.rows, s)
    col_start, col_end = bounds(sight.cols, s)
    diagonal = row + col_end - end
    if real is not None:
        lo, hi = window(diagonal, row * 0 + real.first, row * 0 + real.end, sight.before, sight.after)
    else:
        lo, hi = window(diagonal, col_start, col_end, sight.before, sight.after)
    return Seen(s, start, col_start, diagonal, lo, hi)


@triton.jit
def real_keys(mask_ptr, sk, BLOCK: tl.constexpr):
    """Where the real keys of mask_ptr (sk,) lie."""
    first, end, count = sk, 0, 0
    for start in range(0, sk, BLOCK):
        key = start + tl.arange(0, BLOCK)
        real = tl.load(mask_ptr + key, mask=key < sk, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(real, key, sk), axis=0))
        end = tl.maximum(end, tl.max(tl.where(real, key + 1, 0), axis=0))
        count += tl.sum(real.to(tl.int32), axis=0)
    first = tl.minimum(first, end)
    return RealKeys(first, end, count < end - first)


# ---- which blocks a tile visits


class Plan(NamedTuple):
    """The blocks of a tile: those of [begin, last.hi), cut from begin on in steps of BLOCK columns.

    In up to two runs of them, [a0, a1) and [b0, b1) with a1 <= b0, every row sees every column and, with a bias, is far
    from the diagonal. Those are the plain blocks; their loop needs no mask. A general loop takes the others.
    """

    first: Seen  # by the first row of the tile
    last: Seen
    begin: tl.tensor
    count: tl.tensor
    a0: tl.tensor
    a1: tl.tensor
    b0: tl.tensor
    b1: tl.tensor


@triton.jit
def _run(lo, begin, end, BLOCK: tl.constexpr):
    """[first, last) of the whole blocks inside [begin, end), counted from lo; lo <= begin."""
    first = (tl.maximum(begin, lo) - lo + BLOCK - 1) // BLOCK
    last = (tl.maximum(end, lo) - lo) // BLOCK
    return first, tl.maximum(first, last)


@triton.jit
def make_plan(
    sight: Sight,
    sequences,
    row,
    row0,
    last_row,
    real: RealKeys,
    any_row,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """(Plan of the tile with rows row0..last_row, what each row sees); row (M,) may end past last_row.

    real: where the real columns lie; any_row: whether any row is real; None without a mask. Blocks start at a multiple
    of ALIGN columns in the first sequence.
    """
    first, last, s = row0 * 0, row0 * 0, row * 0
    if sight.rows.cu_ptr is not None:
        first = find_sequence(sight.rows.cu_ptr, row0, 0, sequences - 1)
        last = find_sequence(sight.rows.cu_ptr, last_row, first, sequences - 1)
        s = find_sequence(sight.rows.cu_ptr, row, first, last)
    seen = look(sight, row, s, real)
    head, tail = look(sight, row0, first, real), look(sight, last_row, last, real)
    begin = head.col_start + ((head.lo - head.col_start) // ALIGN) * ALIGN
    count = tl.maximum(tail.hi - begin + BLOCK - 1, 0) // BLOCK
    lo, hi = tail.lo, head.hi  # what all rows see
    if real is not None:
        hi = tl.where(real.holes, lo, hi)
    if any_row is not None:
        count, hi = tl.where(any_row, count, 0), tl.where(any_row, hi, begin)
    if HAS_BIAS:
        a0, a1 = _run(begin, lo, tl.minimum(hi, head.diagonal - sight.near_before + 1), BLOCK)
        b0, b1 = _run(begin, tl.maximum(lo, tail.diagonal + sight.near_after), hi, BLOCK)
    else:
        a0, a1 = _run(begin, lo, hi, BLOCK)
        b0, b1 = a1, a1
    return Plan(head, tail, begin, count, a0, a1, b0, b1), seen


@triton.jit
def plan_of_queries(
    features: Features, sequences, sq, sk, b, row, row0, left, right, far, far_right, BLOCK: tl.constexpr
):
    """make_plan of a tile of queries: the blocks of keys that it visits. They start at multiples of 16 for dropout."""
    HAS_BIAS: tl.constexpr = features.bias_ptr is not None
    sight = Sight(Axis(features.cu_q_ptr, sq), Axis(features.cu_k_ptr, sk), left, right, far, far_right)
    last_row = tl.minimum(row0 + row.shape[0], sq) - 1
    if features.mask_ptr is not None:
        real = real_keys(features.mask_ptr + b * sk, sk, BLOCK=1024)
        return make_plan(sight, sequences, row, row0, last_row, real, None, HAS_BIAS, BLOCK, 16)
    else:
        return make_plan(sight, sequences, row, row0, last_row, None, None, HAS_BIAS, BLOCK, 16)


# Counted where a loop begins: kept from the plan on, the counts cost `_dkdv` registers, 8 bytes of spills on sm_90.


@triton.jit
def plain_count(plan: Plan):
    return plan.a1 - plan.a0 + plan.b1 - plan.b0


@triton.jit
def general_count(plan: Plan):
    return plan.count - (plan.a1 - plan.a0) - (plan.b1 - plan.b0)


@triton.jit
def plain_block(plan: Plan, t):
    """Which block the plain loop visits in turn t."""
    return tl.where(t < plan.a1 - plan.a0, plan.a0 + t, plan.b0 + t - (plan.a1 - plan.a0))


@triton.jit
def general_block(plan: Plan, t):
    t = tl.where(t < plan.a0, t, t + plan.a1 - plan.a0)
    return tl.where(t < plan.b0, t, t + plan.b1 - plan.b0)


@triton.jit
def columns(plan: Plan, seen: Seen, start, mask_ptr, at, BLOCK: tl.constexpr):
    """(columns of the block from `start` on, which of them exist, and what each row sees of them).

    mask_ptr + at: the mask of the sequence, or mask_ptr None.
    """
    col = start + tl.arange(0, BLOCK)
    in_col = col < plan.last.hi
    visible = (col[None, :] >= seen.lo[:, None]) & (col[None, :] < seen.hi[:, None])
    if mask_ptr is not None:
        in_col &= tl.load(mask_ptr + at + col, mask=in_col, other=0) != 0
        visible &= in_col[None, :]
    return col, in_col, visible
