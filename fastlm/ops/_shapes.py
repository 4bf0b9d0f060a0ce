"""Views and copies of tensors with the strides that the kernels need, and packed tensors as padded ones."""

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
    """x if its last stride is 1, else a copy for which it is."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def sequence_strides(x: torch.Tensor) -> tuple[int, int, int]:
    """The strides of sequence, row and head of (B, S, H, D); packed (T, H, D) counts as one sequence."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def as_float(x: torch.Tensor | None) -> torch.Tensor | None:
    """x in float32, contiguous."""
    return None if x is None else x.float().contiguous()


def row_stride(x: torch.Tensor | None) -> int:
    """The stride between the rows of x (rows, cols); 0 for None."""
    return 0 if x is None else x.stride(0)


def number_per_token(value: torch.Tensor | None, shape: tuple[int, int]) -> tuple | None:
    """A number per token as the C++ kernels take it: (tensor, row stride, column stride). None stays None."""
    if value is None:
        return None
    value = value.expand(shape)
    return value, *value.stride()


def column_limit(x: torch.Tensor) -> str | None:
    """Why a Triton kernel over columns cannot take x; None if it can. Its grid has at most 65535 programs of 256.

    A tensor of one dimension is a single row.
    """
    most = 65535 * 256
    return None if x.shape[-1] <= most else f"its rows have at most {most} columns, x has {x.shape[-1]}"


def padded_rows(cu_seqlens, max_seqlen):
    """(rows, real), each (sequences, max_seqlen): each position's row of the packed tensor, and whether it has one.

    Positions past the end of a sequence have row 0.
    """
    position = torch.arange(max_seqlen, device=cu_seqlens.device)
    real = position < cu_seqlens.diff()[:, None]
    return torch.where(real, cu_seqlens[:-1, None] + position, 0), real


def gather_padded(x, rows, real):
    """Packed (T, H, D) as padded (sequences, max_seqlen, H, D); padding is zero."""
    if x.shape[0] == 0:
        return x.new_zeros(*rows.shape, *x.shape[1:])
    return torch.where(real[..., None, None], x[rows.clamp(0, x.shape[0] - 1)], 0)
