"""layer_norm on Triton: kernels/layer_norm.py."""

from __future__ import annotations

from fastlm.kernels import layer_norm as kernels
from fastlm.ops import _random
from fastlm.ops._shapes import as_rows, contiguous
from fastlm.ops.layer_norm import Args, BackwardArgs, Gradients, Outputs, empty_backward, empty_forward


def layer_norm_fwd(args: Args) -> Outputs:
    out = empty_forward(args)
    rows = out.rstd.numel(), args.x.shape[-1]
    kernels.layer_norm_fwd(
        as_rows(args.x),
        as_rows(args.residual),
        contiguous(args.weight),
        contiguous(args.bias),
        out.h.view(rows) if args.keeps_h else None,
        out.y.view(rows),
        None if args.rms else out.mean,
        out.rstd,
        eps=args.eps,
        **_random.row_dropout(args.dropout_p, args.rng, args.site)._asdict(),
        rms=args.rms,
    )
    return out


def layer_norm_bwd(args: BackwardArgs) -> Gradients:
    saved, out = args.saved, empty_backward(args)
    rows = saved.rstd.numel(), saved.h.shape[-1]
    kernels.layer_norm_bwd(
        as_rows(args.dy),
        as_rows(args.dh),
        as_rows(saved.h),
        contiguous(saved.weight),
        None if saved.rms else saved.mean,
        saved.rstd,
        out.dresidual.view(rows),
        out.dx.view(rows) if saved.dropout_p > 0.0 else None,
        None if saved.weight is None else out.dweight,
        out.dbias if args.has_bias else None,
        out.sum_dx if args.sum_dx else None,
        **_random.row_dropout(saved.dropout_p, saved.rng, saved.site)._asdict(),
        rms=saved.rms,
    )
    return out
