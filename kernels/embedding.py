"""embedding in Triton: gathered rows summed, normalised and dropped in one pass. The maths: fastlm/ops/embedding.py.

The gradient of a table is a sum over the tokens of each id, in the order of the tokens, without atomics: tokens are
sorted by id, stably, and a program adds up CHUNK of them in a row, run by run. A run that ends inside its chunk goes to
the table; one that is cut goes to scratch, and `_join` adds its parts. A table of few rows, token types, has long runs
alone: there each program sums its share of the tokens for every row, and partials are added.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .device import multiprocessors
from .partials import sum_partials
from .philox import dropout_key, keep_rows
from .tuning import choose


@dataclass(frozen=True)
class Config:
    """Tokens and columns of a tile; a token's row lies in one program's registers."""

    block_m: int
    block_n: int
    num_warps: int


LONGEST = 8192  # columns: 16 warps hold 16 elements a thread of each of h, dy and the two sums
TILE = 2048  # elements of a tile: 16 a thread
CHUNK = 32  # sorted tokens a program adds one after the other
JOIN = 32  # chunks that _join takes at once
FEW = 4  # rows of a table up to which every program keeps a sum for each: BERT's token types are 2


def config(cols: int, kernel: str) -> Config:
    block_n = max(16, triton.next_power_of_2(cols))
    rows, warps = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16)
    return choose(
        kernel, (block_n,), lambda: _rule(block_n, kernel),
        lambda: [Config(m, block_n, w) for m in rows for w in warps if 4 <= m * block_n // (32 * w) <= 64],
    )  # fmt: skip


def _rule(block_n: int, kernel: str) -> Config:
    """Rows of up to 1024 as measured on an H100 (LOG.md, 2026-11-26): forward a warp alone, so that no sum of a row
    waits at a barrier; backward twice TILE on 8 warps."""
    if block_n <= 1024:
        forward = kernel == "embedding_fwd"
        return Config(min(16, (1 if forward else 2) * TILE // block_n), block_n, 1 if forward else 8)
    return Config(max(1, min(16, TILE // block_n)), block_n, min(16, max(4, 4 * block_n // TILE)))


@triton.jit
def _gather(ptr, row, rows, stride, col, mask):
    """table[row] (M, N) in float32; a row outside of the table is 0."""
    inside = mask & ((row >= 0) & (row < rows))[:, None]
    return tl.load(ptr + row[:, None] * stride + col[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sum_rows(
    token, col, mask, tokens, ids_ptr, position_ids_ptr, type_ids_ptr, word_ptr, position_ptr, type_ptr, word_rows,
    position_rows, type_rows, stride_w, stride_p, stride_t, period, HAS_POSITION: tl.constexpr, HAS_TYPE: tl.constexpr,
    HAS_POSITION_IDS: tl.constexpr, HAS_TYPE_IDS: tl.constexpr,
):  # fmt: skip
    """h (M, N): the rows of a tile's tokens. Without ids, positions count columns of `period`, and types are 0."""
    here = token < tokens
    h = _gather(word_ptr, tl.load(ids_ptr + token, mask=here, other=0), word_rows, stride_w, col, mask)
    if HAS_POSITION:
        if HAS_POSITION_IDS:
            position = tl.load(position_ids_ptr + token, mask=here, other=0)
        else:
            position = token % period
        h += _gather(position_ptr, position, position_rows, stride_p, col, mask)
    if HAS_TYPE:
        kind = token * 0
        if HAS_TYPE_IDS:
            kind = tl.load(type_ids_ptr + token, mask=here, other=0)
        h += _gather(type_ptr, kind, type_rows, stride_t, col, mask)
    return h


