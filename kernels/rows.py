"""What the kernels over rows share: a matrix as one argument, the load of its tile, dropout, and the norm."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .philox import keep_rows


class Matrix(NamedTuple):
    """x (rows, cols) with a unit last stride, and the stride of its rows."""

    ptr: tl.tensor
    stride: tl.tensor


class Dropout(NamedTuple):
    """One dropout call: rng_ptr (2,) int64, the call site, the threshold of `keep_rows`, the scale of what stays."""

    rng_ptr: tl.tensor
    site: tl.tensor
    threshold: tl.tensor
    scale: tl.tensor


def matrix(x: torch.Tensor | None) -> Matrix | None:
    return None if x is None else Matrix(x, x.stride(0))


def dropout_argument(rng: torch.Tensor, site: int, threshold: int, scale: float) -> Dropout | None:
    """None where nothing is dropped."""
    return Dropout(rng, site, threshold, scale) if threshold > 0 else None


@triton.jit
def load_tile(x: Matrix, row, col, mask):
    """(M, N) in float32; 0 outside the mask."""
    return tl.load(x.ptr + row[:, None] * x.stride + col[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def drop_rows(x, dropout: Dropout, k0, k1, row, quad):
    """x (M, 4Q) scaled, or 0 where it is dropped. k0, k1: of `dropout_key`; row (M,), quad (Q,): as of `keep_rows`."""
    return tl.where(keep_rows(row, quad, k0, k1, dropout.threshold), x * dropout.scale, 0.0)


# ---- the norm: x̂ = (h - mean) rstd - offset
#
# The mean is rounded, and the offset is what its rounding lost, the mean of (h - mean) rstd. Far from 0 it matters: at
# a mean of 100, half a unit in the last place is 4e-6. Saved as mean (2, rows), the means and then the offsets, and
# rstd (rows,).


@triton.jit
def variance_of(squares, rests, cols):
    """(variance, what the mean's rounding lost), from the sums of (h - mean)² and of h - mean."""
    lost = rests / cols
    return tl.maximum(squares / cols - lost * lost, 0.0), lost


@triton.jit
def normalize(h, mean_ptr, rstd_ptr, row, rows, cols, eps, in_row, mask):
    """x̂ (M, N) of rows h (M, N); saves the rows' statistics."""
    mean = tl.sum(h, axis=1) / cols
    centred = tl.where(mask, h - mean[:, None], 0.0)
    variance, lost = variance_of(tl.sum(centred * centred, axis=1), tl.sum(centred, axis=1), cols)
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    offset = lost * rstd
    tl.store(mean_ptr + row, mean, mask=in_row)
    tl.store(mean_ptr + rows + row, offset, mask=in_row)
    tl.store(rstd_ptr + row, rstd, mask=in_row)
    return centred * rstd[:, None] - offset[:, None]


@triton.jit
def normalize_again(h, mean_ptr, rstd_ptr, row, rows, in_row):
    """(x̂ (M, N), rstd (M, 1)) of rows h (M, N), from the saved statistics; mean_ptr None: rms_norm."""
    rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)[:, None]
    if mean_ptr is None:
        return h * rstd, rstd
    else:
        mean = tl.load(mean_ptr + row, mask=in_row, other=0.0)[:, None]
        offset = tl.load(mean_ptr + rows + row, mask=in_row, other=0.0)[:, None]
        return (h - mean) * rstd - offset, rstd
