"""attention in Triton, backward: the probabilities are computed again from lse. The maths: fastlm/ops/attention.py.

No two programs add to one number, so every run gives the same bits: `_dkdv` owns a tile of keys and loops over queries,
`_dq` owns a tile of queries and loops over keys. That takes seven products; atomic additions would need five.

The plan of the blocks: attention_plan.py. The gradient of the bias table: attention_bias.py.
"""

import triton
import triton.language as tl

from .attention_plan import (
    PLAIN_NUMBERS,
    Axis,
    Features,
    Rows,
    Sight,
    columns,
    counted,
    general_block,
    general_count,
    in_no_sequence,
    load_rows,
    make_plan,
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
    head_bias,
    keep_tile,
    make_drop,
    near_bias,
    product,
    scaled,
    settled,
    uncap,
)


@triton.jit
def _delta(out, dout, dlse_ptr, at, in_row):
    """delta (M,) = dout·out - dlse, of tiles (M, D) of out and dout; at: of the rows in dlse, which may be None."""
    if out.dtype == tl.float32:  # summed in the order of dout·v: ds is small where out is close to one v
        products = product(dout, out, "ieee")
        i = tl.arange(0, out.shape[0])
        delta = tl.sum(tl.where(i[:, None] == i[None, :], products, 0.0), axis=1)
    else:
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=in_row, other=0.0)
    return delta


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def _dkdv(
    q: Rows,
    k: Rows,
    v: Rows,
    dout: Rows,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    sequence_ptr,
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
    WGMMA: tl.constexpr,
    PARTS: tl.constexpr = 1,
):
    """dk, dv (b, sk, heads / group, D), contiguous, of BLOCK_N keys: over all queries of the heads that share them.

    The rows of a tile are keys here. A masked key affects its own row alone, which is set to 0 at the end.
    """
    PACKED: tl.constexpr = features.cu_q_ptr is not None
    HAS_BIAS: tl.constexpr = features.bias_ptr is not None
    DROPOUT: tl.constexpr = features.rng_ptr is not None
    HAS_SOFTCAP: tl.constexpr = features.softcap is not None
    FLOAT32: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    kv_heads = heads // group
    tile, kv_head, b = program(tiles, kv_heads)
    n0 = tile * BLOCK_N
    key, col, m = n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    in_key, in_col = key < sk, col < D
    stored = in_key[:, None] & in_col[None, :]
    real = in_key
    if features.mask_ptr is not None:
        real &= tl.load(features.mask_ptr + b * sk + key, mask=in_key, other=0) != 0
    in_tile = real[:, None] & in_col[None, :]
    k_tile = tl.load(row_ptrs(k, b, kv_head, key, col), mask=in_tile, other=0.0)
    v_tile = tl.load(row_ptrs(v, b, kv_head, key, col), mask=in_tile, other=0.0)
    sight = Sight(Axis(features.cu_k_ptr, sk), Axis(features.cu_q_ptr, sq), right, left, far_right, far)
    last_key = tl.minimum(n0 + BLOCK_N, sk) - 1
    if features.mask_ptr is not None:
        any_key = tl.max(real.to(tl.int32), axis=0) > 0
        plan, seen = make_plan(sight, sequences, key, n0, last_key, None, any_key, HAS_BIAS, BLOCK_M, 1)
    else:
        plan, seen = make_plan(sight, sequences, key, n0, last_key, None, None, HAS_BIAS, BLOCK_M, 1)
    if DROPOUT:
        drop = make_drop(features.rng_ptr, site, threshold)
    scale, dropout_scale = features.scale, features.dropout_scale
    # 0, but not a constant. With one, LLVM selects after it has rounded p, in three instructions more for a pair.
    zero = scale * 0.0
    m_of_stats = counted(BLOCK_M)  # to load lse and delta by
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for g in range(0, group):
        head = kv_head * group + g
        q_ptrs, dout_ptrs = row_ptrs(q, b, head, m, col), row_ptrs(dout, b, head, m, col)
        rows = (b * heads + head) * sq
        if HAS_BIAS:
            bias = head_bias(features.bias_ptr, head, far, far_right)

        for t in range(0, plain_count(plan)):
            block = plain_block(plan, t) if HAS_BIAS else plan.a0 + t
            m0 = plan.begin + block * BLOCK_M
            at = tl.cast(m0, tl.int64)
            q_tile = load_rows(q_ptrs + at * q.stride_m, in_col, D)
            dout_tile = load_rows(dout_ptrs + at * dout.stride_m, in_col, D)
            q_tile, qk_scale, unit = scaled(q_tile, scale, FLOAT32)
            shift = tl.load(lse_ptr + rows + m0 + m_of_stats) * unit
            if HAS_BIAS:  # rel falls as the query rises: the first run is on the right
                shift -= tl.where(block < plan.a1, bias.right, bias.left)
            delta = tl.load(delta_ptr + rows + m0 + m_of_stats)
            scores, still = product(k_tile, q_tile, PRECISION), qk_scale
            if HAS_SOFTCAP:
                scores, still = cap(scores * qk_scale, features.softcap, FLOAT32), 1.0
            p = exp(scores * still - shift[None, :], FLOAT32)
            dp = product(v_tile, dout_tile, PRECISION)
            kept = p
            if DROPOUT:
                # Of one sequence, whose first key need not be a multiple of 16. Its start is loaded again here: kept in
                # a register, it costs 24 bytes of spills on sm_100, with a bias.
                sequence = plan.first.sequence
                position = n0 - (tl.load(features.cu_k_ptr + sequence) if PACKED else 0)
                query, sequence_head = m0 + m - plan.first.col_start, (sequence if PACKED else b) * heads + head
                keep = keep_tile(drop, position, query, sequence_head, BLOCK_M, BLOCK_N, not PACKED, True)
                kept, dp = tl.where(keep, p, zero), tl.where(keep, dp, 0.0) * dropout_scale
            dv = accumulate(dv, kept.to(dout_tile.dtype), dout_tile, zero, PRECISION)
            ds = p * (dp - delta[None, :])
            if HAS_SOFTCAP:
                ds = uncap(ds, scores, features.softcap)
            dk = accumulate(dk, ds.to(q_tile.dtype), q_tile, zero, PRECISION)
            if WGMMA and PACKED and DROPOUT:
                dk = settled(dk)

        for t in range(0, general_count(plan)):
            m0 = plan.begin + general_block(plan, t) * BLOCK_M
            at = tl.cast(m0, tl.int64)
            row = m0 + m
            in_row = row < plan.last.hi
            in_block = in_row[:, None] & in_col[None, :]
            q_tile = tl.load(q_ptrs + at * q.stride_m, mask=in_block, other=0.0)
            dout_tile = tl.load(dout_ptrs + at * dout.stride_m, mask=in_block, other=0.0)
            at_stats = m0 + m_of_stats
            lse = tl.load(lse_ptr + rows + at_stats, mask=at_stats < plan.last.hi, other=0.0)
            delta = tl.load(delta_ptr + rows + at_stats, mask=at_stats < plan.last.hi, other=0.0)
            q_tile, qk_scale, unit = scaled(q_tile, scale, FLOAT32)
            scores = product(k_tile, q_tile, PRECISION) * qk_scale
            if HAS_SOFTCAP:
                scores = cap(scores, features.softcap, FLOAT32)
            capped = scores
            if HAS_BIAS:
                single = plan.first.sequence == plan.last.sequence
                least, most = plan.first.diagonal - (m0 + BLOCK_M - 1), plan.last.diagonal - m0
                # Written out: by bias_of and columns, this kernel spills up to 80 bytes more on sm_120.
                if single & ((most <= -far) | (least >= far_right)):
                    scores += tl.where(most <= -far, bias.left, bias.right)
                else:
                    scores += near_bias(bias.ptr, seen.diagonal[:, None] - row[None, :], far)
            visible = (row[None, :] >= seen.lo[:, None]) & (row[None, :] < seen.hi[:, None])
            p = tl.where(visible, exp(scores - lse[None, :] * unit, FLOAT32), 0.0)
            dp = product(v_tile, dout_tile, PRECISION)
            kept = p
            if DROPOUT:
                position, query, sequence_head = n0, row, b * heads + head
                if PACKED:
                    sequence = tl.load(sequence_ptr + row, mask=in_row, other=0)
                    position = n0 - tl.load(features.cu_k_ptr + sequence)
                    query, sequence_head = row - tl.load(features.cu_q_ptr + sequence), sequence * heads + head
                keep = keep_tile(drop, position, query, sequence_head, BLOCK_M, BLOCK_N, not PACKED, True)
                kept, dp = tl.where(keep, p, zero), tl.where(keep, dp, 0.0) * dropout_scale
            dv = accumulate(dv, kept.to(dout_tile.dtype), dout_tile, zero, PRECISION)
            ds = p * (dp - delta[None, :])
            if HAS_SOFTCAP:
                ds = uncap(ds, capped, features.softcap)
            dk = accumulate(dk, ds.to(q_tile.dtype), q_tile, zero, PRECISION)
            if WGMMA and PACKED and DROPOUT:
                dk = settled(dk)

    at = ((b * sk + key) * (PARTS * kv_heads) + kv_head)[:, None] * D + col[None, :]
    if not FLOAT32:  # in float32 q is scaled already
        dk *= scale
    dk = tl.where(real[:, None], dk, 0.0)
    dv = tl.where(real[:, None], dv * dropout_scale, 0.0)
    if PACKED:
        lost = in_no_sequence(features.cu_k_ptr, sequences, key)[:, None]
        dk, dv = tl.where(lost, float("nan"), dk), tl.where(lost, float("nan"), dv)
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=stored)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=(*PLAIN_NUMBERS, "group"))
def _dq(
    q: Rows,
    k: Rows,
    v: Rows,
    dout: Rows,
    lse_ptr,
    delta_ptr,
    out_ptr,
    dlse_ptr,
    sequence_ptr,
    dq_ptr,
    far_ptr,
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
    PARTS: tl.constexpr = 1,
):
    """dq like out, or one of PARTS in each row; and for `_dkdv`, which runs later, delta (b, h, sq) = dout·out - dlse.

    sequence_ptr: None, or the sequence of each packed row, int32 (sq,), for `_dkdv` too.
    far_ptr (heads, b tiles, 2), or None: the sums of ds at rel <= -far and at rel >= far_right.

    A tile of queries finds its keys as in the forward pass; a row whose lse is -inf sees none.
    """
    PACKED: tl.constexpr = features.cu_q_ptr is not None
    HAS_BIAS: tl.constexpr = features.bias_ptr is not None
    DROPOUT: tl.constexpr = features.rng_ptr is not None
    HAS_SOFTCAP: tl.constexpr = features.softcap is not None
    HAS_DTABLE: tl.constexpr = far_ptr is not None
    FLOAT32: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    tile, head, b = program(tiles, heads)
    tile = tiles - 1 - tile
    m0 = tile * BLOCK_M
    row, col, n = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_row, in_col = row < sq, col < D
    stored = in_row[:, None] & in_col[None, :]
    q_tile = tl.load(row_ptrs(q, b, head, row, col), mask=stored, other=0.0)
    dout_tile = tl.load(row_ptrs(dout, b, head, row, col), mask=stored, other=0.0)
    rows = (b * heads + head) * sq
    lse = tl.load(lse_ptr + rows + row, mask=in_row, other=0.0)
    out = tl.load(out_ptr + ((b * sq + row) * heads + head)[:, None] * D + col[None, :], mask=stored, other=0.0)
    delta = _delta(out, dout_tile, dlse_ptr, rows + row, in_row)
    tl.store(delta_ptr + rows + row, delta, mask=in_row)
    plan, seen = plan_of_queries(features, sequences, sq, sk, b, row, m0, left, right, far, far_right, BLOCK_N)
    if sequence_ptr is not None and head == 0:
        tl.store(sequence_ptr + row, seen.sequence, mask=in_row)
    if HAS_BIAS:
        bias = head_bias(features.bias_ptr, head, far, far_right)
    if DROPOUT:
        drop = make_drop(features.rng_ptr, site, threshold)
    sequence_head = (seen.sequence if PACKED else b) * heads + head
    k_ptrs, v_ptrs = row_ptrs(k, b, head // group, n, col), row_ptrs(v, b, head // group, n, col)
    scale, dropout_scale = features.scale, features.dropout_scale
    q_tile, qk_scale, unit = scaled(q_tile, scale, FLOAT32)
    lse *= unit
    zero = scale * 0.0
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if HAS_DTABLE:
        sum_left, sum_right = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)

    for t in range(0, plain_count(plan)):
        block = plain_block(plan, t) if HAS_BIAS else plan.a0 + t
        n0 = plan.begin + block * BLOCK_N
        at = tl.cast(n0, tl.int64)
        k_tile = load_rows(k_ptrs + at * k.stride_m, in_col, D)
        v_tile = load_rows(v_ptrs + at * v.stride_m, in_col, D)
        scores, still = product(q_tile, k_tile, PRECISION), qk_scale
        if HAS_SOFTCAP:
            scores, still = cap(scores * qk_scale, features.softcap, FLOAT32), 1.0
        shift = lse
        if HAS_BIAS:
            shift -= tl.where(block < plan.a1, bias.left, bias.right)
        p = exp(scores * still - shift[:, None], FLOAT32)
        dp = product(dout_tile, v_tile, PRECISION)
        if DROPOUT:
            position = n0 - plan.first.col_start
            keep = keep_tile(drop, position, row - seen.start, sequence_head, BLOCK_M, BLOCK_N, True, False)
            dp = tl.where(keep, dp, 0.0) * dropout_scale
        ds = p * (dp - delta[:, None])
        du = ds
        if HAS_SOFTCAP:
            du = uncap(ds, scores, features.softcap)
        dq = accumulate(dq, du.to(k_tile.dtype), k_tile, zero, PRECISION)
        if HAS_DTABLE:
            total = tl.sum(ds, axis=1)
            sum_left += tl.where(block < plan.a1, total, 0.0)
            sum_right += tl.where(block < plan.a1, 0.0, total)

    for t in range(0, general_count(plan)):
        n0 = plan.begin + general_block(plan, t) * BLOCK_N
        at = tl.cast(n0, tl.int64)
        key, in_key, visible = columns(plan, seen, n0, features.mask_ptr, b * sk, BLOCK_N)
        in_tile = in_key[:, None] & in_col[None, :]
        k_tile = tl.load(k_ptrs + at * k.stride_m, mask=in_tile, other=0.0)
        v_tile = tl.load(v_ptrs + at * v.stride_m, mask=in_tile, other=0.0)
        scores = product(q_tile, k_tile, PRECISION) * qk_scale
        if HAS_SOFTCAP:
            scores = cap(scores, features.softcap, FLOAT32)
        capped = scores
        rel = key[None, :] - seen.diagonal[:, None]
        if HAS_BIAS:
            single = plan.first.sequence == plan.last.sequence
            least, most = n0 - plan.last.diagonal, n0 + BLOCK_N - 1 - plan.first.diagonal
            near = bias_of(bias, key[None, :], seen.diagonal[:, None], least, most, single)
            scores = biased(scores, near, zero)
        p = tl.where(visible, exp(scores - lse[:, None], FLOAT32), 0.0)
        dp = product(dout_tile, v_tile, PRECISION)
        if DROPOUT:
            position = n0 - (seen.col_start if PACKED else 0)
            keep = keep_tile(drop, position, row - seen.start, sequence_head, BLOCK_M, BLOCK_N, not PACKED, False)
            dp = tl.where(keep, dp, 0.0) * dropout_scale
        ds = p * (dp - delta[:, None])
        du = ds
        if HAS_SOFTCAP:
            du = uncap(ds, capped, features.softcap)
        dq = accumulate(dq, du.to(k_tile.dtype), k_tile, zero, PRECISION)
        if HAS_DTABLE:
            sum_left += tl.sum(tl.where(rel <= -far, ds, 0.0), axis=1)
            sum_right += tl.sum(tl.where(rel >= far_right, ds, 0.0), axis=1)

    out = ((b * sq + row) * (PARTS * heads) + head)[:, None] * D + col[None, :]
    tl.store(dq_ptr + out, (dq * scale).to(dq_ptr.dtype.element_ty), mask=stored)
    if HAS_DTABLE:  # dout and delta are 0 in rows past the end
        at = far_ptr + (head * (tl.num_programs(0) // heads) + b * tiles + tile) * 2
        tl.store(at, tl.sum(sum_left, axis=0))
        tl.store(at + 1, tl.sum(sum_right, axis=0))
