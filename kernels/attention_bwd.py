"""attention in Triton, backward: the probabilities are computed again from lse. The maths: fastlm/ops/attention.py.

No two programs add to one number, so every run gives the same bits: `_dkdv` owns a tile of keys and walks over queries,
`_dq` owns a tile of queries and walks over keys. That is seven products where atomic additions would need five.

The gradient of the bias table. Far from the diagonal a bucket takes everything: `_dq` sums ds of its tile on the way.
Near it, `_dtable` walks along a diagonal of tiles, where an element keeps its relative position: it adds whole tiles up
and sorts the sum into buckets once.
"""

import triton
import triton.language as tl

from .attention_tile import (
    PLAIN_NUMBERS,
    accumulate,
    bounds,
    bucket_of,
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


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def _delta(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, sequence_ptr, cu_q_ptr, stride_dob, stride_dom, stride_doh,
    sequences, sq, heads, tiles, HAS_DLSE: tl.constexpr, SEQUENCE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta (b, h, sq) = dout·out - dlse; where SEQUENCE, also the sequence of each packed row, int32 (sq,)."""
    pid = tl.program_id(0)
    tile, head, b = pid % tiles, (pid // tiles) % heads, (pid // tiles // heads).to(tl.int64)
    row, col = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    in_row = row < sq
    mask = in_row[:, None] & (col < D)[None, :]
    out = tl.load(out_ptr + ((b * sq + row) * heads + head)[:, None] * D + col[None, :], mask=mask, other=0.0)
    dout_ptr += b * stride_dob + tl.cast(head, tl.int64) * stride_doh
    dout = tl.load(dout_ptr + row.to(tl.int64)[:, None] * stride_dom + col[None, :], mask=mask, other=0.0)
    if (
        out.dtype == tl.float32
    ):  # in the order of dout·v: where out is close to one v, ds is then as small as it should be
        products = product(dout, out, "ieee")
        i = tl.arange(0, BLOCK_M)
        delta = tl.sum(tl.where(i[:, None] == i[None, :], products, 0.0), axis=1)
    else:
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    at = (b * heads + head) * sq + row
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + at, mask=in_row, other=0.0)
    tl.store(delta_ptr + at, delta, mask=in_row)
    if SEQUENCE and head == 0:
        tl.store(sequence_ptr + row, find_sequence(cu_q_ptr, row, 0, sequences - 1), mask=in_row)


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def _dkdv(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr, sequence_ptr, mask_ptr,
    bias_ptr, rng_ptr, stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn,
    stride_vh, stride_dob, stride_dom, stride_doh,
    sequences, sq, sk, heads, group, tiles, left, right, scale, far, far_right, site, threshold, dropout_scale,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv (b, sk, heads / group, D), contiguous, of BLOCK_N keys: over all queries of the heads that share them.

    Keys are the rows of the tiles here. A masked key spoils its own row alone, which is set to 0 at the end.
    """
    pid = tl.program_id(0)
    kv_heads = heads // group
    tile, kv_head, b = pid % tiles, (pid // tiles) % kv_heads, (pid // tiles // kv_heads).to(tl.int64)
    n0 = tile * BLOCK_N
    key, last_key = n0 + tl.arange(0, BLOCK_N), tl.minimum(n0 + BLOCK_N, sk) - 1
    col = tl.arange(0, BLOCK_D)
    in_key, in_col = key < sk, col < D
    FLOAT32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    stored = in_key[:, None] & in_col[None, :]
    real = in_key
    if HAS_MASK:
        real &= tl.load(mask_ptr + b * sk + key, mask=in_key, other=0) != 0
    k_ptr += b * stride_kb + tl.cast(kv_head, tl.int64) * stride_kh
    v_ptr += b * stride_vb + tl.cast(kv_head, tl.int64) * stride_vh
    in_tile = real[:, None] & in_col[None, :]
    k = tl.load(k_ptr + key.to(tl.int64)[:, None] * stride_kn + col[None, :], mask=in_tile, other=0.0)
    v = tl.load(v_ptr + key.to(tl.int64)[:, None] * stride_vn + col[None, :], mask=in_tile, other=0.0)

    # Which queries see each key, and the range of the first and of the last key.
    first, last, s = n0 * 0, n0 * 0, key * 0
    if PACKED:
        first = find_sequence(cu_k_ptr, n0, 0, sequences - 1)
        last = find_sequence(cu_k_ptr, last_key, first, sequences - 1)
        s = find_sequence(cu_k_ptr, key, first, last)
    start_q, end_q = bounds(cu_q_ptr, s, sq, PACKED)
    _, end_k = bounds(cu_k_ptr, s, sk, PACKED)
    first_start_q, first_end_q = bounds(cu_q_ptr, first, sq, PACKED)
    _, first_end_k = bounds(cu_k_ptr, first, sk, PACKED)
    last_start_q, last_end_q = bounds(cu_q_ptr, last, sq, PACKED)
    _, last_end_k = bounds(cu_k_ptr, last, sk, PACKED)
    diagonal = key - end_k + end_q
    first_diagonal, last_diagonal = n0 - first_end_k + first_end_q, last_key - last_end_k + last_end_q
    lo, hi = window(diagonal, start_q, end_q, right, left)
    begin, first_hi = window(first_diagonal, first_start_q, first_end_q, right, left)
    all_lo, last_hi = window(last_diagonal, last_start_q, last_end_q, right, left)
    if HAS_MASK:
        last_hi = tl.where(tl.max(real.to(tl.int32), axis=0) > 0, last_hi, begin)
    count = tl.maximum(last_hi - begin + BLOCK_M - 1, 0) // BLOCK_M
    all_hi = tl.minimum(first_hi, last_hi)
    if HAS_BIAS:  # rel falls as the query rises
        a0, a1 = plain_run(begin, all_lo, tl.minimum(all_hi, first_diagonal - far_right + 1), BLOCK_M)
        b0, b1 = plain_run(begin, tl.maximum(all_lo, last_diagonal + far), all_hi, BLOCK_M)
    else:
        a0, a1 = plain_run(begin, all_lo, all_hi, BLOCK_M)
        b0, b1 = a1, a1

    k0, k1 = 0, 0
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    zero = (
        scale * 0.0
    )  # no constant: before one, LLVM selects after it has rounded p, in three instructions more a pair
    m = tl.arange(0, BLOCK_M)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for g in range(0, group):
        head = kv_head * group + g
        q_ptrs = q_ptr + b * stride_qb + tl.cast(head, tl.int64) * stride_qh
        q_ptrs = q_ptrs + m.to(tl.int64)[:, None] * stride_qm + col[None, :]
        dout_ptrs = dout_ptr + b * stride_dob + tl.cast(head, tl.int64) * stride_doh
        dout_ptrs = dout_ptrs + m.to(tl.int64)[:, None] * stride_dom + col[None, :]
        rows = (b * heads + head) * sq
        bias_left, bias_right = 0.0, 0.0
        if HAS_BIAS:
            head_bias_ptr = bias_ptr + head * (2 * far + 1)
            bias_left, bias_right = tl.load(head_bias_ptr), tl.load(head_bias_ptr + 2 * far)

        for t in range(0, a1 - a0 + b1 - b0):
            block = plain_block(t, a0, a1, b0) if HAS_BIAS else a0 + t
            m0 = begin + block * BLOCK_M
            at = tl.cast(m0, tl.int64)
            if D == BLOCK_D:
                q = tl.load(q_ptrs + at * stride_qm)
                dout = tl.load(dout_ptrs + at * stride_dom)
            else:
                q = tl.load(q_ptrs + at * stride_qm, mask=in_col[None, :], other=0.0)
                dout = tl.load(dout_ptrs + at * stride_dom, mask=in_col[None, :], other=0.0)
            q, qk_scale, unit = scaled(q, scale, FLOAT32)
            shift = tl.load(lse_ptr + rows + m0 + m) * unit
            if HAS_BIAS:
                shift -= tl.where(block < a1, bias_right, bias_left)
            delta = tl.load(delta_ptr + rows + m0 + m)
            scores = product(k, q, PRECISION)
            p = exp(scores * qk_scale - shift[None, :], FLOAT32)
            dp = product(v, dout, PRECISION)
            kept = p
            if DROPOUT:
                # Of one sequence, whose first key need not be a multiple of 16.
                position, sequence_head = n0 - (tl.load(cu_k_ptr + first) if PACKED else 0), b * heads + head
                if PACKED:
                    sequence_head = first * heads + head
                keep = keep_tile(
                    position, m0 + m - first_start_q, sequence_head, k0, k1, threshold, BLOCK_M, BLOCK_N,
                    not PACKED, True,
                )  # fmt: skip
                kept, dp = tl.where(keep, p, zero), tl.where(keep, dp * dropout_scale, 0.0)
            dv = accumulate(dv, kept.to(dout.dtype), dout, zero, PRECISION)
            ds = p * (dp - delta[None, :])
            dk = accumulate(dk, ds.to(q.dtype), q, zero, PRECISION)

        for t in range(0, count - (a1 - a0) - (b1 - b0)):
            m0 = begin + general_block(t, a0, a1, b0, b1) * BLOCK_M
            at = tl.cast(m0, tl.int64)
            row = m0 + m
            in_row = row < last_hi
            in_block = in_row[:, None] & in_col[None, :]
            q = tl.load(q_ptrs + at * stride_qm, mask=in_block, other=0.0)
            dout = tl.load(dout_ptrs + at * stride_dom, mask=in_block, other=0.0)
            lse = tl.load(lse_ptr + rows + row, mask=in_row, other=0.0)
            delta = tl.load(delta_ptr + rows + row, mask=in_row, other=0.0)
            q, qk_scale, unit = scaled(q, scale, FLOAT32)
            scores = product(k, q, PRECISION) * qk_scale
            if HAS_BIAS:
                left_of, right_of = last_diagonal - m0, first_diagonal - (m0 + BLOCK_M - 1)
                if (first == last) & ((left_of <= -far) | (right_of >= far_right)):
                    scores += tl.where(left_of <= -far, bias_left, bias_right)
                else:
                    scores += near_bias(head_bias_ptr, diagonal[:, None] - row[None, :], far)
            visible = (row[None, :] >= lo[:, None]) & (row[None, :] < hi[:, None])
            p = tl.where(visible, exp(scores - lse[None, :] * unit, FLOAT32), 0.0)
            dp = product(v, dout, PRECISION)
            kept = p
            if DROPOUT:
                position, query, sequence_head = n0, row, b * heads + head
                if PACKED:
                    sequence = tl.load(sequence_ptr + row, mask=in_row, other=0)
                    position = n0 - tl.load(cu_k_ptr + sequence)
                    query, sequence_head = row - tl.load(cu_q_ptr + sequence), sequence * heads + head
                keep = keep_tile(position, query, sequence_head, k0, k1, threshold, BLOCK_M, BLOCK_N, not PACKED, True)
                kept, dp = tl.where(keep, p, zero), tl.where(keep, dp * dropout_scale, 0.0)
            dv = accumulate(dv, kept.to(dout.dtype), dout, zero, PRECISION)
            ds = p * (dp - delta[None, :])
            dk = accumulate(dk, ds.to(q.dtype), q, zero, PRECISION)

    at = ((b * sk + key) * kv_heads + kv_head)[:, None] * D + col[None, :]
    if not FLOAT32:  # else q had it
        dk *= scale
    dk = tl.where(real[:, None], dk, 0.0)
    dv = tl.where(real[:, None], dv * dropout_scale, 0.0)
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=stored)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=(*PLAIN_NUMBERS, "group"))
def _dq(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, far_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, bias_ptr,
    rng_ptr, stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_dob, stride_dom, stride_doh,
    sequences, sq, sk, heads, group, tiles, left, right, scale, far, far_right, site, threshold, dropout_scale,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DTABLE: tl.constexpr,
    DROPOUT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq like out. far_ptr (heads, b tiles, 2): where HAS_DTABLE, the sums of ds at rel <= -far and rel >= far_right.

    A tile of queries finds its keys as in the forward pass; a row whose lse is -inf sees none.
    """
    pid = tl.program_id(0)
    tile, head, b = tiles - 1 - pid % tiles, (pid // tiles) % heads, (pid // tiles // heads).to(tl.int64)
    m0 = tile * BLOCK_M
    row, last_row = m0 + tl.arange(0, BLOCK_M), tl.minimum(m0 + BLOCK_M, sq) - 1
    col = tl.arange(0, BLOCK_D)
    in_row, in_col = row < sq, col < D
    FLOAT32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    stored = in_row[:, None] & in_col[None, :]
    q_ptr += b * stride_qb + tl.cast(head, tl.int64) * stride_qh
    k_ptr += b * stride_kb + tl.cast(head // group, tl.int64) * stride_kh
    v_ptr += b * stride_vb + tl.cast(head // group, tl.int64) * stride_vh
    dout_ptr += b * stride_dob + tl.cast(head, tl.int64) * stride_doh
    q = tl.load(q_ptr + row.to(tl.int64)[:, None] * stride_qm + col[None, :], mask=stored, other=0.0)
    dout = tl.load(dout_ptr + row.to(tl.int64)[:, None] * stride_dom + col[None, :], mask=stored, other=0.0)
    rows = (b * heads + head) * sq
    lse = tl.load(lse_ptr + rows + row, mask=in_row, other=0.0)
    delta = tl.load(delta_ptr + rows + row, mask=in_row, other=0.0)

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
    all_lo, last_hi = window(last_diagonal, last_start_k, last_end_k, left, right)
    begin = origin + ((first_lo - origin) // 16) * 16
    count = tl.maximum(last_hi - begin + BLOCK_N - 1, 0) // BLOCK_N
    all_hi = tl.where(holes, all_lo, first_hi)
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
    q, qk_scale, unit = scaled(q, scale, FLOAT32)
    lse *= unit
    zero = scale * 0.0
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if HAS_DTABLE:
        sum_left, sum_right = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)

    for t in range(0, a1 - a0 + b1 - b0):
        block = plain_block(t, a0, a1, b0) if HAS_BIAS else a0 + t
        n0 = begin + block * BLOCK_N
        at = tl.cast(n0, tl.int64)
        if D == BLOCK_D:
            k = tl.load(k_ptrs + at * stride_kn)
            v = tl.load(v_ptrs + at * stride_vn)
        else:
            k = tl.load(k_ptrs + at * stride_kn, mask=in_col[None, :], other=0.0)
            v = tl.load(v_ptrs + at * stride_vn, mask=in_col[None, :], other=0.0)
        scores = product(q, k, PRECISION)
        shift = lse
        if HAS_BIAS:
            shift -= tl.where(block < a1, bias_left, bias_right)
        p = exp(scores * qk_scale - shift[:, None], FLOAT32)
        dp = product(dout, v, PRECISION)
        if DROPOUT:
            position = n0 - origin
            keep = keep_tile(position, row - start_q, sequence_head, k0, k1, threshold, BLOCK_M, BLOCK_N, True, False)
            dp = tl.where(keep, dp * dropout_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = accumulate(dq, ds.to(k.dtype), k, zero, PRECISION)
        if HAS_DTABLE:
            total = tl.sum(ds, axis=1)
            sum_left += tl.where(block < a1, total, 0.0)
            sum_right += tl.where(block < a1, 0.0, total)

    for t in range(0, count - (a1 - a0) - (b1 - b0)):
        n0 = begin + general_block(t, a0, a1, b0, b1) * BLOCK_N
        at = tl.cast(n0, tl.int64)
        key = n0 + n
        in_key = key < last_hi
        if HAS_MASK:
            in_key &= tl.load(mask_ptr + key, mask=in_key, other=0) != 0
        in_tile = in_key[:, None] & in_col[None, :]
        k = tl.load(k_ptrs + at * stride_kn, mask=in_tile, other=0.0)
        v = tl.load(v_ptrs + at * stride_vn, mask=in_tile, other=0.0)
        visible = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
        if HAS_MASK:
            visible &= in_key[None, :]
        scores = product(q, k, PRECISION) * qk_scale
        rel = key[None, :] - diagonal[:, None]
        if HAS_BIAS:
            left_of, right_of = n0 + BLOCK_N - 1 - first_diagonal, n0 - last_diagonal
            if (first == last) & ((left_of <= -far) | (right_of >= far_right)):
                scores += tl.where(left_of <= -far, bias_left, bias_right)
            else:
                scores += near_bias(bias_ptr, rel, far)
        p = tl.where(visible, exp(scores - lse[:, None], FLOAT32), 0.0)
        dp = product(dout, v, PRECISION)
        if DROPOUT:
            position = n0 - (start_k if PACKED else 0)
            keep = keep_tile(
                position, row - start_q, sequence_head, k0, k1, threshold, BLOCK_M, BLOCK_N, not PACKED, False
            )
            dp = tl.where(keep, dp * dropout_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = accumulate(dq, ds.to(k.dtype), k, zero, PRECISION)
        if HAS_DTABLE:
            sum_left += tl.sum(tl.where(rel <= -far, ds, 0.0), axis=1)
            sum_right += tl.sum(tl.where(rel >= far_right, ds, 0.0), axis=1)

    out = ((b * sq + row) * heads + head)[:, None] * D + col[None, :]
    tl.store(dq_ptr + out, (dq * scale).to(dq_ptr.dtype.element_ty), mask=stored)
    if HAS_DTABLE:  # a row past the end has neither dout nor delta
        at = far_ptr + (head * (tl.num_programs(0) // heads) + b * tiles + tile) * 2
        tl.store(at, tl.sum(sum_left, axis=0))
        tl.store(at + 1, tl.sum(sum_right, axis=0))


# ---- the bias table


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def _expand_bias(
    table_ptr, bias_ptr, heads, far, unit,
    STARTS: tl.constexpr, BIDIRECTIONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """bias (heads, 2 far + 1) = unit times table (buckets, heads), by relative position -far..far."""
    head = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < 2 * far + 1
    bias = tl.load(table_ptr + bucket_of(i - far, STARTS, BIDIRECTIONAL) * heads + head, mask=mask, other=0.0)
    tl.store(bias_ptr + head * (2 * far + 1) + i, bias.to(tl.float32) * unit, mask=mask)


@triton.jit(do_not_specialize=(*PLAIN_NUMBERS, "group"))
def _dtable(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, partial_ptr, cu_q_ptr, cu_k_ptr, mask_ptr, bias_ptr, rng_ptr,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_dob, stride_dom, stride_doh,
    items, first_tile, sequences, sq, sk, heads, group, tiles, left, right, scale, far, far_right, site, threshold,
    dropout_scale,
    PACKED: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, STARTS: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr, BUCKETS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """partial (programs, diagonals of tiles, heads, BUCKETS): sums of ds at -far < rel < far_right.

    Tile (m0, n0) has n0 on m0's diagonal plus BLOCK·(first_tile + program_id(1)): all on one such diagonal have the
    same relative positions. items: pairs of a sequence and one of `tiles` tiles of its queries.
    """
    head = tl.program_id(2)
    apart = (first_tile + tl.program_id(1)) * BLOCK
    i, col = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    in_col = col < D
    rel = apart + i[None, :] - i[:, None]
    near = (rel > -far) & (rel < far_right)
    bias = near_bias(bias_ptr + head * (2 * far + 1), rel, far)
    head64, kv_head = tl.cast(head, tl.int64), tl.cast(head // group, tl.int64)
    k0, k1 = 0, 0
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    FLOAT32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        sequence = tl.cast(item, tl.int32) // tiles
        b = (sequence * 0 if PACKED else sequence).to(tl.int64)
        start_q, end_q = bounds(cu_q_ptr, sequence, sq, PACKED)
        start_k, end_k = bounds(cu_k_ptr, sequence, sk, PACKED)
        m0 = start_q + (item - sequence * tiles) * BLOCK
        n0 = m0 + end_k - end_q + apart
        if (m0 < end_q) & (n0 < end_k) & (n0 + BLOCK > start_k):
            row, key = m0 + i, n0 + i
            in_row, in_key = row < end_q, (key >= start_k) & (key < end_k)
            if HAS_MASK:
                in_key &= tl.load(mask_ptr + b * sk + key, mask=in_key, other=0) != 0
            in_q, in_k = in_row[:, None] & in_col[None, :], in_key[:, None] & in_col[None, :]
            row64, key64 = row.to(tl.int64)[:, None], key.to(tl.int64)[:, None]
            q = tl.load(q_ptr + b * stride_qb + head64 * stride_qh + row64 * stride_qm + col, mask=in_q, other=0.0)
            k = tl.load(k_ptr + b * stride_kb + kv_head * stride_kh + key64 * stride_kn + col, mask=in_k, other=0.0)
            v = tl.load(v_ptr + b * stride_vb + kv_head * stride_vh + key64 * stride_vn + col, mask=in_k, other=0.0)
            dout = tl.load(
                dout_ptr + b * stride_dob + head64 * stride_doh + row64 * stride_dom + col, mask=in_q, other=0.0
            )
            at = (b * heads + head) * sq + row
            lse = tl.load(lse_ptr + at, mask=in_row, other=0.0)
            delta = tl.load(delta_ptr + at, mask=in_row, other=0.0)
            lo, hi = window(row + end_k - end_q, start_k, end_k, left, right)
            visible = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None]) & in_key[None, :]
            visible &= near & in_row[:, None]
            q, qk_scale, unit = scaled(q, scale, FLOAT32)
            scores = product(q, k, PRECISION) * qk_scale + bias
            p = tl.where(visible, exp(scores - lse[:, None] * unit, FLOAT32), 0.0)
            dp = product(dout, v, PRECISION)
            if DROPOUT:
                keep = keep_tile(
                    n0 - start_k, row - start_q, sequence * heads + head, k0, k1, threshold, BLOCK, BLOCK, False, False
                )
                dp = tl.where(keep, dp * dropout_scale, 0.0)
            acc += p * (dp - delta[:, None])
    bucket_of_rel = bucket_of(rel, STARTS, BIDIRECTIONAL)
    at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * heads + head
    for bucket in range(0, BUCKETS):
        total = tl.sum(tl.sum(tl.where(bucket_of_rel == bucket, acc, 0.0), axis=1), axis=0)
        tl.store(partial_ptr + at * BUCKETS + bucket, total)


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def _sum_dtable(
    partial_ptr, far_ptr, dtable_ptr, partials, fars, heads, bucket_left, bucket_right,
    BUCKETS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
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
