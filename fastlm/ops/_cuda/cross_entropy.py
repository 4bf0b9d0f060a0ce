"""cross_entropy on CUDA: csrc/cuda/cross_entropy.cu; of long rows on sm_90, csrc/cuda/sm90/cross_entropy.cu."""

from __future__ import annotations

from fastlm import _native
from fastlm.ops import _losses, _registry
from fastlm.ops._shapes import as_float, row_stride


def _forward(x, softcap: bool, figures: bool):
    """The C++ function for logits x (n, V)."""
    cuda = _native.cuda()
    clusters = _registry.kernel("cross_entropy", "cuda", x, softcap=softcap, figures=figures) == "cluster"
    return cuda.cross_entropy_fwd_sm90 if clusters else cuda.cross_entropy_fwd


class Losses(_losses.Losses):
    """A label outside the vocabulary makes its row's loss and gradient NaN."""

    def __init__(self, args, vocabulary):
        super().__init__(args, vocabulary)
        self.place, self.weight = _native.cuda_place(self.target), as_float(args.class_weight)
        self.weight_sum = None if self.weight is None else self.weight.sum()
        self.parts = None
        if args.reduction == "mean":
            self.parts = self.each.new_empty(_native.cuda().LOSS_PARTS)
            _native.cuda().cross_entropy_count(
                target=self.target,
                weight=self.weight,
                parts=self.parts,
                rows=self.target.numel(),
                cols=vocabulary,
                ignore_index=args.ignore_index,
                place=self.place,
            )

    def add(self, x, dx, dloss=None):
        target, loss, figures = self.next(x.shape[0])
        _forward(x, self.args.softcap > 0.0, figures is not None)(
            x=x,
            target=target,
            weight=self.weight,
            weight_sum=self.weight_sum,
            parts=self.parts,
            dloss=dloss,
            loss=loss,
            z=None if figures is None else figures[0],
            accuracy=None if figures is None else figures[1],
            dx=dx,
            rows=x.shape[0],
            cols=x.shape[1],
            stride_x=x.stride(0),
            stride_dx=row_stride(dx),
            ignore_index=self.args.ignore_index,
            label_smoothing=self.args.label_smoothing,
            z_loss=self.args.z_loss,
            softcap=self.args.softcap,
            dtype=_native.DTYPE_CODES[x.dtype],
            place=self.place,
        )

    def total(self, of_z):
        out, values = self.each.new_empty(()), self.figures[0] if of_z else self.losses
        _native.cuda().cross_entropy_sum(
            loss=values,
            parts=self.parts,
            scratch=self.each.new_empty(_native.cuda().LOSS_PARTS),
            out=out,
            rows=values.numel(),
            place=self.place,
        )
        return out


def _scaled(x, dloss, out):
    _native.cuda().cross_entropy_bwd(
        x=x,
        dloss=dloss,
        y=out,
        rows=x.shape[0],
        cols=x.shape[1],
        stride_x=x.stride(0),
        stride_y=out.stride(0),
        per_row=dloss.dim() > 0,
        dtype=_native.DTYPE_CODES[x.dtype],
        place=_native.cuda_place(x),
    )


(
    cross_entropy_fwd,
    cross_entropy_fwd_,
    cross_entropy_gradient,
    cross_entropy_gradient_,
    cross_entropy_bwd,
    cross_entropy_bwd_,
) = _losses.raw_ops(Losses, _scaled)
