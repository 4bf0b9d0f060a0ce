"""dropout in Triton, with a ReLU before it. The maths, with its source: fastlm/ops/dropout.py.

A program takes a tile of elements, as large as gelu's: 16 a thread, four calls of Philox.
"""

import triton
import triton.language as tl

from .gelu import config
from .philox import dropout_key, keep_rows


@triton.jit
def _drop(
    x_ptr, y_ptr, rng_ptr, rows, cols, stride_xm, site, threshold: tl.int64, scale,
    RELU: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    y = tl.load(x_ptr + row[:, None] * stride_xm + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays NaN
    if DROPOUT:
        k0, k1 = dropout_key(rng_ptr, site)
        quad = tl.program_id(1) * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        y = tl.where(keep_rows(row, quad, k0, k1, threshold), y * scale, 0.0)
    tl.store(y_ptr + row[:, None] * cols + col[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _relu_gradient(
    dy_ptr, y_ptr, dx_ptr, rows, cols, stride_dym, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    at = row[:, None] * cols + col[None, :]
    dy = tl.load(dy_ptr + row[:, None] * stride_dym + col[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, tl.where(y <= 0.0, 0.0, dy * scale).to(dx_ptr.dtype.element_ty), mask=mask)


# ---- launchers: x, dy (rows, cols) with a unit last stride; y, dx contiguous


def dropout_fwd(x, y, *, relu, rng, site, threshold, scale):
    """Fills y (rows, cols). threshold 0: no dropout."""
    rows, cols = x.shape
    if x.numel() == 0:
        return
    c = config(cols, "dropout")
    _drop[(triton.cdiv(rows, c.block_m), triton.cdiv(cols, c.block_n))](
        x, y, rng, rows, cols, x.stride(0), site, threshold, scale,
        RELU=relu, DROPOUT=threshold > 0, BLOCK_M=c.block_m, BLOCK_N=c.block_n, num_warps=c.num_warps,
    )  # fmt: skip


def dropout_bwd(dy, y, dx, *, rng, site, threshold, scale):
    """Fills dx (rows, cols). y: what forward gave, where it had a ReLU; None where it had not."""
    if y is None:
        return dropout_fwd(dy, dx, relu=False, rng=rng, site=site, threshold=threshold, scale=scale)
    rows, cols = dy.shape
    if dy.numel() == 0:
        return None
    c = config(cols, "dropout")
    _relu_gradient[(triton.cdiv(rows, c.block_m), triton.cdiv(cols, c.block_n))](
        dy, y, dx, rows, cols, dy.stride(0), scale, BLOCK_M=c.block_m, BLOCK_N=c.block_n, num_warps=c.num_warps
    )
    return None