@triton.jit
def _fwd(
    ids_ptr, position_ids_ptr, type_ids_ptr, word_ptr, position_ptr, type_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr,
    rng_ptr, tokens, cols, word_rows, position_rows, type_rows, stride_w, stride_p, stride_t, period, eps,
    site, threshold: tl.int64, scale,
    HAS_POSITION: tl.constexpr, HAS_TYPE: tl.constexpr, HAS_POSITION_IDS: tl.constexpr, HAS_TYPE_IDS: tl.constexpr,
    NORM: tl.constexpr, HAS_B: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    mask = (token < tokens)[:, None] & (col < cols)[None, :]
    y = _sum_rows(
        token, col, mask, tokens, ids_ptr, position_ids_ptr, type_ids_ptr, word_ptr, position_ptr, type_ptr, word_rows,
        position_rows, type_rows, stride_w, stride_p, stride_t, period, HAS_POSITION, HAS_TYPE, HAS_POSITION_IDS,
        HAS_TYPE_IDS,
    )  # fmt: skip
    if NORM:
        mean = tl.sum(y, axis=1) / cols
        centred = tl.where(mask, y - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / cols + eps)
        tl.store(mean_ptr + token, mean, mask=token < tokens)
        tl.store(rstd_ptr + token, rstd, mask=token < tokens)
        y = centred * rstd[:, None] * tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
        if HAS_B:
            y += tl.load(b_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
        y = tl.where(keep_rows(token, tl.arange(0, BLOCK_N // 4), k0, k1, threshold), y * scale, 0.0)
    tl.store(y_ptr + token[:, None] * cols + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd(
    dy_ptr, ids_ptr, position_ids_ptr, type_ids_ptr, word_ptr, position_ptr, type_ptr, w_ptr, mean_ptr, rstd_ptr,
    dh_ptr, partial_ptr, rng_ptr, tokens, cols, word_rows, position_rows, type_rows, stride_dy, stride_w, stride_p,
    stride_t, period, site, threshold: tl.int64, scale,
    HAS_POSITION: tl.constexpr, HAS_TYPE: tl.constexpr, HAS_POSITION_IDS: tl.constexpr, HAS_TYPE_IDS: tl.constexpr,
    NORM: tl.constexpr, HAS_B: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program, count = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK_N)
    in_col = col < cols
    if NORM:
        w = tl.load(w_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
        dw, db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    for tile in range(program, tl.cdiv(tokens, BLOCK_M), count):
        token = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        here = token < tokens
        mask = here[:, None] & in_col[None, :]
        d = tl.load(dy_ptr + token[:, None] * stride_dy + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            d = tl.where(keep_rows(token, tl.arange(0, BLOCK_N // 4), k0, k1, threshold), d * scale, 0.0)
        if NORM:
            h = _sum_rows(
                token, col, mask, tokens, ids_ptr, position_ids_ptr, type_ids_ptr, word_ptr, position_ptr, type_ptr,
                word_rows, position_rows, type_rows, stride_w, stride_p, stride_t, period, HAS_POSITION, HAS_TYPE,
                HAS_POSITION_IDS, HAS_TYPE_IDS,
            )  # fmt: skip
            mean = tl.load(mean_ptr + token, mask=here, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + token, mask=here, other=0.0)[:, None]
            xhat = tl.where(mask, (h - mean) * rstd, 0.0)
            dw += d * xhat
            if HAS_B:
                db += d
            g = d * w
            d = rstd * (g - (tl.sum(g, axis=1) / cols)[:, None] - xhat * (tl.sum(g * xhat, axis=1) / cols)[:, None])
        tl.store(dh_ptr + token[:, None] * cols + col[None, :], d, mask=mask)
    if NORM:
        tl.store(partial_ptr + program * cols + col, tl.sum(dw, axis=0), mask=in_col)
        if HAS_B:
            tl.store(partial_ptr + (count + program) * cols + col, tl.sum(db, axis=0), mask=in_col)


# ---- gradients of tables


@triton.jit
def _store_row(table_ptr, row, rows, skip, cols, col, value):
    """A row of the gradient, unless it is that of padding_idx or outside of the table."""
    inside = (row >= 0) & (row < rows) & (row != skip)
    tl.store(table_ptr + row * cols + col, value.to(table_ptr.dtype.element_ty), mask=(col < cols) & inside)


@triton.jit
def _runs(
    dh_ptr, sorted_ptr, order_ptr, table_ptr, scratch_ptr, tokens, rows, cols, stride_dh, skip,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of the runs of one id in a chunk. scratch (chunks, 2, cols): the run that came in, the run that goes on."""
    chunk = tl.program_id(0)
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, tokens)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    head_ptr = scratch_ptr + chunk.to(tl.int64) * 2 * cols
    row = tl.load(sorted_ptr + start)
    came_in = ((start > 0) & (tl.load(sorted_ptr + start - 1, mask=start > 0, other=0) == row)).to(tl.int32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(start, end):
        here = tl.load(sorted_ptr + k)
        if here != row:
            if came_in != 0:
                tl.store(head_ptr + col, total, mask=col < cols)
            else:
                _store_row(table_ptr, row, rows, skip, cols, col, total)
            came_in = came_in * 0
            row = here
            total = tl.zeros((BLOCK_N,), tl.float32)
        token = tl.load(order_ptr + k)
        total += tl.load(dh_ptr + token * stride_dh + col, mask=col < cols, other=0.0).to(tl.float32)
    goes_on = (end < tokens) & (tl.load(sorted_ptr + end, mask=end < tokens, other=0) == row)
    if came_in != 0:
        tl.store(head_ptr + col, total, mask=col < cols)
    elif goes_on:
        tl.store(head_ptr + cols + col, total, mask=col < cols)
    else:
        _store_row(table_ptr, row, rows, skip, cols, col, total)


@triton.jit
def _join(
    sorted_ptr, table_ptr, scratch_ptr, tokens, rows, cols, skip,
    CHUNK: tl.constexpr, JOIN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of the run that begins in a chunk and goes on beyond it."""
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    start, end = chunk * CHUNK, (chunk + 1) * CHUNK
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if end < tokens:
        row = tl.load(sorted_ptr + end - 1)
        begins = (start == 0) | (tl.load(sorted_ptr + start - 1, mask=start > 0, other=0) != row)
        if (tl.load(sorted_ptr + end) == row) & begins:
            mine = scratch_ptr + (chunk.to(tl.int64) * 2 + 1) * cols + col
            total = tl.load(mine, mask=col < cols, other=0.0)
            part = chunk + 1 + tl.arange(0, JOIN)
            same = (part < chunks) & (tl.load(sorted_ptr + part * CHUNK, mask=part < chunks, other=row - 1) == row)
            while tl.max(same.to(tl.int32), axis=0) != 0:
                offset = part.to(tl.int64)[:, None] * 2 * cols + col[None, :]
                heads = tl.load(scratch_ptr + offset, mask=same[:, None] & (col < cols)[None, :], other=0.0)
                total += tl.sum(heads, axis=0)
                part += JOIN
                same = (part < chunks) & (tl.load(sorted_ptr + part * CHUNK, mask=part < chunks, other=row - 1) == row)
            _store_row(table_ptr, row, rows, skip, cols, col, total)


@triton.jit
def _few_rows(
    dh_ptr, ids_ptr, partial_ptr, tokens, cols, stride_dh, HAS_IDS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial (programs, ROWS, cols): every row's sum over a program's share of the tokens."""
    program, count = tl.program_id(0), tl.num_programs(0)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    for row in tl.static_range(ROWS):
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for tile in range(program, tl.cdiv(tokens, BLOCK_M), count):
            token = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            here = token < tokens
            if HAS_IDS:
                here &= tl.load(ids_ptr + token, mask=here, other=-1) == row
            elif row > 0:
                here &= token < 0
            mask = here[:, None] & (col < cols)[None, :]
            total += tl.load(dh_ptr + token[:, None] * stride_dh + col[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(partial_ptr + (program * ROWS + row) * cols + col, tl.sum(total, axis=0), mask=col < cols)


# ---- launchers: ids (tokens,) int64 contiguous; tables (rows, cols) with a unit last stride


def _lookups(tables, ids, period):
    """The arguments of `_sum_rows` that both passes share."""
    (word, position, token_type), (input_ids, positions, type_ids) = tables, ids
    pointers = input_ids, positions, type_ids, word, position, token_type
    sizes = [0 if table is None else table.shape[0] for table in tables]
    strides = [0 if table is None else table.stride(0) for table in tables]
    has = {
        "HAS_POSITION": position is not None,
        "HAS_TYPE": token_type is not None,
        "HAS_POSITION_IDS": positions is not None,
        "HAS_TYPE_IDS": type_ids is not None,
    }
    return pointers, sizes, (*strides, period), has


def embedding_fwd(tables, ids, period, weight, bias, y, mean, rstd, *, eps, threshold, scale, rng, site):
    """Fills y (tokens, cols), and mean and rstd (tokens,) where there is a weight.

    tables: word, position, token_type; ids: input_ids, positions, token_type_ids; all but the first may be None.
    period: columns of input_ids, of which positions count by default.
    """
    tokens, cols = y.shape
    if tokens == 0:
        return
    c = config(cols, "embedding_fwd")
    pointers, sizes, strides, has = _lookups(tables, ids, period)
    _fwd[(triton.cdiv(tokens, c.block_m),)](
        *pointers, weight, bias, y, mean, rstd, rng, tokens, cols, *sizes, *strides, eps, site, threshold, scale,
        NORM=weight is not None, HAS_B=bias is not None, DROPOUT=threshold > 0,
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, num_warps=c.num_warps, **has,
    )  # fmt: skip


def embedding_bwd(
    dy, tables, ids, period, weight, mean, rstd, gradients, dweight, dbias, *, threshold, scale, rng, site,
    padding_idx,
):  # fmt: skip
    """Fills dweight and dbias (cols,) unless None, and each of `gradients` (rows, cols), of the tables, unless None."""
    tokens, cols = dy.shape
    if tokens == 0:
        for out in (*gradients, dweight, dbias):
            if out is not None:
                out.zero_()
        return
    dh = dy
    if weight is not None or threshold > 0:
        c = config(cols, "embedding_bwd")
        count = min(triton.cdiv(tokens, c.block_m), 2 * multiprocessors(dy.device))
        dh = dy.new_empty(tokens, cols, dtype=torch.float32)
        partial = dy.new_empty(2 if dbias is not None else 1, count, cols, dtype=torch.float32)
        pointers, sizes, strides, has = _lookups(tables, ids, period)
        _bwd[(count,)](
            dy, *pointers, weight, mean, rstd, dh, partial, rng, tokens, cols, *sizes, dy.stride(0), *strides, site,
            threshold, scale, NORM=weight is not None, HAS_B=dbias is not None, DROPOUT=threshold > 0,
            BLOCK_M=c.block_m, BLOCK_N=c.block_n, num_warps=c.num_warps, **has,
        )  # fmt: skip
        if weight is not None:
            sum_partials(partial, dweight, dbias)
    for k, (gradient, table_ids) in enumerate(zip(gradients, ids)):
        if gradient is not None:
            _table_gradient(dh, table_ids, period if k == 1 else 1, gradient, padding_idx if k == 0 else -1)


def _table_gradient(dh, ids, period, out, skip):
    """out[row] = Σ dh over the tokens of id `row`; `ids` None: token modulo period. Row `skip` is 0."""
    (tokens, cols), rows = dh.shape, out.shape[0]
    block_n = min(1024, max(16, triton.next_power_of_2(cols)))
    columns = triton.cdiv(cols, block_n)
    if rows <= FEW and (ids is not None or period == 1):
        block_m = max(1, TILE // block_n)
        count = min(triton.cdiv(tokens, block_m), 2 * multiprocessors(dh.device))
        partial = dh.new_empty(1, count, rows * cols, dtype=torch.float32)
        _few_rows[(count, columns)](
            dh, ids, partial, tokens, cols, dh.stride(0),
            HAS_IDS=ids is not None, ROWS=rows, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
        sum_partials(partial, out.view(-1))
        if 0 <= skip < rows:
            out[skip].zero_()
        return
    here = torch.arange(tokens, device=dh.device)
    if ids is None:  # by columns of a (tokens / period, period) matrix
        order, ids = here.view(-1, period).t().reshape(-1), here // (tokens // period)
    else:
        ids, order = torch.sort(ids, stable=True)
    out.zero_()
    chunks = triton.cdiv(tokens, CHUNK)
    scratch = dh.new_empty(chunks, 2, cols, dtype=torch.float32)
    _runs[(chunks, columns)](
        dh, ids, order, out, scratch, tokens, rows, cols, dh.stride(0), skip,
        CHUNK=CHUNK, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    join_n = min(128, block_n)  # with JOIN rows of it, 32 elements a thread
    _join[(chunks, triton.cdiv(cols, join_n))](
        ids, out, scratch, tokens, rows, cols, skip, CHUNK=CHUNK, JOIN=JOIN, BLOCK_N=join_n, num_warps=4
    )
