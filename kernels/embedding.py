"""embedding in Triton: gathered rows summed, normalised and dropped in one pass. The maths: fastlm/ops/embedding.py.

The gradient of a table is a sum over the tokens of each id, in the order of the tokens, without atomics. The rows of
all tables are numbered one after the other, and one stable sort orders the pairs of row and token of all. A program
adds CHUNK consecutive pairs, run by run. A run that ends inside its chunk goes to its table; a run that is cut goes to
scratch, and `_join` adds its parts. A table of few rows, token types, has only long runs: there each program sums its
share of the tokens for every row, and partial sums are added.

Up to three sums read the gradient of the sum of rows, dh. It is written once in the dtype of the tables, as eager
PyTorch does, and read so; the sums are in float32.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .device import register_limit, resident, stages
from .partials import sum_partials
from .philox import dropout_key
from .rows import (
    Dropout,
    Matrix,
    drop_rows,
    dropout_argument,
    load_tile,
    matrix,
    normalize,
    normalize_again,
)
from .tuning import choose


@dataclass(frozen=True)
class Config:
    """Tokens and columns of a tile. One program's registers hold a token's whole row."""

    block_m: int
    block_n: int
    num_warps: int

    def registers(self, norm: bool) -> int:
        """Of a thread of backward with 4 to 16 elements of each tensor; with so many it spills nothing on sm_80 and
        sm_90. Without a norm there are no sums to keep."""
        elements = max(4, self.block_m * self.block_n // (32 * self.num_warps))
        return register_limit(self.num_warps, 32 + (6 if norm else 1) * elements)


LONGEST = 8192  # columns: with 16 warps a thread holds 16 elements of each of h, dy and the two sums
TILE = 2048  # elements of a tile: 16 a thread
CHUNK = 32  # sorted tokens that a program adds in order
JOIN = 32  # chunks that `_join` reads at once
FEW_REGISTERS = 64  # of a thread of `_few_rows`, which has 16 elements
FEW = 4  # up to so many rows of a table, every program keeps a sum for each: BERT has 2 token types


def config(cols: int, kernel: str) -> Config:
    block_n = max(16, triton.next_power_of_2(cols))
    return choose(kernel, (block_n,), lambda: _rule(block_n, kernel), lambda: _others(block_n))


def _others(block_n: int) -> list[Config]:
    rows, warps = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16)
    return [Config(m, block_n, w) for m in rows for w in warps if 4 <= m * block_n // (32 * w) <= 64]


def _rule(block_n: int, kernel: str) -> Config:
    """Rows of up to 1024 as measured on an H100 (LOG.md, 2026-11-26). Forward: one warp, so no sum of a row waits at a
    barrier. Backward: twice TILE on 8 warps."""
    if block_n <= 1024:
        forward = kernel == "embedding_fwd"
        return Config(min(16, (1 if forward else 2) * TILE // block_n), block_n, 1 if forward else 8)
    return Config(max(1, min(16, TILE // block_n)), block_n, min(16, max(4, 4 * block_n // TILE)))


class Lookup(NamedTuple):
    """A table (rows, cols) with a unit last stride, and the ids of the tokens in it; ids_ptr None: a default.

    Without a table all four are None. Triton 3.6 cannot compare a tuple that has a None in it with None.
    """

    ptr: tl.tensor
    rows: tl.tensor
    stride: tl.tensor
    ids_ptr: tl.tensor


@triton.jit
def _gather(table: Lookup, row, col, mask):
    """table[row] (M, N) in float32, 0 outside of `mask`. A row outside the table is NaN: nothing here can raise."""
    inside = ((row >= 0) & (row < table.rows))[:, None]
    h = tl.load(table.ptr + row[:, None] * table.stride + col[None, :], mask=mask & inside, other=0.0).to(tl.float32)
    return tl.where(mask & ~inside, float("nan"), h)


@triton.jit
def _sum_rows(token, col, mask, tokens, word: Lookup, position: Lookup, kind: Lookup, period):
    """h (M, N): the rows of a tile's tokens. By default positions count columns of `period`, and types are 0.

    position and kind may have no table.
    """
    here = token < tokens
    h = _gather(word, tl.load(word.ids_ptr + token, mask=here, other=0), col, mask)
    if position.ptr is not None:
        if position.ids_ptr is not None:
            index = tl.load(position.ids_ptr + token, mask=here, other=0)
        else:
            index = token % period
        h += _gather(position, index, col, mask)
    if kind.ptr is not None:
        index = token * 0
        if kind.ids_ptr is not None:
            index = tl.load(kind.ids_ptr + token, mask=here, other=0)
        h += _gather(kind, index, col, mask)
    return h


@triton.jit
def _fwd(
    word: Lookup,
    position: Lookup,
    kind: Lookup,
    w_ptr,
    b_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    dropout: Dropout,
    tokens,
    cols,
    period,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y, and where there is a weight mean and rstd."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    mask = (token < tokens)[:, None] & (col < cols)[None, :]
    y = _sum_rows(token, col, mask, tokens, word, position, kind, period)
    if w_ptr is not None:
        y = normalize(y, mean_ptr, rstd_ptr, token, tokens, cols, eps, token < tokens, mask)
        y *= tl.load(w_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
        if b_ptr is not None:
            y += tl.load(b_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    if dropout is not None:
        k0, k1 = dropout_key(dropout.rng_ptr, dropout.site)
        y = drop_rows(y, dropout, k0, k1, token, tl.arange(0, BLOCK_N // 4))
    tl.store(y_ptr + token[:, None] * cols + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd(
    dy: Matrix,
    word: Lookup,
    position: Lookup,
    kind: Lookup,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dh_ptr,
    partial_ptr,
    dropout: Dropout,
    tokens,
    cols,
    period,
    HAS_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dh, the gradient of the sum of rows, and where there is a weight the partial sums of dw and db."""
    program, count = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK_N)
    in_col = col < cols
    if w_ptr is not None:
        w = tl.load(w_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
        dw, db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if dropout is not None:
        k0, k1 = dropout_key(dropout.rng_ptr, dropout.site)
    for tile in tl.range(program, tl.cdiv(tokens, BLOCK_M), count, num_stages=STAGES):
        token = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        here = token < tokens
        mask = here[:, None] & in_col[None, :]
        d = load_tile(dy, token, col, mask)
        if dropout is not None:
            d = drop_rows(d, dropout, k0, k1, token, tl.arange(0, BLOCK_N // 4))
        if w_ptr is not None:
            h = _sum_rows(token, col, mask, tokens, word, position, kind, period)
            xhat, rstd = normalize_again(h, mean_ptr, rstd_ptr, token, tokens, here)
            xhat = tl.where(mask, xhat, 0.0)
            dw += d * xhat
            if HAS_B:
                db += d
            g = d * w
            d = rstd * (g - (tl.sum(g, axis=1) / cols)[:, None] - xhat * (tl.sum(g * xhat, axis=1) / cols)[:, None])
        tl.store(dh_ptr + token[:, None] * cols + col[None, :], d.to(dh_ptr.dtype.element_ty), mask=mask)
    if w_ptr is not None:
        tl.store(partial_ptr + program * cols + col, tl.sum(dw, axis=0), mask=in_col)
        if HAS_B:
            tl.store(partial_ptr + (count + program) * cols + col, tl.sum(db, axis=0), mask=in_col)


# ---- gradients of tables


class TableGradient(NamedTuple):
    """The gradient (rows, cols), contiguous, of a table; row `skip` is left out, that of padding_idx.

    first: the key of row 0 in the sort. ids_ptr: as of Lookup; None: token modulo period.
    """

    ptr: tl.tensor
    rows: tl.tensor
    skip: tl.tensor
    first: tl.tensor
    ids_ptr: tl.tensor
    period: tl.tensor


NO_TABLE = TableGradient(None, None, None, None, None, None)  # None in each field, as in Lookup


@triton.jit
def _store_keys(key_ptr, table: TableGradient, token, tokens, keys):
    """The keys of the tokens in a table; for an id outside of it `keys`, which no row has."""
    if table.ids_ptr is not None:
        row = tl.load(table.ids_ptr + token, mask=token < tokens, other=0)
    else:
        row = (token % table.period).to(tl.int64)
    key = tl.where((row >= 0) & (row < table.rows), row + table.first, keys)
    tl.store(key_ptr + token, key.to(tl.int32), mask=token < tokens)


@triton.jit
def _keys(
    key_ptr, first: TableGradient, second: TableGradient, third: TableGradient, tokens, keys, BLOCK: tl.constexpr
):
    """key (tables, tokens): `first` of the table and the row in it."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _store_keys(key_ptr, first, token, tokens, keys)
    if second.ptr is not None:
        _store_keys(key_ptr + tokens, second, token, tokens, keys)
    if third.ptr is not None:
        _store_keys(key_ptr + 2 * tokens, third, token, tokens, keys)


@triton.jit
def _store_in(table: TableGradient, key, col, cols, value):
    row = key - table.first
    inside = (row >= 0) & (row < table.rows) & (row != table.skip)
    at = table.ptr + tl.cast(row, tl.int64) * cols + col
    tl.store(at, value.to(table.ptr.dtype.element_ty), mask=(col < cols) & inside)


@triton.jit
def _store_row(first: TableGradient, second: TableGradient, third: TableGradient, key, col, cols, value):
    """A row of the gradient that `key` belongs to, unless it is left out."""
    _store_in(first, key, col, cols, value)
    if second.ptr is not None:
        _store_in(second, key, col, cols, value)
    if third.ptr is not None:
        _store_in(third, key, col, cols, value)


@triton.jit
def _runs(
    dh: Matrix,
    sorted_ptr,
    order_ptr,
    first: TableGradient,
    second: TableGradient,
    third: TableGradient,
    scratch_ptr,
    pairs,
    tokens,
    cols,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums of the runs of one key in a chunk. scratch (chunks, 2, cols): the run that came in, the run that goes on."""
    chunk = tl.program_id(0)
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, pairs)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    head_ptr = scratch_ptr + chunk.to(tl.int64) * 2 * cols
    key = tl.load(sorted_ptr + start)
    came_in = ((start > 0) & (tl.load(sorted_ptr + start - 1, mask=start > 0, other=0) == key)).to(tl.int32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for k in tl.range(start, end, num_stages=4):  # three rows of dh are on their way while one is added
        here = tl.load(sorted_ptr + k)
        if here != key:
            if came_in != 0:
                tl.store(head_ptr + col, total, mask=col < cols)
            else:
                _store_row(first, second, third, key, col, cols, total)
            came_in = came_in * 0
            key = here
            total = tl.zeros((BLOCK_N,), tl.float32)
        token = tl.load(order_ptr + k)  # of up to three tables; % would take 70 instructions a row
        token -= tl.where(token >= tokens, tl.where(token >= 2 * tokens, 2 * tokens, tokens), 0)
        total += tl.load(dh.ptr + token * dh.stride + col, mask=col < cols, other=0.0).to(tl.float32)
    goes_on = (end < pairs) & (tl.load(sorted_ptr + end, mask=end < pairs, other=0) == key)
    if came_in != 0:
        tl.store(head_ptr + col, total, mask=col < cols)
    elif goes_on:
        tl.store(head_ptr + cols + col, total, mask=col < cols)
    else:
        _store_row(first, second, third, key, col, cols, total)


@triton.jit
def _join(
    sorted_ptr,
    first: TableGradient,
    second: TableGradient,
    third: TableGradient,
    scratch_ptr,
    pairs,
    cols,
    CHUNK: tl.constexpr,
    JOIN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum of the run that begins in a chunk and goes on beyond it."""
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    start, end = chunk * CHUNK, (chunk + 1) * CHUNK
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if end < pairs:
        key = tl.load(sorted_ptr + end - 1)
        begins = (start == 0) | (tl.load(sorted_ptr + start - 1, mask=start > 0, other=0) != key)
        if (tl.load(sorted_ptr + end) == key) & begins:
            mine = scratch_ptr + (chunk.to(tl.int64) * 2 + 1) * cols + col
            total = tl.load(mine, mask=col < cols, other=0.0)
            part = chunk + 1 + tl.arange(0, JOIN)
            same = (part < chunks) & (tl.load(sorted_ptr + part * CHUNK, mask=part < chunks, other=-1) == key)
            while tl.max(same.to(tl.int32), axis=0) != 0:
                offset = part.to(tl.int64)[:, None] * 2 * cols + col[None, :]
                heads = tl.load(scratch_ptr + offset, mask=same[:, None] & (col < cols)[None, :], other=0.0)
                total += tl.sum(heads, axis=0)
                part += JOIN
                same = (part < chunks) & (tl.load(sorted_ptr + part * CHUNK, mask=part < chunks, other=-1) == key)
            _store_row(first, second, third, key, col, cols, total)


@triton.jit
def _few_rows(
    dh: Matrix,
    ids_ptr,
    partial_ptr,
    tokens,
    cols,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """partial (programs, ROWS, cols): each row's sum over a program's share of the tokens; ids_ptr None: all are 0."""
    program, count = tl.program_id(0), tl.num_programs(0)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    for row in tl.static_range(ROWS):
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for tile in tl.range(program, tl.cdiv(tokens, BLOCK_M), count, num_stages=3):
            token = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            here = token < tokens
            if ids_ptr is not None:
                here &= tl.load(ids_ptr + token, mask=here, other=-1) == row
            elif row > 0:
                here &= token < 0
            mask = here[:, None] & (col < cols)[None, :]
            total += load_tile(dh, token, col, mask)
        tl.store(partial_ptr + (program * ROWS + row) * cols + col, tl.sum(total, axis=0), mask=col < cols)


# ---- launchers: ids (tokens,) int64 contiguous; tables (rows, cols) with a unit last stride


def _lookups(tables, ids):
    """Word, position and token type for the kernels."""
    return [
        Lookup(None, None, None, None) if table is None else Lookup(table, table.shape[0], table.stride(0), table_ids)
        for table, table_ids in zip(tables, ids)
    ]


def embedding_fwd(tables, ids, period, weight, bias, y, mean, rstd, *, eps, threshold, scale, rng, site):
    """Fills y (tokens, cols), and mean and rstd (tokens,) where there is a weight.

    tables: word, position, token_type; ids: input_ids, positions, token_type_ids; all but the first may be None.
    period: columns of input_ids, of which positions count by default.
    """
    tokens, cols = y.shape
    if tokens == 0:
        return
    c = config(cols, "embedding_fwd")
    dropout = dropout_argument(rng, site, threshold, scale)
    shape = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "num_warps": c.num_warps}
    _fwd[(triton.cdiv(tokens, c.block_m),)](
        *_lookups(tables, ids), weight, bias, y, mean, rstd, dropout, tokens, cols, period, eps, **shape
    )


def embedding_bwd(
    dy, tables, ids, period, weight, mean, rstd, gradients, dweight, dbias, *, threshold, scale, rng, site, padding_idx
):
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
        count = min(triton.cdiv(tokens, c.block_m), resident(c.num_warps, c.registers(weight is not None), dy.device))
        # In dy's dtype: it is written once and read by up to three sums, which add in float32.
        dh = dy.new_empty(tokens, cols)
        partial = dy.new_empty(2 if dbias is not None else 1, count, cols, dtype=torch.float32)
        dropout = dropout_argument(rng, site, threshold, scale)
        shape = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "num_warps": c.num_warps}
        shape["STAGES"] = stages(c.block_m * c.block_n * dy.element_size())
        shape["maxnreg"] = c.registers(weight is not None)
        lookups = _lookups(tables, ids)
        _bwd[(count,)](
            *(matrix(dy), *lookups, weight, mean, rstd, dh, partial, dropout, tokens, cols, period),
            HAS_B=dbias is not None,
            **shape,
        )
        if weight is not None:
            sum_partials(partial, dweight, dbias)
    long = []
    for k, (gradient, table_ids) in enumerate(zip(gradients, ids)):
        if gradient is None:
            continue
        # Without ids positions count the columns, and every token is of type 0.
        table = gradient, table_ids, period if k == 1 else 1, padding_idx if k == 0 else -1
        if gradient.shape[0] <= FEW and (table_ids is not None or table[2] == 1):
            _few_gradient(dh, *table)
        else:
            long.append(table)
    if long:
        _table_gradients(dh, long)


def _columns(cols: int) -> tuple[int, int]:
    """(columns of a program, programs for a row) of the sums."""
    block_n = min(1024, max(16, triton.next_power_of_2(cols)))
    return block_n, triton.cdiv(cols, block_n)


def _few_gradient(dh, out, ids, period, skip):
    """out[row] = Σ dh over the tokens of id `row`; `ids` None: all tokens are of id 0. Row `skip` is 0."""
    (tokens, cols), rows, (block_n, columns) = dh.shape, out.shape[0], _columns(dh.shape[1])
    block_m = max(1, TILE // block_n)
    count = min(triton.cdiv(tokens, block_m), max(1, resident(4, FEW_REGISTERS, dh.device) // columns))
    partial = dh.new_empty(1, count, rows * cols, dtype=torch.float32)
    shape = {"ROWS": rows, "BLOCK_M": block_m, "BLOCK_N": block_n, "maxnreg": FEW_REGISTERS}
    _few_rows[(count, columns)](matrix(dh), ids, partial, tokens, cols, **shape, num_warps=4)
    sum_partials(partial, out.view(-1))
    if 0 <= skip < rows:
        out[skip].zero_()


def _table_gradients(dh, tables):
    """For each (out, ids, period, skip): out[row] = Σ dh over the tokens of id `row`; `ids` None: token modulo period.
    Row `skip` is 0."""
    (tokens, cols), (block_n, columns) = dh.shape, _columns(dh.shape[1])
    gradients, keys = [NO_TABLE] * 3, 0
    for k, (out, ids, period, skip) in enumerate(tables):
        out.zero_()
        gradients[k] = TableGradient(out, out.shape[0], skip, keys, ids, period)
        keys += out.shape[0]
    pairs = len(tables) * tokens
    # int32: a radix sort makes half of the passes that the ids' int64 would take, and one for all tables.
    key = torch.empty(pairs, dtype=torch.int32, device=dh.device)
    _keys[(triton.cdiv(tokens, 1024),)](key, *gradients, tokens, keys, BLOCK=1024, num_warps=4)
    key, order = torch.sort(key, stable=True)
    chunks = triton.cdiv(pairs, CHUNK)
    scratch = dh.new_empty(chunks, 2, cols, dtype=torch.float32)
    _runs[(chunks, columns)](
        *(matrix(dh), key, order, *gradients, scratch, pairs, tokens, cols), CHUNK=CHUNK, BLOCK_N=block_n, num_warps=4
    )
    join_n = min(128, block_n)  # with JOIN rows of it, 32 elements a thread
    _join[(chunks, triton.cdiv(cols, join_n))](
        *(key, *gradients, scratch, pairs, cols), CHUNK=CHUNK, JOIN=JOIN, BLOCK_N=join_n, num_warps=4
    )
