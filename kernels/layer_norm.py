"""layer_norm and rms_norm in Triton. The maths, with its source: fastlm/ops/layer_norm.py.

Forward: a program takes BLOCK_M whole rows in registers; every tensor is read and written once. Backward: a fixed
number of programs walk over the rows and keep the weights' gradients in registers, one partial sum a program, added in
order by a second kernel: the same bits in every run. Rows too long for registers go through `_fwd_long` and `_bwd_long`
in blocks, their weight gradients through `_weights_long`.
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
    """Block shape and warps of one kernel. `long`: a row takes several blocks."""

    block_m: int
    block_n: int
    num_warps: int
    long: bool = False


# Elements of a tile, while a row is shorter. Forward 16 a thread of 4 warps, two 16-byte loads of bfloat16 in flight;
# backward holds x̂, dy and two sums of gradients at once, 16 a thread of 8 warps. Of 6 to 19 on an H100 (LOG.md,
# 2026-11-26), rows of 512, 768, 4096 and 8192, the fastest or within 3% of it.
FWD_TILE, BWD_TILE = 2048, 4096
# Longest row in registers: 512 threads have 128 registers each, for 32 elements forward, 16 with backward's sums.
FWD_LONGEST, BWD_LONGEST = 16384, 8192
LONG_BLOCK = 4096


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
    """Rows that share a program while they are short; as they grow no more rows, then more warps."""
    tile, longest = (BWD_TILE, BWD_LONGEST) if backward else (FWD_TILE, FWD_LONGEST)
    if cols > longest:
        return Config(1, LONG_BLOCK, 8, long=True)
    block_n = max(16, triton.next_power_of_2(cols))
    # A thread holds up to 64 elements forward before more warps pay.
    warps = max(8, block_n // 512) if backward else 4 if block_n <= 8192 else 16
    # Past 16 rows of a tile nothing is gained, and few rows would leave SMs idle.
    return Config(min(16, max(1, tile // block_n)), block_n, warps)


def programs(rows: int, block_m: int, device: torch.device) -> int:
    """Programs of the backward pass, each with its partial sums: two a multiprocessor."""
    return min(triton.cdiv(rows, block_m), 2 * multiprocessors(device))


# ---- rows in registers


@triton.jit
def _fwd(
    x_ptr, residual_ptr, w_ptr, b_ptr, h_ptr, y_ptr, mean_ptr, rstd_ptr, rng_ptr,
    rows, cols, stride_xm, stride_rm, eps, site, threshold: tl.int64, scale,
    RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, KEEPS_H: tl.constexpr,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    in_row, in_col = row < rows, col < cols
    mask = in_row[:, None] & in_col[None, :]
    h = tl.load(x_ptr + row[:, None] * stride_xm + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
        h = tl.where(keep_rows(row, tl.arange(0, BLOCK_N // 4), k0, k1, threshold), h * scale, 0.0)
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + row[:, None] * stride_rm + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if KEEPS_H:  # statistics of h as it is stored, since backward normalises that
        rounded = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row[:, None] * cols + col[None, :], rounded, mask=mask)
        h = rounded.to(tl.float32)
    if RMS:
        centred = h
    else:
        mean = tl.sum(h, axis=1) / cols
        tl.store(mean_ptr + row, mean, mask=in_row)
        centred = tl.where(mask, h - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / cols + eps)
    tl.store(rstd_ptr + row, rstd, mask=in_row)
    y = centred * rstd[:, None]
    if HAS_W:
        y *= tl.load(w_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
    if HAS_B:
        y += tl.load(b_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * cols + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd(
    dy_ptr, dh_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, dresidual_ptr, dx_ptr, partial_ptr, rng_ptr,
    rows, cols, stride_dym, stride_dhm, stride_hm, site, threshold: tl.int64, scale,
    RMS: tl.constexpr, HAS_DH: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program, count = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK_N)
    in_col = col < cols
    if HAS_W:
        w = tl.load(w_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
        dw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_B:
        db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    for tile in range(program, tl.cdiv(rows, BLOCK_M), count):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_row = row < rows
        mask = in_row[:, None] & in_col[None, :]
        dy = tl.load(dy_ptr + row[:, None] * stride_dym + col[None, :], mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row[:, None] * stride_hm + col[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)[:, None]
        if RMS:
            xhat = h * rstd
        else:
            mean = tl.load(mean_ptr + row, mask=in_row, other=0.0)[:, None]
            xhat = tl.where(mask, (h - mean) * rstd, 0.0)
        g = dy
        if HAS_W:
            g = dy * w
            dw += dy * xhat
        if HAS_B:
            db += dy
        d = g - xhat * (tl.sum(g * xhat, axis=1) / cols)[:, None]
        if not RMS:
            d -= (tl.sum(g, axis=1) / cols)[:, None]
        d *= rstd
        if HAS_DH:
            d += tl.load(dh_ptr + row[:, None] * stride_dhm + col[None, :], mask=mask, other=0.0).to(tl.float32)
        out = row[:, None] * cols + col[None, :]
        tl.store(dresidual_ptr + out, d.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if DROPOUT:
            d = tl.where(keep_rows(row, tl.arange(0, BLOCK_N // 4), k0, k1, threshold), d * scale, 0.0)
            tl.store(dx_ptr + out, d.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_W:
        tl.store(partial_ptr + program * cols + col, tl.sum(dw, axis=0), mask=in_col)
    if HAS_B:
        tl.store(partial_ptr + (count + program) * cols + col, tl.sum(db, axis=0), mask=in_col)


# ---- rows in blocks


@triton.jit
def _fwd_long(
    x_ptr, residual_ptr, w_ptr, b_ptr, h_ptr, y_ptr, mean_ptr, rstd_ptr, rng_ptr,
    rows, cols, stride_xm, stride_rm, eps, site, threshold: tl.int64, scale,
    RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, KEEPS_H: tl.constexpr,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_N)
    source_ptr = x_ptr + row * stride_xm
    sums, squares = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    for start in range(0, cols, BLOCK_N):
        col = start + block
        mask = col < cols
        h = tl.load(source_ptr + col, mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            quad = start // 4 + tl.arange(0, BLOCK_N // 4)
            keep = keep_rows(row + tl.arange(0, 1), quad, k0, k1, threshold)
            h = tl.where(tl.reshape(keep, (BLOCK_N,)), h * scale, 0.0)
        if HAS_RESIDUAL:
            h += tl.load(residual_ptr + row * stride_rm + col, mask=mask, other=0.0).to(tl.float32)
        if KEEPS_H:
            rounded = h.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + row * cols + col, rounded, mask=mask)
            h = rounded.to(tl.float32)
        sums += h
        if RMS:
            squares += h * h
    mean = 0.0
    if not RMS:
        mean = tl.sum(sums, axis=0) / cols
        tl.store(mean_ptr + row, mean)
    if KEEPS_H:
        tl.debug_barrier()  # h is read back below
        source_ptr = h_ptr + row * cols
    if not RMS:
        for start in range(0, cols, BLOCK_N):
            col = start + block
            h = tl.load(source_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
            centred = tl.where(col < cols, h - mean, 0.0)
            squares += centred * centred
    rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / cols + eps)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, cols, BLOCK_N):
        col = start + block
        mask = col < cols
        y = (tl.load(source_ptr + col, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        if HAS_W:
            y *= tl.load(w_ptr + col, mask=mask, other=0.0).to(tl.float32)
        if HAS_B:
            y += tl.load(b_ptr + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * cols + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd_long(
    dy_ptr, dh_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, dresidual_ptr, dx_ptr, rng_ptr,
    cols, stride_dym, stride_dhm, stride_hm, site, threshold: tl.int64, scale,
    RMS: tl.constexpr, HAS_DH: tl.constexpr, HAS_W: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_N)
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if not RMS:
        mean = tl.load(mean_ptr + row)
    sum_g, sum_gx = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, cols, BLOCK_N):
        col = start + block
        mask = col < cols
        g = tl.load(dy_ptr + row * stride_dym + col, mask=mask, other=0.0).to(tl.float32)
        if HAS_W:
            g *= tl.load(w_ptr + col, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row * stride_hm + col, mask=mask, other=0.0).to(tl.float32)
        sum_g += g
        sum_gx += g * ((h - mean) * rstd)
    mean_gx = tl.sum(sum_gx, axis=0) / cols
    mean_g = 0.0
    if not RMS:
        mean_g = tl.sum(sum_g, axis=0) / cols
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
    for start in range(0, cols, BLOCK_N):
        col = start + block
        mask = col < cols
        g = tl.load(dy_ptr + row * stride_dym + col, mask=mask, other=0.0).to(tl.float32)
        if HAS_W:
            g *= tl.load(w_ptr + col, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row * stride_hm + col, mask=mask, other=0.0).to(tl.float32)
        d = rstd * (g - mean_g - (h - mean) * rstd * mean_gx)
        if HAS_DH:
            d += tl.load(dh_ptr + row * stride_dhm + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(dresidual_ptr + row * cols + col, d.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if DROPOUT:
            quad = start // 4 + tl.arange(0, BLOCK_N // 4)
            keep = keep_rows(row + tl.arange(0, 1), quad, k0, k1, threshold)
            d = tl.where(tl.reshape(keep, (BLOCK_N,)), d * scale, 0.0)
            tl.store(dx_ptr + row * cols + col, d.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weights_long(
    dy_ptr, h_ptr, mean_ptr, rstd_ptr, partial_ptr, rows, cols, stride_dym, stride_hm,
    RMS: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial sums of the weights' gradients: a program takes BLOCK_N columns, and its share of the tiles of rows."""
    program, count = tl.program_id(1), tl.num_programs(1)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_col = col < cols
    dw, db = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(program, tl.cdiv(rows, BLOCK_M), count):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_row = row < rows
        mask = in_row[:, None] & in_col[None, :]
        dy = tl.load(dy_ptr + row[:, None] * stride_dym + col[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_W:
            h = tl.load(h_ptr + row[:, None] * stride_hm + col[None, :], mask=mask, other=0.0).to(tl.float32)
            if not RMS:
                h -= tl.load(mean_ptr + row, mask=in_row, other=0.0)[:, None]
            dw += dy * (h * tl.load(rstd_ptr + row, mask=in_row, other=0.0)[:, None])
        if HAS_B:
            db += dy
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
    kernel[(triton.cdiv(rows, c.block_m),)](
        x, residual, weight, bias, h, y, mean, rstd, rng,
        rows, cols, x.stride(0), 0 if residual is None else residual.stride(0), eps, site, threshold, scale,
        RMS=rms, HAS_RESIDUAL=residual is not None, HAS_W=weight is not None, HAS_B=bias is not None,
        KEEPS_H=h is not None, DROPOUT=threshold > 0, BLOCK_M=c.block_m, BLOCK_N=c.block_n, num_warps=c.num_warps,
    )  # fmt: skip


def layer_norm_bwd(
    dy, dh, h, weight, mean, rstd, dresidual, dx, dweight, dbias, *, threshold, scale, rng, site, rms
):  # fmt: skip
    """Fills dresidual, dx (where threshold > 0), dweight and dbias (None: not wanted)."""
    rows, cols = h.shape
    if rows == 0:
        for out in (dweight, dbias):
            if out is not None:
                out.zero_()
        return
    has_weight, has_dbias = dweight is not None, dbias is not None
    c = config(cols, backward=True)
    count = programs(rows, c.block_m, h.device)
    partial = h.new_empty(2 if has_dbias else 1, count, cols, dtype=torch.float32) if has_weight or has_dbias else None
    stride_dh = 0 if dh is None else dh.stride(0)
    common = {"RMS": rms, "HAS_W": has_weight}
    if c.long:
        _bwd_long[(rows,)](
            dy, dh, h, weight, mean, rstd, dresidual, dx, rng,
            cols, dy.stride(0), stride_dh, h.stride(0), site, threshold, scale,
            HAS_DH=dh is not None, DROPOUT=threshold > 0, BLOCK_N=c.block_n, num_warps=c.num_warps, **common,
        )  # fmt: skip
        if partial is not None:
            _weights_long[(triton.cdiv(cols, 256), count)](
                dy, h, mean, rstd, partial, rows, cols, dy.stride(0), h.stride(0),
                HAS_B=has_dbias, BLOCK_M=8, BLOCK_N=256, num_warps=4, **common,
            )  # fmt: skip
    else:
        _bwd[(count,)](
            dy, dh, h, weight, mean, rstd, dresidual, dx, partial, rng,
            rows, cols, dy.stride(0), stride_dh, h.stride(0), site, threshold, scale,
            HAS_DH=dh is not None, HAS_B=has_dbias, DROPOUT=threshold > 0,
            BLOCK_M=c.block_m, BLOCK_N=c.block_n, num_warps=c.num_warps, **common,
        )  # fmt: skip
    if partial is not None:
        sum_partials(partial, dweight, dbias)
