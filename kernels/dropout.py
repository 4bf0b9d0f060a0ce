"""dropout in Triton, with a ReLU before it. The maths, with its source: fastlm/ops/dropout.py.

A program takes a tile as large as gelu's: 16 elements a thread, four calls of Philox.
"""

import triton
import triton.language as tl

from .gelu import config
from .philox import dropout_key
from .rows import Dropout, Matrix, drop_rows, dropout_argument, load_tile, matrix


@triton.jit
def _drop(
    x: Matrix,
    y_ptr,
    dropout: Dropout,
    rows,
    cols,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    y = load_tile(x, row, col, mask)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays NaN
    if dropout is not None:
        k0, k1 = dropout_key(dropout.rng_ptr, dropout.site)
        quad = tl.program_id(1) * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        y = drop_rows(y, dropout, k0, k1, row, quad)
    tl.store(y_ptr + row[:, None] * cols + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _relu_gradient(dy: Matrix, y_ptr, dx_ptr, rows, cols, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    at = row[:, None] * cols + col[None, :]
    dy_tile = load_tile(dy, row, col, mask)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        dx_ptr + at,
        tl.where(y <= 0.0, 0.0, dy_tile * scale).to(dx_ptr.dtype.element_ty),
        mask=mask,
    )


# ---- launchers: x, dy (rows, cols) with a unit last stride; y, dx contiguous


def dropout_fwd(x, y, *, relu, rng, site, threshold, scale):
    """Fills y (rows, cols). threshold 0: no dropout."""
    rows, cols = x.shape
    if x.numel() == 0:
        return
    c = config(cols, "dropout")
    dropout = dropout_argument(rng, site, threshold, scale)
    _drop[(triton.cdiv(rows, c.block_m), triton.cdiv(cols, c.block_n))](
        matrix(x), y, dropout, rows, cols, relu, c.block_m, c.block_n, num_warps=c.num_warps
    )


def dropout_bwd(dy, y, dx, *, rng, site, threshold, scale):
    """Fills dx (rows, cols). y: the output of a forward with a ReLU, else None."""
    if y is None:
        return dropout_fwd(dy, dx, relu=False, rng=rng, site=site, threshold=threshold, scale=scale)
    rows, cols = dy.shape
    if dy.numel() == 0:
        return None
    c = config(cols, "dropout")
    _relu_gradient[(triton.cdiv(rows, c.block_m), triton.cdiv(cols, c.block_n))](
        matrix(dy), y, dx, rows, cols, scale, c.block_m, c.block_n, num_warps=c.num_warps
    )
    return None
