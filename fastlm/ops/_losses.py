"""Builds the raw ops of cross_entropy from a backend's kernels over rows of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fastlm.ops._shapes import as_rows
from fastlm.ops.cross_entropy import (
    Args,
    GradientArgs,
    InplaceArgs,
    LossArgs,
    Outputs,
    ScaleArgs,
    empty_dlogits,
    empty_gradient,
    empty_scaled,
    is_late,
)


class Losses:
    """The losses of rows of logits. The rows are added in order, all at once or in chunks.

    add(x, dx, dloss=None) adds the next rows x (n, V). It writes their gradient into dx, which may be x or None.
        dloss: float32 (n,), a factor of each row's gradient, or None.
    total(of_z) returns the reduced loss of all rows, for "mean" and "sum"; of_z: the z loss.
    """

    def __init__(self, args: LossArgs, vocabulary: int):
        self.args, self.target = args, args.target.reshape(-1).contiguous()
        shape = args.target.shape
        self.each = args.target.new_empty((3, *shape) if args.figures else shape, dtype=torch.float32)
        # loss (n,); z loss and accuracy (2, n), or None
        self.losses, self.figures = self.each.view(-1), None
        if args.figures:
            rows = self.each.view(3, self.target.numel())
            self.losses, self.figures = rows[0], rows[1:]
        self.added = 0

    def next(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(target, loss, figures) of the next rows: (rows,), (rows,), and (2, rows) or None."""
        chunk = slice(self.added, self.added + rows)
        self.added += rows
        figures = None if self.figures is None else self.figures[:, chunk]
        return self.target[chunk], self.losses[chunk], figures

    def loss(self) -> torch.Tensor:
        """The loss of the raw op, after every row has been added."""
        if self.args.reduction == "none":
            return self.each
        if self.figures is None:
            return self.total(False)
        kept = (self.target != self.args.ignore_index).sum()
        right = self.figures[1].sum(dtype=torch.float64)  # exact, so in any order the same bits
        return torch.stack((self.total(False), self.total(True), (right / kept).float()))


def per_row(dloss: torch.Tensor, rows: int) -> torch.Tensor:
    """dloss, a scalar or a number for each row, as float32 (rows,)."""
    dloss = dloss.float()
    return (dloss.reshape(-1) if dloss.dim() else dloss.expand(rows)).contiguous()


class RawOps(NamedTuple):
    forward: Callable[[Args], Outputs]
    forward_inplace: Callable[[InplaceArgs], torch.Tensor]
    gradient: Callable[[GradientArgs], torch.Tensor]
    gradient_inplace: Callable[[GradientArgs], None]
    backward: Callable[[ScaleArgs], torch.Tensor]
    backward_inplace: Callable[[ScaleArgs], None]


def raw_ops(losses: type[Losses], scaled: Callable, rows: Callable = as_rows) -> RawOps:
    """The raw ops of a backend.

    losses: the backend's class of Losses.
    scaled(x, dloss, out) writes x * dloss into out, which may be x. dloss: float32, contiguous, a scalar or (rows,).
    rows(x) gives logits (..., V) as rows (rows, V) with a unit last stride.
    """

    def total(x, dx, args: LossArgs):
        all_losses = losses(args, x.shape[-1])
        all_losses.add(x, dx)
        return all_losses.loss()

    def forward(args: Args) -> Outputs:
        dlogits = empty_dlogits(args)
        dx = as_rows(dlogits) if args.needs_dlogits else None
        return Outputs(total(rows(args.logits), dx, args.loss), dlogits)

    def forward_inplace(args: InplaceArgs) -> torch.Tensor:
        x = rows(args.logits)
        if is_late(x.dtype):
            return total(x, None, args.loss)
        loss = total(x, x, args.loss)
        put_back(x, args.logits)
        return loss

    def put_back(x, logits) -> None:
        if x.data_ptr() != logits.data_ptr():  # `rows` made a copy, since the strides are not those of rows
            logits.copy_(x.view(logits.shape))

    def gradient_into(args: GradientArgs, x, dx) -> None:
        losses(args.loss._replace(figures=False), x.shape[-1]).add(x, dx, per_row(args.dloss, x.shape[0]))

    def gradient(args: GradientArgs) -> torch.Tensor:
        dlogits = empty_gradient(args)
        gradient_into(args, rows(args.logits), as_rows(dlogits))
        return dlogits

    def gradient_inplace(args: GradientArgs) -> None:
        x = rows(args.logits)
        gradient_into(args, x, x)
        put_back(x, args.logits)

    def scale_into(args: ScaleArgs, out: torch.Tensor) -> None:
        y, dloss = as_rows(out), args.dloss.float()
        scaled(as_rows(args.dlogits), dloss.reshape(-1 if dloss.dim() else ()).contiguous(), y)
        if y.data_ptr() != out.data_ptr():
            out.copy_(y.view(out.shape))

    def backward(args: ScaleArgs) -> torch.Tensor:
        out = empty_scaled(args)
        scale_into(args, out)
        return out

    def backward_inplace(args: ScaleArgs) -> None:
        scale_into(args, args.dlogits)

    return RawOps(forward, forward_inplace, gradient, gradient_inplace, backward, backward_inplace)
