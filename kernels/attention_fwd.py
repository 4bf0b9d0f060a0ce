"""attention in Triton, forward: one program per tile of queries and head, online softmax over the blocks of keys.

The maths: fastlm/ops/attention.py; the plan of the blocks: attention_plan.py; the unit of the scores:
attention_tile.py.
"""

import triton
import triton.language as tl

from .attention_plan import (
    PLAIN_NUMBERS,
    Axis,
    Features,
    Rows,
    are_wrong,
    columns,
    general_block,
    general_count,
    in_no_sequence,
    load_block,
    plain_block,
    plain_count,
    plan_of_queries,
    program,
    row_ptrs,
)
from .attention_tile import (
    accumulate,
    bias_of,
    biased,
    cap,
    exp,
    fenced,
    head_bias,
    keep_tile,
    make_drop,
    product,
    scaled,
    settled,
)
from .exponential import LN2

SMALLEST = tl.constexpr(2.0**-126)


@triton.jit(do_not_specialize=(*PLAIN_NUMBERS, "group"))
def _fwd(
    q: Rows,
    k: Rows,
    v: Rows,
    out_ptr,
    lse_ptr,
    features: Features,
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
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    k_desc=None,
    v_desc=None,
):
    """out like q, lse (b, heads, sq). q (b, sq, heads, D), k, v (b, sk, heads / group, D); packed: b 1, all rows.

    far, far_right: the bias is constant for rel <= -far, and for rel >= far_right.

    k_desc, v_desc: tensor descriptors, for load_block, or None. Only the plain loop may load by them: they bring all
    rows of the tensor, those of other sequences and of masked keys too, whose NaN times a probability of 0 is NaN.
    """
    PACKED: tl.constexpr = features.cu_q_ptr is not None
    HAS_BIAS: tl.constexpr = features.bias_ptr is not None
    DROPOUT: tl.constexpr = features.rng_ptr is not None
    HAS_SOFTCAP: tl.constexpr = features.softcap is not None
    FLOAT32: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    tile, head, b = program(tiles, heads)
    m0 = (tiles - 1 - tile) * BLOCK_M  # where causal, the last tiles see most keys: they start first
    row, col, n = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_row, in_col = row < sq, col < D
    stored = in_row[:, None] & in_col[None, :]
    q_tile = tl.load(row_ptrs(q, b, head, row, col), mask=stored, other=0.0)
    k_ptrs, v_ptrs = row_ptrs(k, b, head // group, n, col), row_ptrs(v, b, head // group, n, col)
    plan, seen = plan_of_queries(features, sequences, sq, sk, b, row, m0, left, right, far, far_right, BLOCK_N)
    if HAS_BIAS:
        bias = head_bias(features.bias_ptr, head, far, far_right)
    if DROPOUT:
        drop = make_drop(features.rng_ptr, site, threshold)
    sequence_head = (seen.sequence if PACKED else b) * heads + head

    scale = features.scale
    q_tile, qk_scale, _ = scaled(q_tile, scale, FLOAT32)
    if not FLOAT32:  # a positive scale keeps the order of the scores, and a masked -inf stays -inf
        q_tile, qk_scale = tl.where(scale < 0.0, -q_tile, q_tile), tl.maximum(tl.abs(qk_scale), SMALLEST)
    zero = scale * 0.0
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if PACKED:  # NaN, which lse carries into backward, for rows of no sequence; if cu_seqlens are wrong, for all rows
        wrong = are_wrong(Axis(features.cu_q_ptr, sq), Axis(features.cu_k_ptr, sk), sequences, BLOCK=512)
        total = tl.where(in_no_sequence(features.cu_q_ptr, sequences, row) | wrong, float("nan"), total)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    for t in range(0, plain_count(plan)):
        block = plain_block(plan, t) if HAS_BIAS else plan.a0 + t
        n0 = plan.begin + block * BLOCK_N
        if k_desc is not None:
            n0 = fenced(n0)
        k_tile = load_block(k, k_ptrs, k_desc, b, head // group, n0, in_col, D)
        scores, still = product(q_tile, k_tile, PRECISION), qk_scale
        if HAS_SOFTCAP:
            scores, still = cap(scores * qk_scale, features.softcap, FLOAT32), 1.0
        m_new, shift = tl.max(scores, axis=1) * still, 0.0
        if HAS_BIAS:
            shift = tl.where(block < plan.a1, bias.left, bias.right)
            m_new += shift
        m_new = tl.maximum(m, m_new)
        p = exp(scores * still - (m_new - shift)[:, None], FLOAT32)
        alpha = exp(m - m_new, FLOAT32)
        total = total * alpha + tl.sum(p, axis=1)
        if DROPOUT:
            position = n0 - plan.first.col_start
            keep = keep_tile(drop, position, row - seen.start, sequence_head, BLOCK_M, BLOCK_N, True, False)
            p = tl.where(keep, p, 0.0)
        v_tile = load_block(v, v_ptrs, v_desc, b, head // group, n0, in_col, D)
        acc = accumulate(acc * alpha[:, None], p.to(v_tile.dtype), v_tile, zero, PRECISION)
        if HAS_BIAS:
            acc = settled(acc)
        m = m_new

    for t in range(0, general_count(plan)):
        n0 = plan.begin + general_block(plan, t) * BLOCK_N
        at = tl.cast(n0, tl.int64)
        key, in_key, visible = columns(plan, seen, n0, features.mask_ptr, b * sk, BLOCK_N)
        in_tile = in_key[:, None] & in_col[None, :]
        k_tile = tl.load(k_ptrs + at * k.stride_m, mask=in_tile, other=0.0)
        if HAS_BIAS:
            # Before the products. With its branch between them, Triton 3.7.1 waits for v's tile apart from k's, and
            # leaves out the fence.proxy.async between that wait and the wgmma that reads the tile.
            single = plan.first.sequence == plan.last.sequence
            least, most = n0 - plan.last.diagonal, n0 + BLOCK_N - 1 - plan.first.diagonal
            near = bias_of(bias, key[None, :], seen.diagonal[:, None], least, most, single)
        scores, still = product(q_tile, k_tile, PRECISION), qk_scale
        if HAS_SOFTCAP:
            scores, still = cap(scores * qk_scale, features.softcap, FLOAT32), 1.0
        if HAS_BIAS:
            scores, still = biased(scores * still, near, zero), 1.0
        scores = tl.where(visible, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1) * still)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet
        p = exp(scores * still - shift[:, None], FLOAT32)
        alpha = exp(m - shift, FLOAT32)
        total = total * alpha + tl.sum(p, axis=1)
        if DROPOUT:
            position = n0 - (seen.col_start if PACKED else 0)
            keep = keep_tile(drop, position, row - seen.start, sequence_head, BLOCK_M, BLOCK_N, not PACKED, False)
            p = tl.where(keep, p, 0.0)
        v_tile = tl.load(v_ptrs + at * v.stride_m, mask=in_tile, other=0.0)
        acc = accumulate(acc * alpha[:, None], p.to(v_tile.dtype), v_tile, zero, PRECISION)
        if HAS_BIAS:
            acc = settled(acc)
        m = m_new

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = m + tl.log(total) if FLOAT32 else (m + tl.log2(total)) * LN2
    lse = tl.where(empty, float("-inf"), lse)
    acc *= (tl.where(empty, 0.0, features.dropout_scale / total))[:, None]
    tl.store(lse_ptr + (b * heads + head) * sq + row, lse, mask=in_row)
    out = ((b * sq + row) * heads + head)[:, None] * D + col[None, :]
    tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=stored)
