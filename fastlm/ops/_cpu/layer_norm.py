"""layer_norm on a CPU: csrc/cpu/layer_norm.cpp."""

from __future__ import annotations

import torch

from fastlm import _native
from fastlm.ops import _random
from fastlm.ops._shapes import as_float, as_rows, row_stride
from fastlm.ops.layer_norm import Args, BackwardArgs, Gradients, Outputs, empty_backward, empty_forward


def layer_norm_fwd(args: Args) -> Outputs:
    out, x = empty_forward(args), as_rows(args.x)
    residual = as_rows(args.residual)
    _native.cpu().layer_norm_fwd(
        x=x,
        residual=residual,
        weight=as_float(args.weight),
        bias=as_float(args.bias),
        h=out.h if args.keeps_h else None,
        y=out.y,
        mean=None if args.rms else out.mean,
        rstd=out.rstd,
        rows=out.rstd.numel(),
        cols=x.shape[-1],
        stride_x=x.stride(0),
        stride_residual=row_stride(residual),
        eps=args.eps,
        rms=args.rms,
        dropout=_random.row_dropout(args.dropout_p, args.rng, args.site),
        dtype=_native.DTYPE_CODES[x.dtype],
        threads=_native.threads(),
    )
    return out


def layer_norm_bwd(args: BackwardArgs) -> Gradients:
    saved, out = args.saved, empty_backward(args)
    rows, cols = saved.rstd.numel(), saved.h.shape[-1]
    dy, dh, h, weight = as_rows(args.dy), as_rows(args.dh), as_rows(saved.h), as_float(saved.weight)
    dweight = None if weight is None else h.new_empty(cols, dtype=torch.float32)
    _native.cpu().layer_norm_bwd(
        dy=dy,
        dh=dh,
        h=h,
        weight=weight,
        mean=None if saved.rms else saved.mean,
        rstd=saved.rstd,
        dresidual=out.dresidual,
        dx=out.dx if saved.dropout_p > 0.0 else None,
        dweight=dweight,
        dbias=out.dbias if args.has_bias else None,
        sum_dx=out.sum_dx if args.sum_dx else None,
        partial=h.new_empty((2 + args.sum_dx) * _native.cpu().row_blocks(rows) * cols, dtype=torch.float32),
        rows=rows,
        cols=cols,
        stride_dy=dy.stride(0),
        stride_dh=row_stride(dh),
        stride_h=h.stride(0),
        rms=saved.rms,
        dropout=_random.row_dropout(saved.dropout_p, saved.rng, saved.site),
        dtype=_native.DTYPE_CODES[h.dtype],
        threads=_native.threads(),
    )
    return out if weight is None else out._replace(dweight=dweight.to(saved.weight.dtype))
