"""T5's relative bias in attention's Triton kernels: the table expanded, and its gradient.

Far from the diagonal one bucket takes every ds: `_dq` sums those of its tile on the way. Near it, `_dtable` loops along
a diagonal of tiles, where each element keeps its relative position: it adds whole tiles and sorts the sum into buckets
once. `_sum_dtable` adds both, in order.
"""

import triton
import triton.language as tl

from .attention_plan import PLAIN_NUMBERS, Axis, Features, Rows, bounds, row_ptrs, window
from .attention_tile import cap, exp, keep_tile, make_drop, near_bias, product, scaled


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


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def _expand_bias(
    table_ptr,
    bias_ptr,
    heads,
    far,
    unit,
    STARTS: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """bias (heads, 2 far + 1) = unit times table (buckets, heads), by relative position -far..far."""
    head = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < 2 * far + 1
    bias = tl.load(table_ptr + bucket_of(i - far, STARTS, BIDIRECTIONAL) * heads + head, mask=mask, other=0.0)
    tl.store(bias_ptr + head * (2 * far + 1) + i, bias.to(tl.float32) * unit, mask=mask)


@triton.jit(do_not_specialize=(*PLAIN_NUMBERS, "group"))
def _dtable(
    q: Rows,
    k: Rows,
    v: Rows,
    dout: Rows,
    lse_ptr,
    delta_ptr,
    partial_ptr,
    features: Features,
    items,
    first_tile,
    sequences,
    sq,
    sk,
    heads,
    group,
    tiles,
    left,
    right,
    far,
    far_right,
    site,
    threshold,
    STARTS: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr,
    BUCKETS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial (programs, diagonals of tiles, heads, BUCKETS): sums of ds at -far < rel < far_right.

    Tile (m0, n0) has n0 on m0's diagonal plus BLOCK·(first_tile + program_id(1)): all tiles on one such diagonal have
    the same relative positions. items: pairs of a sequence and one of the `tiles` tiles of its queries.
    """
    FLOAT32: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    head = tl.program_id(2)
    apart = (first_tile + tl.program_id(1)) * BLOCK
    i, col = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    in_col = col < D
    rel = apart + i[None, :] - i[:, None]
    near = (rel > -far) & (rel < far_right)
    bias = near_bias(features.bias_ptr + head * (2 * far + 1), rel, far)
    queries, keys = Axis(features.cu_q_ptr, sq), Axis(features.cu_k_ptr, sk)
    if features.rng_ptr is not None:
        drop = make_drop(features.rng_ptr, site, threshold)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        sequence = tl.cast(item, tl.int32) // tiles
        b = (sequence * 0 if features.cu_q_ptr is not None else sequence).to(tl.int64)
        start_q, end_q = bounds(queries, sequence)
        start_k, end_k = bounds(keys, sequence)
        m0 = start_q + (item - sequence * tiles) * BLOCK
        n0 = m0 + end_k - end_q + apart
        if (m0 < end_q) & (n0 < end_k) & (n0 + BLOCK > start_k):
            row, key = m0 + i, n0 + i
            in_row, in_key = row < end_q, (key >= start_k) & (key < end_k)
            if features.mask_ptr is not None:
                in_key &= tl.load(features.mask_ptr + b * sk + key, mask=in_key, other=0) != 0
            in_q, in_k = in_row[:, None] & in_col[None, :], in_key[:, None] & in_col[None, :]
            q_tile = tl.load(row_ptrs(q, b, head, row, col), mask=in_q, other=0.0)
            k_tile = tl.load(row_ptrs(k, b, head // group, key, col), mask=in_k, other=0.0)
            v_tile = tl.load(row_ptrs(v, b, head // group, key, col), mask=in_k, other=0.0)
            dout_tile = tl.load(row_ptrs(dout, b, head, row, col), mask=in_q, other=0.0)
            at = (b * heads + head) * sq + row
            lse = tl.load(lse_ptr + at, mask=in_row, other=0.0)
            delta = tl.load(delta_ptr + at, mask=in_row, other=0.0)
            lo, hi = window(row + end_k - end_q, start_k, end_k, left, right)
            visible = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None]) & in_key[None, :]
            visible &= near & in_row[:, None]
            q_tile, qk_scale, unit = scaled(q_tile, features.scale, FLOAT32)
            scores = product(q_tile, k_tile, PRECISION) * qk_scale
            if features.softcap is not None:
                scores = cap(scores, features.softcap, FLOAT32)
            p = tl.where(visible, exp(scores + bias - lse[:, None] * unit, FLOAT32), 0.0)
            dp = product(dout_tile, v_tile, PRECISION)
            if features.rng_ptr is not None:
                sequence_head = sequence * heads + head
                keep = keep_tile(drop, n0 - start_k, row - start_q, sequence_head, BLOCK, BLOCK, False, False)
                dp = tl.where(keep, dp * features.dropout_scale, 0.0)
            acc += p * (dp - delta[:, None])
    bucket_of_rel = bucket_of(rel, STARTS, BIDIRECTIONAL)
    at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * heads + head
    for bucket in range(0, BUCKETS):
        total = tl.sum(tl.sum(tl.where(bucket_of_rel == bucket, acc, 0.0), axis=1), axis=0)
        tl.store(partial_ptr + at * BUCKETS + bucket, total)


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def _sum_dtable(
    partial_ptr,
    far_ptr,
    dtable_ptr,
    partials,
    fars,
    heads,
    bucket_left,
    bucket_right,
    BUCKETS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dtable (BUCKETS, heads) = the sum of partial (partials, heads, BUCKETS); two rows add far (heads, fars, 2)."""
    head = tl.program_id(0)
    bucket, p = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_P)
    near = tl.zeros((BLOCK_P, BLOCK_B), tl.float32)
    for start in range(0, partials, BLOCK_P):
        at = ((start + p) * heads + head)[:, None] * BUCKETS + bucket[None, :]
        near += tl.load(partial_ptr + at, mask=(start + p < partials)[:, None] & (bucket < BUCKETS)[None, :], other=0.0)
    left, right = tl.zeros((BLOCK_P,), tl.float32), tl.zeros((BLOCK_P,), tl.float32)
    far_ptr += tl.cast(head, tl.int64) * fars * 2
    for start in range(0, fars, BLOCK_P):
        left += tl.load(far_ptr + (start + p) * 2, mask=start + p < fars, other=0.0)
        right += tl.load(far_ptr + (start + p) * 2 + 1, mask=start + p < fars, other=0.0)
    total = tl.sum(near, axis=0)
    total += tl.where(bucket == bucket_left, tl.sum(left, axis=0), 0.0)
    total += tl.where(bucket == bucket_right, tl.sum(right, axis=0), 0.0)
    tl.store(dtable_ptr + bucket * heads + head, total, mask=bucket < BUCKETS)
