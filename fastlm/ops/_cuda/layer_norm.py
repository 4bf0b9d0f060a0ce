"""layer_norm on CUDA: csrc/cuda/layer_norm.cu."""

from __future__ import annotations

import torch

from fastlm import _native
from fastlm.ops import _random
from fastlm.ops._shapes import as_rows, row_stride
from fastlm.ops.layer_norm import Args, BackwardArgs, Gradients, Outputs, add_rows, empty_backward, empty_forward


def _parameter(weight, x):
    """(weight in float32 or x's dtype, as the kernel takes it; whether it is float32)."""
    if weight is None:
        return None, False
    if weight.dtype not in (x.dtype, torch.float32):
        weight = weight.float()
    return weight.contiguous(), weight.dtype == torch.float32


def layer_norm_fwd(args: Args) -> Outputs:
    out, x, residual = empty_forward(args), as_rows(args.x), as_rows(args.residual)
    weight, weight_is_float = _parameter(args.weight, x)
    bias, bias_is_float = _parameter(args.bias, x)
    _native.cuda().layer_norm_fwd(
        x=x,
        residual=residual,
        weight=weight,
        bias=bias,
        h=out.h if args.keeps_h else None,
        y=out.y,
        mean=None if args.rms else out.mean,
        rstd=out.rstd,
        rows=x.shape[0],
        cols=x.shape[1],
        stride_x=x.stride(0),
        stride_residual=row_stride(residual),
        eps=args.eps,
        weight_is_float=weight_is_float,
        bias_is_float=bias_is_float,
        dropout=_random.row_dropout(args.dropout_p, args.rng, args.site),
        dtype=_native.DTYPE_CODES[x.dtype],
        place=_native.cuda_place(x),
    )
    return out


def layer_norm_bwd(args: BackwardArgs) -> Gradients:
    saved, out = args.saved, empty_backward(args)
    rows, cols = saved.rstd.numel(), saved.h.shape[-1]
    if rows == 0:
        return out._replace(dweight=out.dweight.zero_(), dbias=out.dbias.zero_(), sum_dx=out.sum_dx.zero_())
    dy, dh, h = as_rows(args.dy), as_rows(args.dh), as_rows(saved.h)
    weight, weight_is_float = _parameter(saved.weight, h)
    dweight = None
    if weight is not None:
        dweight = out.dweight if out.dweight.dtype == weight.dtype else torch.empty_like(weight)
    place = _native.cuda_place(h)
    partial = None
    if weight is not None or args.has_bias:
        partial = h.new_empty(2 * _native.cuda().partial_rows(place.device) * cols, dtype=torch.float32)
    _native.cuda().layer_norm_bwd(
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
        partial=partial,
        rows=rows,
        cols=cols,
        stride_dy=dy.stride(0),
        stride_dh=row_stride(dh),
        stride_h=h.stride(0),
        weight_is_float=weight_is_float,
        dropout=_random.row_dropout(saved.dropout_p, saved.rng, saved.site),
        dtype=_native.DTYPE_CODES[h.dtype],
        place=place,
    )
    if dweight is not None and dweight is not out.dweight:
        out.dweight.copy_(dweight)
    add_rows(args, out)
    return out
