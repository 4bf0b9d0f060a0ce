"""silu in Triton, with a gate after it. The maths, with its source: fastlm/ops/silu.py.

A program takes a tile of elements, as large as gelu's. A gate that is None is absent.
"""

import triton
import triton.language as tl

from .gelu import config
from .rows import Matrix, load_tile, matrix


@triton.jit
def _logistic(x):
    """(σ(x), d(x σ(x))/dx). With e = exp(-|x|), σ (1 - σ) = e/(1 + e)² does not cancel for a large x."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    sigma = tl.where(x >= 0.0, r, e * r)
    return sigma, sigma + x * (e * r * r)


@triton.jit
def _fwd(x: Matrix, gate: Matrix, y_ptr, rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    x_tile = load_tile(x, row, col, mask)
    sigma, _ = _logistic(x_tile)
    y = x_tile * sigma
    if gate is not None:
        y *= load_tile(gate, row, col, mask)
    tl.store(y_ptr + row[:, None] * cols + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bwd(
    dy: Matrix,
    x: Matrix,
    gate: Matrix,
    dx_ptr,
    dgate_ptr,
    rows,
    cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    out = row[:, None] * cols + col[None, :]
    dy_tile = load_tile(dy, row, col, mask)
    x_tile = load_tile(x, row, col, mask)
    sigma, slope = _logistic(x_tile)
    if gate is not None:
        gate_tile = load_tile(gate, row, col, mask)
        tl.store(dgate_ptr + out, (dy_tile * (x_tile * sigma)).to(dgate_ptr.dtype.element_ty), mask=mask)
        dy_tile *= gate_tile
    tl.store(dx_ptr + out, (dy_tile * slope).to(dx_ptr.dtype.element_ty), mask=mask)


# ---- launchers: x, gate, dy (rows, cols) with a unit last stride; y, dx, dgate contiguous


def silu_fwd(x, gate, y):
    """Fills y (rows, cols)."""
    rows, cols = x.shape
    if x.numel() == 0:
        return
    c = config(cols, "silu_fwd")
    _fwd[(triton.cdiv(rows, c.block_m), triton.cdiv(cols, c.block_n))](
        matrix(x), matrix(gate), y, rows, cols, c.block_m, c.block_n, num_warps=c.num_warps
    )


def silu_bwd(dy, x, gate, dx, dgate):
    """Fills dx, and dgate where there is a gate."""
    rows, cols = x.shape
    if x.numel() == 0:
        return
    c = config(cols, "silu_bwd")
    _bwd[(triton.cdiv(rows, c.block_m), triton.cdiv(cols, c.block_n))](
        matrix(dy), matrix(x), matrix(gate), dx, dgate, rows, cols, c.block_m, c.block_n, num_warps=c.num_warps
    )
