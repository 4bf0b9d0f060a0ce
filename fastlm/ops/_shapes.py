"""Views that the kernels' strides need."""

from __future__ import annotations

import torch


def as_rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """x (..., cols) as (rows, cols) with a unit last stride: a view where the strides allow, else a copy."""
    if x is None:
        return None
    if x.dim() == 2:
        return unit_stride(x)
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    return unit_stride(x)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x with a unit last stride: itself where it has one, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def sequence_strides(x: torch.Tensor) -> tuple[int, int, int]:
    """The strides of sequence, row and head of (B, S, H, D), or of packed (T, H, D), which counts as one sequence."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def as_float(x: torch.Tensor | None) -> torch.Tensor | None:
    """x in float32, contiguous."""
    return None if x is None else x.float().contiguous()


def row_stride(x: torch.Tensor | None) -> int:
    """The stride of the rows (rows, cols), 0 where there are none."""
    return 0 if x is None else x.stride(0)


def number_per_token(value: torch.Tensor | None, shape: tuple[int, int]) -> tuple | None:
    """(tensor, row stride, column stride) of a number per token, as the C++ kernels take it; None stays."""
    if value is None:
        return None
    value = value.expand(shape)
    return value, *value.stride()


def column_limit(x: torch.Tensor) -> str | None:
    """Why a Triton kernel whose grid's second axis is columns, 65535 programs of 256, cannot take x; None if it can.

    A tensor of one dimension is a single row.
    """
    most = 65535 * 256
    return None if x.shape[-1] <= most else f"its rows have at most {most} columns, x has {x.shape[-1]}"
