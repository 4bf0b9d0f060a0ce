"""gelu in Triton, with a bias before it and a gate after it. The maths, with its source: fastlm/ops/gelu.py.

A program takes a tile of elements. Where backward sums the bias's gradient, a program loops down its columns and leaves
one partial sum. A bias, gate or partial sum that is None is absent.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .device import register_limit, resident, stages
from .exponential import divide, exp
from .partials import sum_partials
from .rows import Matrix, load_tile, matrix
from .tuning import choose


@dataclass(frozen=True)
class Config:
    """Tile and warps. A thread has 16 elements: two 16-byte loads of bfloat16 in flight for each tensor. In gelu's
    backward, which has more tensors and the sum of the columns, it has 8."""

    block_m: int
    block_n: int
    num_warps: int = 4


# Of a thread with 8 elements of gelu's backward, which sums the columns: it spills nothing on sm_80 and sm_90.
REGISTERS = 64


def config(cols: int, kernel: str) -> Config:
    """2048 elements; 256 columns of a row, one warp's 16-byte loads, where a row has so many."""
    n = min(256, max(16, triton.next_power_of_2(cols)))
    return choose(kernel, (n,), lambda: Config(2048 // n, n, 8 if kernel == "gelu_bwd" else 4), lambda: _others(n))


def _others(n: int) -> list[Config]:
    return [Config(tile // n, n, warps) for tile in (1024, 2048, 4096) for warps in (2, 4, 8)]


@triton.jit
def _normal(h, TANH: tl.constexpr, FLOAT32: tl.constexpr):
    """(Φ(h), d(h Φ(h))/dh) for the exact Φ, or for the one that tanh approximates."""
    if TANH:
        # Φ ≈ (1 + tanh(u))/2 = 1/(1 + exp(-2u)), and Φ (1 - Φ), without cancellation for either sign of u.
        z = 1.5957691216057308 * (h + 0.044715 * h * h * h)
        e = exp(-tl.abs(z), FLOAT32)
        r = divide(tl.full(e.shape, 1.0, tl.float32), 1.0 + e, FLOAT32)
        phi = tl.where(z >= 0.0, r, e * r)
        slope = phi + h * (e * r * r) * (1.5957691216057308 * (1.0 + 0.134145 * h * h))
    else:
        phi = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
        slope = phi + h * (0.3989422804014327 * exp(-0.5 * h * h, FLOAT32))
    return phi, slope


@triton.jit
def _fwd(
    x: Matrix,
    bias_ptr,
    gate: Matrix,
    y_ptr,
    rows,
    cols,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    h = load_tile(x, row, col, mask)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    phi, _ = _normal(h, TANH, x.ptr.dtype.element_ty == tl.float32)
    y = h * phi
    if gate is not None:
        y *= load_tile(gate, row, col, mask)
    tl.store(y_ptr + row[:, None] * cols + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd(
    dy: Matrix,
    x: Matrix,
    bias_ptr,
    gate: Matrix,
    dx_ptr,
    dgate_ptr,
    partial_ptr,
    rows,
    cols,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, count = tl.program_id(0), tl.num_programs(0)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_col = col < cols
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + col, mask=in_col, other=0.0).to(tl.float32)[None, :]
    if partial_ptr is not None:
        dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, BLOCK_M), count, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & in_col[None, :]
        dy_tile = load_tile(dy, row, col, mask)
        h = load_tile(x, row, col, mask)
        if bias_ptr is not None:
            h += bias
        phi, slope = _normal(h, TANH, x.ptr.dtype.element_ty == tl.float32)
        out = row[:, None] * cols + col[None, :]
        if gate is not None:
            gate_tile = load_tile(gate, row, col, mask)
            tl.store(dgate_ptr + out, (dy_tile * (h * phi)).to(dgate_ptr.dtype.element_ty), mask=mask)
            dy_tile *= gate_tile
        dx = dy_tile * slope
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            dbias += dx
    if partial_ptr is not None:
        tl.store(partial_ptr + program * cols + col, tl.sum(dbias, axis=0), mask=in_col)


# ---- launchers: x, gate, dy (rows, cols) with a unit last stride; bias (cols,) contiguous


def gelu_fwd(x, bias, gate, y, *, tanh):
    """Fills y (rows, cols)."""
    rows, cols = x.shape
    if x.numel() == 0:
        return
    c = config(cols, "gelu_fwd")
    _fwd[(triton.cdiv(rows, c.block_m), triton.cdiv(cols, c.block_n))](
        matrix(x), bias, matrix(gate), y, rows, cols, tanh, c.block_m, c.block_n, num_warps=c.num_warps
    )


def gelu_bwd(dy, x, bias, gate, dx, dbias, dgate, *, tanh):
    """Fills dx, dgate where there is a gate, and dbias (cols,) float32 unless it is None."""
    rows, cols = x.shape
    if x.numel() == 0:
        if dbias is not None:
            dbias.zero_()
        return
    c = config(cols, "gelu_bwd")
    tiles, blocks = triton.cdiv(rows, c.block_m), triton.cdiv(cols, c.block_n)
    # With a sum over the rows: as many programs as are resident, each with a part of the rows. Else one a tile.
    count, looped = tiles, {"STAGES": 1}
    if dbias is not None:
        registers = register_limit(c.num_warps, REGISTERS * max(1, c.block_m * c.block_n // (256 * c.num_warps)))
        count = min(tiles, max(1, resident(c.num_warps, registers, x.device) // blocks))
        looped = {"STAGES": stages(c.block_m * c.block_n * x.element_size()), "maxnreg": registers}
    partial = None if dbias is None else x.new_empty(1, count, cols, dtype=torch.float32)
    inputs = matrix(dy), matrix(x), bias, matrix(gate)
    tile = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "num_warps": c.num_warps}
    _bwd[(count, blocks)](*inputs, dx, dgate, partial, rows, cols, tanh, **tile, **looped)
    if dbias is not None:
        sum_partials(partial, dbias)
