"""attention in Triton, forward: one program per tile of queries and head, online softmax over the blocks of keys.

The maths: fastlm/ops/attention.py. The way through the blocks, and the unit of the scores: attention_tile.py.
"""

import triton
import triton.language as tl

from .attention_tile import (
    LN2,
    PLAIN_NUMBERS,
    accumulate,
    bounds,
    exp,
    find_sequence,
    general_block,
    keep_tile,
    near_bias,
    plain_block,
    plain_run,
    product,
    real_keys,
    scaled,
    window,
)
from .philox import dropout_key

SMALLEST = tl.constexpr(2.0**-126)


@triton.jit(do_not_specialize=(*PLAIN_NUMBERS, "group"))
def _fwd(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, bias_ptr, rng_ptr,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    sequences, sq, sk, heads, group, tiles, left, right, scale, far, far_right, site, threshold, dropout_scale,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out like q, lse (b, heads, sq). q (b, sq, heads, D), k, v (b, sk, heads / group, D); packed: b 1, all rows.

    far, far_right: the bias is constant for rel <= -far, and for rel >= far_right.
    """
    pid = tl.program_id(0)
    # Where causal, the last tiles see most keys: they start first.
    tile, head, b = tiles - 1 - pid % tiles, (pid // tiles) % heads, (pid // tiles // heads).to(tl.int64)
    m0 = tile * BLOCK_M
    row, last_row = m0 + tl.arange(0, BLOCK_M), tl.minimum(m0 + BLOCK_M, sq) - 1
    col = tl.arange(0, BLOCK_D)
    in_row, in_col = row < sq, col < D
    q_ptr += b * stride_qb + tl.cast(head, tl.int64) * stride_qh
    k_ptr += b * stride_kb + tl.cast(head // group, tl.int64) * stride_kh
    v_ptr += b * stride_vb + tl.cast(head // group, tl.int64) * stride_vh
    q = tl.load(
        q_ptr + row.to(tl.int64)[:, None] * stride_qm + col[None, :], mask=in_row[:, None] & in_col[None, :], other=0.0
    )

    # Which keys each row sees, and the range of the first and of the last row.
    first, last, s = m0 * 0, m0 * 0, row * 0
    if PACKED:
        first = find_sequence(cu_q_ptr, m0, 0, sequences - 1)
        last = find_sequence(cu_q_ptr, last_row, first, sequences - 1)
        s = find_sequence(cu_q_ptr, row, first, last)
    start_q, end_q = bounds(cu_q_ptr, s, sq, PACKED)
    start_k, end_k = bounds(cu_k_ptr, s, sk, PACKED)
    _, first_end_q = bounds(cu_q_ptr, first, sq, PACKED)
    first_start_k, first_end_k = bounds(cu_k_ptr, first, sk, PACKED)
    _, last_end_q = bounds(cu_q_ptr, last, sq, PACKED)
    last_start_k, last_end_k = bounds(cu_k_ptr, last, sk, PACKED)
    diagonal = row + end_k - end_q
    first_diagonal, last_diagonal = m0 + first_end_k - first_end_q, last_row + last_end_k - last_end_q
    origin = first_start_k
    holes = False
    if HAS_MASK:
        mask_ptr += b * sk
        first_start_k, first_end_k, holes = real_keys(mask_ptr, sk, BLOCK=1024)
        last_start_k, last_end_k = first_start_k, first_end_k
        start_k, end_k = row * 0 + first_start_k, row * 0 + first_end_k
    lo, hi = window(diagonal, start_k, end_k, left, right)
    first_lo, first_hi = window(first_diagonal, first_start_k, first_end_k, left, right)
    last_lo, last_hi = window(last_diagonal, last_start_k, last_end_k, left, right)

    # The blocks start at a multiple of 16 in the first sequence, for dropout's sake.
    begin = origin + ((first_lo - origin) // 16) * 16
    count = tl.maximum(last_hi - begin + BLOCK_N - 1, 0) // BLOCK_N
    all_lo, all_hi = last_lo, tl.where(holes, last_lo, first_hi)  # what all rows see
    if HAS_BIAS:
        a0, a1 = plain_run(begin, all_lo, tl.minimum(all_hi, first_diagonal - far + 1), BLOCK_N)
        b0, b1 = plain_run(begin, tl.maximum(all_lo, last_diagonal + far_right), all_hi, BLOCK_N)
        bias_ptr += head * (2 * far + 1)
        bias_left, bias_right = tl.load(bias_ptr), tl.load(bias_ptr + 2 * far)
    else:
        a0, a1 = plain_run(begin, all_lo, all_hi, BLOCK_N)
        b0, b1 = a1, a1

    k0, k1, sequence_head = 0, 0, s
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
        sequence_head = s * heads + head if PACKED else b * heads + head

    n = tl.arange(0, BLOCK_N)
    k_ptrs = k_ptr + n.to(tl.int64)[:, None] * stride_kn + col[None, :]
    v_ptrs = v_ptr + n.to(tl.int64)[:, None] * stride_vn + col[None, :]
    FLOAT32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    q, qk_scale, _ = scaled(q, scale, FLOAT32)
    if not FLOAT32:  # positive: then the largest score is so before it is scaled, and what is masked is -inf after
        q, qk_scale = tl.where(scale < 0.0, -q, q), tl.maximum(tl.abs(qk_scale), SMALLEST)
    zero = scale * 0.0
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    for t in range(0, a1 - a0 + b1 - b0):
        block = plain_block(t, a0, a1, b0) if HAS_BIAS else a0 + t
        n0 = begin + block * BLOCK_N
        at = tl.cast(n0, tl.int64)
        if D == BLOCK_D:
            k = tl.load(k_ptrs + at * stride_kn)
        else:
            k = tl.load(k_ptrs + at * stride_kn, mask=in_col[None, :], other=0.0)
        scores = product(q, k, PRECISION)
        m_new, shift = tl.max(scores, axis=1) * qk_scale, 0.0
        if HAS_BIAS:
            shift = tl.where(block < a1, bias_left, bias_right)
            m_new += shift
        m_new = tl.maximum(m, m_new)
        p = exp(scores * qk_scale - (m_new - shift)[:, None], FLOAT32)
        alpha = exp(m - m_new, FLOAT32)
        total = total * alpha + tl.sum(p, axis=1)
        if DROPOUT:
            position = n0 - origin
            keep = keep_tile(position, row - start_q, sequence_head, k0, k1, threshold, BLOCK_M, BLOCK_N, True, False)
            p = tl.where(keep, p, 0.0)
        if D == BLOCK_D:
            v = tl.load(v_ptrs + at * stride_vn)
        else:
            v = tl.load(v_ptrs + at * stride_vn, mask=in_col[None, :], other=0.0)
        acc = accumulate(acc * alpha[:, None], p.to(v.dtype), v, zero, PRECISION)
        m = m_new

    for t in range(0, count - (a1 - a0) - (b1 - b0)):
        n0 = begin + general_block(t, a0, a1, b0, b1) * BLOCK_N
        at = tl.cast(n0, tl.int64)
        key = n0 + n
        in_key = key < last_hi
        if HAS_MASK:
            in_key &= tl.load(mask_ptr + key, mask=in_key, other=0) != 0
        in_tile = in_key[:, None] & in_col[None, :]
        k = tl.load(k_ptrs + at * stride_kn, mask=in_tile, other=0.0)
        visible = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
        if HAS_MASK:
            visible &= in_key[None, :]
        scores, still = product(q, k, PRECISION), qk_scale
        if HAS_BIAS:
            scores, still = scores * qk_scale, 1.0
            left_of, right_of = n0 + BLOCK_N - 1 - first_diagonal, n0 - last_diagonal
            if (first == last) & ((left_of <= -far) | (right_of >= far_right)):
                scores += tl.where(left_of <= -far, bias_left, bias_right)
            else:
                scores += near_bias(bias_ptr, key[None, :] - diagonal[:, None], far)
        scores = tl.where(visible, scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, axis=1) * still)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet
        p = exp(scores * still - shift[:, None], FLOAT32)
        alpha = exp(m - shift, FLOAT32)
        total = total * alpha + tl.sum(p, axis=1)
        if DROPOUT:
            position = n0 - (start_k if PACKED else 0)
            keep = keep_tile(
                position, row - start_q, sequence_head, k0, k1, threshold, BLOCK_M, BLOCK_N, not PACKED, False
            )
            p = tl.where(keep, p, 0.0)
        v = tl.load(v_ptrs + at * stride_vn, mask=in_tile, other=0.0)
        acc = accumulate(acc * alpha[:, None], p.to(v.dtype), v, zero, PRECISION)
        m = m_new

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = m + tl.log(total) if FLOAT32 else (m + tl.log2(total)) * LN2
    tl.store(lse_ptr + (b * heads + head) * sq + row, tl.where(empty, float("-inf"), lse), mask=in_row)
    acc *= (tl.where(empty, 0.0, dropout_scale / total))[:, None]
    out = ((b * sq + row) * heads + head)[:, None] * D + col[None, :]
    tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=in_row[:, None] & in_col[None, :])
