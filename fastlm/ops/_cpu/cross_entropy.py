"""cross_entropy on a CPU: csrc/cpu/cross_entropy.cpp."""

from __future__ import annotations

import math

from fastlm import _native
from fastlm.ops import _losses
from fastlm.ops._shapes import as_float, row_stride
from fastlm.ops.cross_entropy import raise_outside


class Losses(_losses.Losses):
    """Raises ValueError at once for a label outside the vocabulary."""

    def __init__(self, args, vocabulary):
        super().__init__(args, vocabulary)
        self.weight = as_float(args.class_weight)
        row, count = _native.cpu().cross_entropy_count(
            target=self.target,
            weight=self.weight,
            rows=self.target.numel(),
            vocabulary=vocabulary,
            ignore_index=args.ignore_index,
        )
        if row >= 0:
            raise_outside(row, int(self.target[row]), vocabulary, args.ignore_index)
        self.denominator, self.sum, self.z_sum = count if args.reduction == "mean" else 1.0, 0.0, 0.0

    def add(self, x, dx, dloss=None):
        target, loss, figures = self.next(x.shape[0])
        loss_sum, z_sum = _native.cpu().cross_entropy_fwd(
            logits=x,
            target=target,
            weight=self.weight,
            dloss=dloss,
            loss=loss,
            z=None if figures is None else figures[0],
            accuracy=None if figures is None else figures[1],
            dlogits=dx,
            rows=x.shape[0],
            vocabulary=x.shape[1],
            stride_x=x.stride(0),
            stride_dx=row_stride(dx),
            ignore_index=self.args.ignore_index,
            label_smoothing=self.args.label_smoothing,
            z_loss=self.args.z_loss,
            softcap=self.args.softcap,
            denominator=self.denominator,
            dtype=_native.DTYPE_CODES[x.dtype],
            threads=_native.threads(),
        )
        self.sum += loss_sum
        self.z_sum += z_sum

    def total(self, of_z):
        value = self.z_sum if of_z else self.sum
        return self.each.new_full((), value if self.denominator else math.nan)


def _scaled(x, dloss, out):
    _native.cpu().cross_entropy_bwd(
        dlogits=x,
        dloss=dloss,
        out=out,
        rows=x.shape[0],
        cols=x.shape[1],
        stride_x=x.stride(0),
        stride_y=out.stride(0),
        per_row=dloss.dim() > 0,
        dtype=_native.DTYPE_CODES[x.dtype],
        threads=_native.threads(),
    )


(
    cross_entropy_fwd,
    cross_entropy_fwd_,
    cross_entropy_gradient,
    cross_entropy_gradient_,
    cross_entropy_bwd,
    cross_entropy_bwd_,
) = _losses.raw_ops(Losses, _scaled)
