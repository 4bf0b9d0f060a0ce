"""silu on a CPU: csrc/cpu/silu.cpp."""

from __future__ import annotations

import torch

from fastlm import _native
from fastlm.ops._shapes import as_rows, row_stride
from fastlm.ops.silu import Args, BackwardArgs, Gradients, empty_backward, empty_forward


def silu_fwd(args: Args) -> torch.Tensor:
    y, x, gate = empty_forward(args), as_rows(args.x), as_rows(args.gate)
    _native.cpu().silu_fwd(
        x=x,
        bias=None,
        gate=gate,
        y=y,
        rows=x.shape[0],
        cols=x.shape[1],
        stride_x=x.stride(0),
        stride_gate=row_stride(gate),
        dtype=_native.DTYPE_CODES[x.dtype],
        threads=_native.threads(),
    )
    return y


def silu_bwd(args: BackwardArgs) -> Gradients:
    out = empty_backward(args)
    dy, x, gate = as_rows(args.dy), as_rows(args.forward.x), as_rows(args.forward.gate)
    _native.cpu().silu_bwd(
        dy=dy,
        x=x,
        bias=None,
        gate=gate,
        dx=out.dx,
        dgate=None if gate is None else out.dgate,
        dbias=None,
        partial=None,
        rows=x.shape[0],
        cols=x.shape[1],
        stride_dy=dy.stride(0),
        stride_x=x.stride(0),
        stride_gate=row_stride(gate),
        dtype=_native.DTYPE_CODES[x.dtype],
        threads=_native.threads(),
    )
    return out
