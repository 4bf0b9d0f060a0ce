"""Builds the raw ops of cross_entropy from a backend's kernels over rows of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fastlm.ops._shapes import as_rows
from fastlm.ops.cross_entropy import Args, InplaceArgs, LossArgs, Outputs, ScaleArgs, empty_dlogits, empty_scaled


class Losses:
    """The losses of rows of logits. The rows are added in order, all at once or in chunks.

    add(x, dx, dloss=None) adds the next rows x (n, V). It writes their gradient into dx, which may be x or None.
        dloss: float32 (n,), a factor of each row's gradient, or None.
    loss() returns the loss of the raw op, after every row has been added.
    """

    def __init__(self, args: LossArgs, vocabulary: int):
        self.args, self.target = args, args.target.reshape(-1).contiguous()
        self.each = args.target.new_empty(args.target.shape, dtype=torch.float32)
        self.added = 0

    def next(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(target, loss) of the next rows, each (rows,)."""
        chunk = slice(self.added, self.added + rows)
        self.added += rows
        return self.target[chunk], self.each.view(-1)[chunk]


class RawOps(NamedTuple):
    forward: Callable[[Args], Outputs]
    forward_inplace: Callable[[InplaceArgs], torch.Tensor]
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
        loss = total(x, x, args.loss)
        if x.data_ptr() != args.logits.data_ptr():  # `rows` made a copy, since the strides are not those of rows
            args.logits.copy_(x.view(args.logits.shape))
        return loss

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

    return RawOps(forward, forward_inplace, backward, backward_inplace)
