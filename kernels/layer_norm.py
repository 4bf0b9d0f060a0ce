"""layer_norm and rms_norm in Triton. The maths, with its source: fastlm/ops/layer_norm.py.

Forward: a program holds BLOCK_M whole rows in registers; every tensor is read and written once. Backward: as many
programs as are resident loop over the rows, copy the next tiles to shared memory meanwhile, and keep the weights'
gradients in registers, one partial sum a program. A second kernel adds these in order, so every run gives the same
bits. `_fwd_long` and `_bwd_long` take rows too long for registers in blocks; `_weights_long` computes their weights'
gradients.

An argument that is None is absent: mean_ptr for rms_norm, residual, w_ptr, b_ptr, h_ptr where h equals x, dropout.
"""

from dataclasses import dataclass, replace

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
    variance_of,
)
from .tuning import choose


@dataclass(frozen=True)
class Config:
    """Block shape and warps of one kernel. `long`: a row takes several blocks."""

    block_m: int
    block_n: int
    num_warps: int
    long: bool = False

    def registers(self) -> int:
        """Of a thread of backward: x̂, dy, the weight and two sums of 4 to 16 elements, and what is alike for all. At
        most so many, it spills nothing on sm_80 and sm_90, and `resident` knows how many programs fit."""
        elements = max(4, self.block_m * self.block_n // (32 * self.num_warps))
        return register_limit(self.num_warps, 32 + 6 * elements)


# Elements of a tile, where a row is shorter. Forward: 16 a thread of 4 warps, two 16-byte loads of bfloat16 in flight.
# Backward holds x̂, dy and two sums of gradients at once: 16 a thread of 8 warps. The fastest of 6 to 19 on an H100, or
# within 3% of it, for rows of 512, 768, 4096 and 8192 (LOG.md, 2026-11-26).
FWD_TILE, BWD_TILE = 2048, 4096
# Longest row in registers: 512 threads have 128 registers each, for 32 elements in forward, 16 beside backward's sums.
FWD_LONGEST, BWD_LONGEST = 16384, 8192
LONG_BLOCK = 4096
WEIGHTS_TILE = Config(8, 256, 4)  # of the weights' gradients of long rows


def config(cols: int, backward: bool) -> Config:
    name = "layer_norm_bwd" if backward else "layer_norm_fwd"
    return choose(name, (triton.next_power_of_2(cols),), lambda: _rule(cols, backward), lambda: _others(cols, backward))


def _others(cols: int, backward: bool) -> list[Config]:
    rule = _rule(cols, backward)
    if rule.long:
        return [Config(1, block, warps, long=True) for block in (2048, 4096, 8192) for warps in (4, 8, 16)]
    rows, warps = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16)
    # 4 to 64 elements a thread: fewer leave loads too short, more spill.
    return [Config(m, rule.block_n, w) for m in rows for w in warps if 4 <= m * rule.block_n // (32 * w) <= 64]


def _rule(cols: int, backward: bool) -> Config:
    """Short rows share a program; as they grow, a program has fewer rows and then more warps."""
    tile, longest = (BWD_TILE, BWD_LONGEST) if backward else (FWD_TILE, FWD_LONGEST)
    if cols > longest:
        return Config(1, LONG_BLOCK, 8, long=True)
    block_n = max(16, triton.next_power_of_2(cols))
    # In forward a thread holds up to 64 elements before more warps are faster.
    warps = max(8, block_n // 512) if backward else 4 if block_n <= 8192 else 16
    # More than 16 rows a tile are no faster, and a matrix of few rows would leave SMs idle.
    return Config(min(16, max(1, tile // block_n)), block_n, warps)


def programs(rows: int, c: Config, device: torch.device) -> int:
    """Programs of the backward pass, each with partial sums: those that are resident at once."""
    return min(triton.cdiv(rows, c.block_m), resident(c.num_warps, c.registers(), device))


# ---- rows in registers


@triton.jit
def _fwd(
    x: Matrix,
    residual: Matrix,
    w_ptr,
    b_ptr,
    h_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    dropout: Dropout,
    rows,
    cols,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    in_row, in_col = row < rows, col < cols
    mask = in_row[:, None] & in_col[None, :]
    h = load_tile(x, row, col, mask)
    if dropout is not None:
        k0, k1 = dropout_key(dropout.rng_ptr, dropout.site)
        h = drop_rows(h, dropout, k0, k1, row, tl.arange(0, BLOCK_N // 4))
    if residual is not None:
        h += load_tile(residual, row, col, mask)
    if h_ptr is not None:  # statistics of h as it is stored, since backward normalises that
        rounded = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row[:, None] * cols + col[None, :], rounded, mask=mask)
        h = rounded.to(tl.float32)
    if mean_ptr is None:
        rstd = 1.0 / tl.sqrt_rn(tl.sum(h * h, axis=1) / cols + eps)
        tl.store(rstd_ptr + row, rstd, mask=in_row)
        y = h * rstd[:, None]
    else:
        y = normalize(h, mean_ptr, rstd_ptr, row, rows, cols, eps, in_row, mask)
    if w_ptr is not None:
        y *= tl.load(w_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
    if b_ptr is not None:
        y += tl.load(b_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * cols + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd(
    dy: Matrix,
    dh: Matrix,
    h: Matrix,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    partial_ptr,
    dropout: Dropout,
    rows,
    cols,
    HAS_B: tl.constexpr,
    SUM_DX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """partial (HAS_B + SUM_DX + 1, programs, cols): of dw, db and Σ dx, each if it is there."""
    program, count = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK_N)
    in_col = col < cols
    if w_ptr is not None:
        w = tl.load(w_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
        dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_B:
        db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SUM_DX:
        sum_dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if dropout is not None:
        k0, k1 = dropout_key(dropout.rng_ptr, dropout.site)
    for tile in tl.range(program, tl.cdiv(rows, BLOCK_M), count, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_row = row < rows
        mask = in_row[:, None] & in_col[None, :]
        dy_tile = load_tile(dy, row, col, mask)
        h_tile = load_tile(h, row, col, mask)
        xhat, rstd = normalize_again(h_tile, mean_ptr, rstd_ptr, row, rows, in_row)
        xhat = tl.where(mask, xhat, 0.0)
        g = dy_tile
        if w_ptr is not None:
            g = dy_tile * w
            dw += dy_tile * xhat
        if HAS_B:
            db += dy_tile
        d = g - xhat * (tl.sum(g * xhat, axis=1) / cols)[:, None]
        if mean_ptr is not None:
            d -= (tl.sum(g, axis=1) / cols)[:, None]
        d *= rstd
        if dh is not None:
            d += load_tile(dh, row, col, mask)
        out = row[:, None] * cols + col[None, :]
        tl.store(dresidual_ptr + out, d.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dropout is not None:
            d = drop_rows(d, dropout, k0, k1, row, tl.arange(0, BLOCK_N // 4))
            tl.store(dx_ptr + out, d.to(dx_ptr.dtype.element_ty), mask=mask)
        if SUM_DX:
            sum_dx += d
    if w_ptr is not None:
        tl.store(partial_ptr + program * cols + col, tl.sum(dw, axis=0), mask=in_col)
        partial_ptr += count * cols
    if HAS_B:
        tl.store(partial_ptr + program * cols + col, tl.sum(db, axis=0), mask=in_col)
        partial_ptr += count * cols
    if SUM_DX:
        tl.store(partial_ptr + program * cols + col, tl.sum(sum_dx, axis=0), mask=in_col)


# ---- rows in blocks


@triton.jit
def _fwd_long(
    x: Matrix,
    residual: Matrix,
    w_ptr,
    b_ptr,
    h_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    dropout: Dropout,
    rows,
    cols,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_N)
    source_ptr = x.ptr + row * x.stride
    sums, squares = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    if dropout is not None:
        k0, k1 = dropout_key(dropout.rng_ptr, dropout.site)
    for start in range(0, cols, BLOCK_N):
        col = start + block
        mask = col < cols
        h = tl.load(source_ptr + col, mask=mask, other=0.0).to(tl.float32)
        if dropout is not None:
            quad = start // 4 + tl.arange(0, BLOCK_N // 4)
            h = tl.reshape(drop_rows(h[None, :], dropout, k0, k1, row + tl.arange(0, 1), quad), (BLOCK_N,))
        if residual is not None:
            h += tl.load(residual.ptr + row * residual.stride + col, mask=mask, other=0.0).to(tl.float32)
        if h_ptr is not None:
            rounded = h.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + row * cols + col, rounded, mask=mask)
            h = rounded.to(tl.float32)
        sums += h
        if mean_ptr is None:
            squares += h * h
    mean, rests = 0.0, tl.zeros((BLOCK_N,), tl.float32)
    if mean_ptr is not None:
        mean = tl.sum(sums, axis=0) / cols
    if h_ptr is not None:
        tl.debug_barrier()  # h is read back below
        source_ptr = h_ptr + row * cols
    if mean_ptr is not None:
        for start in range(0, cols, BLOCK_N):
            col = start + block
            h = tl.load(source_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
            centred = tl.where(col < cols, h - mean, 0.0)
            squares += centred * centred
            rests += centred
    variance, lost = variance_of(tl.sum(squares, axis=0), tl.sum(rests, axis=0), cols)
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    offset = lost * rstd
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
        tl.store(mean_ptr + rows + row, offset)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, cols, BLOCK_N):
        col = start + block
        mask = col < cols
        y = (tl.load(source_ptr + col, mask=mask, other=0.0).to(tl.float32) - mean) * rstd - offset
        if w_ptr is not None:
            y *= tl.load(w_ptr + col, mask=mask, other=0.0).to(tl.float32)
        if b_ptr is not None:
            y += tl.load(b_ptr + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * cols + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_long(
    dy: Matrix,
    dh: Matrix,
    h: Matrix,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dresidual_ptr,
    dx_ptr,
    dropout: Dropout,
    cols,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_N)
    rstd = tl.load(rstd_ptr + row)
    mean, offset = 0.0, 0.0
    if mean_ptr is not None:
        mean, offset = tl.load(mean_ptr + row), tl.load(mean_ptr + tl.num_programs(0) + row)
    sum_g, sum_gx = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, cols, BLOCK_N):
        col = start + block
        mask = col < cols
        g = tl.load(dy.ptr + row * dy.stride + col, mask=mask, other=0.0).to(tl.float32)
        if w_ptr is not None:
            g *= tl.load(w_ptr + col, mask=mask, other=0.0).to(tl.float32)
        h_row = tl.load(h.ptr + row * h.stride + col, mask=mask, other=0.0).to(tl.float32)
        sum_g += g
        sum_gx += g * ((h_row - mean) * rstd - offset)
    mean_gx = tl.sum(sum_gx, axis=0) / cols
    mean_g = 0.0
    if mean_ptr is not None:
        mean_g = tl.sum(sum_g, axis=0) / cols
    if dropout is not None:
        k0, k1 = dropout_key(dropout.rng_ptr, dropout.site)
    for start in range(0, cols, BLOCK_N):
        col = start + block
        mask = col < cols
        g = tl.load(dy.ptr + row * dy.stride + col, mask=mask, other=0.0).to(tl.float32)
        if w_ptr is not None:
            g *= tl.load(w_ptr + col, mask=mask, other=0.0).to(tl.float32)
        h_row = tl.load(h.ptr + row * h.stride + col, mask=mask, other=0.0).to(tl.float32)
        d = rstd * (g - mean_g - ((h_row - mean) * rstd - offset) * mean_gx)
        if dh is not None:
            d += tl.load(dh.ptr + row * dh.stride + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(dresidual_ptr + row * cols + col, d.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if dropout is not None:
            quad = start // 4 + tl.arange(0, BLOCK_N // 4)
            d = tl.reshape(drop_rows(d[None, :], dropout, k0, k1, row + tl.arange(0, 1), quad), (BLOCK_N,))
            tl.store(dx_ptr + row * cols + col, d.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weights_long(
    dy: Matrix,
    h: Matrix,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    rows,
    cols,
    HAS_W: tl.constexpr,
    HAS_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Partial sums of the weights' gradients: a program takes BLOCK_N columns, and its share of the tiles of rows."""
    program, count = tl.program_id(1), tl.num_programs(1)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_col = col < cols
    dw, db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, BLOCK_M), count, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_row = row < rows
        mask = in_row[:, None] & in_col[None, :]
        dy_tile = load_tile(dy, row, col, mask)
        if HAS_W:
            xhat, _ = normalize_again(load_tile(h, row, col, mask), mean_ptr, rstd_ptr, row, rows, in_row)
            dw += dy_tile * xhat
        if HAS_B:
            db += dy_tile
    if HAS_W:
        tl.store(partial_ptr + program * cols + col, tl.sum(dw, axis=0), mask=in_col)
    if HAS_B:
        tl.store(partial_ptr + (count + program) * cols + col, tl.sum(db, axis=0), mask=in_col)


# ---- launchers: x, residual, dy, dh, h (rows, cols) with a unit last stride; weight, bias (cols,) contiguous


def layer_norm_fwd(x, residual, weight, bias, h, y, mean, rstd, *, eps, threshold, scale, rng, site, rms):
    """Fills y and rstd, mean (None for rms) and h (None where it would equal x). threshold 0: no dropout."""
    rows, cols = x.shape
    if rows == 0:
        return
    c = config(cols, backward=False)
    kernel = _fwd_long if c.long else _fwd
    dropout = dropout_argument(rng, site, threshold, scale)
    inputs = matrix(x), matrix(residual), weight, bias
    shape = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "num_warps": c.num_warps}
    kernel[(triton.cdiv(rows, c.block_m),)](
        *inputs, h, y, None if rms else mean, rstd, dropout, rows, cols, eps, **shape
    )


def _looped(c: Config, h: torch.Tensor) -> dict[str, int]:
    """How a kernel of resident programs is compiled."""
    tile = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "STAGES": stages(c.block_m * c.block_n * h.element_size())}
    return {**tile, "num_warps": c.num_warps, "maxnreg": c.registers()}


def layer_norm_bwd(
    dy, dh, h, weight, mean, rstd, dresidual, dx, dweight, dbias, sum_dx, *, threshold, scale, rng, site, rms
):
    """Fills dresidual, dx (where threshold > 0), dweight (None: no weight), and dbias and sum_dx (None: not wanted)."""
    rows, cols = h.shape
    if rows == 0:
        for out in (dweight, dbias, sum_dx):
            if out is not None:
                out.zero_()
        return
    assert (weight is None) == (dweight is None)
    has_dbias = dbias is not None
    c = config(cols, backward=True)
    summed = sum_dx is not None and c.block_m > 1
    if summed:  # a third sum: half of the elements a thread, or it spills
        c = replace(c, block_m=c.block_m // 2)
    columns = triton.cdiv(cols, WEIGHTS_TILE.block_n)
    count = max(1, programs(rows, WEIGHTS_TILE, h.device) // columns) if c.long else programs(rows, c, h.device)
    sums = [out for out in (dweight, dbias, sum_dx if summed else None) if out is not None]
    partial = h.new_empty(len(sums), count, cols, dtype=torch.float32) if sums else None
    mean = None if rms else mean
    inputs = matrix(dy), matrix(dh), matrix(h), weight, mean, rstd
    dropout = dropout_argument(rng, site, threshold, scale)
    if c.long:
        _bwd_long[(rows,)](*inputs, dresidual, dx, dropout, cols, BLOCK_N=c.block_n, num_warps=c.num_warps)
        if sums:
            has = {"HAS_W": weight is not None, "HAS_B": has_dbias}
            launch = _looped(WEIGHTS_TILE, h)
            _weights_long[(columns, count)](inputs[0], inputs[2], mean, rstd, partial, rows, cols, **has, **launch)
    else:
        has = {"HAS_B": has_dbias, "SUM_DX": summed}
        _bwd[(count,)](*inputs, dresidual, dx, partial, dropout, rows, cols, **has, **_looped(c, h))
    if sums:
        sum_partials(partial, *sums)
    if sum_dx is not None and not summed:  # rows of more than 2048 leave no registers
        torch.sum(dresidual if dx is None else dx, 0, dtype=torch.float32, out=sum_dx)
