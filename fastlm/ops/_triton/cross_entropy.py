"""cross_entropy on Triton: kernels/cross_entropy.py."""

from __future__ import annotations

import torch

from fastlm.kernels import cross_entropy as kernels
from fastlm.ops import _losses
from fastlm.ops._shapes import as_rows, contiguous


class Losses(_losses.Losses):
    """A label outside the vocabulary makes its row's loss and gradient NaN."""

    def __init__(self, args, vocabulary):
        super().__init__(args, vocabulary)
        self.weight, self.weight_sum, self.parts = contiguous(args.class_weight), None, None
        if self.weight is not None:
            self.weight_sum = self.weight.sum(dtype=torch.float32)
        if args.reduction == "mean":
            self.parts = kernels.count_targets(self.target, self.weight, vocabulary, args.ignore_index)

    def add(self, x, dx, dloss=None):
        target, loss, figures = self.next(x.shape[0])
        kernels.cross_entropy_fwd(
            x,
            target,
            self.weight,
            self.weight_sum,
            self.parts,
            dloss,
            loss,
            figures,
            dx,
            ignore_index=self.args.ignore_index,
            label_smoothing=self.args.label_smoothing,
            z_loss=self.args.z_loss,
            softcap=self.args.softcap,
        )

    def total(self, of_z):
        return kernels.sum_losses(self.figures[0] if of_z else self.losses, self.parts)


def _rows(x):
    """The rows of x, copied unless they are aligned as in a contiguous tensor. The alignment decides which columns a
    thread adds up; with the copy, the same logits give the same bits whatever their strides."""
    x = as_rows(x)
    return x if kernels.aligned_alike(x, None) else x.clone(memory_format=torch.contiguous_format)


(
    cross_entropy_fwd,
    cross_entropy_fwd_,
    cross_entropy_gradient,
    cross_entropy_gradient_,
    cross_entropy_bwd,
    cross_entropy_bwd_,
) = _losses.raw_ops(Losses, kernels.cross_entropy_bwd, _rows)
