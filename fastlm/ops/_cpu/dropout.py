"""dropout on a CPU: csrc/cpu/dropout.cpp."""

from __future__ import annotations

import torch

from fastlm import _native
from fastlm.ops import _random
from fastlm.ops._shapes import as_rows, contiguous
from fastlm.ops.dropout import Args, BackwardArgs, empty_backward, empty_forward


def dropout_fwd(args: Args) -> torch.Tensor:
    y, x = empty_forward(args), as_rows(args.x)
    _native.cpu().dropout_fwd(
        x=x,
        y=y,
        rows=x.shape[0],
        cols=x.shape[1],
        stride_x=x.stride(0),
        relu=args.relu,
        dropout=_random.row_dropout(args.p, args.rng, args.site),
        dtype=_native.DTYPE_CODES[x.dtype],
        threads=_native.threads(),
    )
    return y


def dropout_bwd(args: BackwardArgs) -> torch.Tensor:
    saved, dx, dy = args.saved, empty_backward(args), as_rows(args.dy)
    _native.cpu().dropout_bwd(
        dy=dy,
        y=contiguous(saved.y),
        dx=dx,
        rows=dy.shape[0],
        cols=dy.shape[1],
        stride_dy=dy.stride(0),
        relu=saved.y is not None,
        dropout=_random.row_dropout(saved.p, saved.rng, saved.site),
        dtype=_native.DTYPE_CODES[dy.dtype],
        threads=_native.threads(),
    )
    return dx
