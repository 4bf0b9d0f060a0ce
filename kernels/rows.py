"""What the kernels over rows share: a matrix as one argument, the load of its tile, and dropout as one argument."""

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
