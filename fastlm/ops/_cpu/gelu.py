"""gelu on a CPU: csrc/cpu/gelu.cpp."""

from __future__ import annotations

import torch

from fastlm import _native
from fastlm.ops._shapes import as_float, as_rows, row_stride
from fastlm.ops.gelu import Args, BackwardArgs, Gradients, empty_backward, empty_forward


def gelu_fwd(args: Args) -> torch.Tensor:
    y, x, gate = empty_forward(args), as_rows(args.x), as_rows(args.gate)
    _native.cpu().gelu_fwd(
        x=x,
        bias=as_float(args.bias),
        gate=gate,
        y=y,
        rows=x.shape[0],
        cols=x.shape[1],
        stride_x=x.stride(0),
        stride_gate=row_stride(gate),
        tanh=args.tanh,
        dtype=_native.DTYPE_CODES[x.dtype],
        threads=_native.threads(),
    )
    return y


def gelu_bwd(args: BackwardArgs) -> Gradients:
    forward, out = args.forward, empty_backward(args)
    dy, x, gate = as_rows(args.dy), as_rows(forward.x), as_rows(forward.gate)
    rows, cols = x.shape
    blocks = _native.cpu().row_blocks(rows) if args.has_dbias else 0
    _native.cpu().gelu_bwd(
        dy=dy,
        x=x,
        bias=as_float(forward.bias),
        gate=gate,
        dx=out.dx,
        dgate=None if gate is None else out.dgate,
        dbias=out.dbias if args.has_dbias else None,
        partial=x.new_empty(blocks * cols, dtype=torch.float32),
        rows=rows,
        cols=cols,
        stride_dy=dy.stride(0),
        stride_x=x.stride(0),
        stride_gate=row_stride(gate),
        tanh=forward.tanh,
        dtype=_native.DTYPE_CODES[x.dtype],
        threads=_native.threads(),
    )
    return out
