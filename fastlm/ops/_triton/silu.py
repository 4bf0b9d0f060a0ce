"""silu on Triton: kernels/silu.py."""

from __future__ import annotations

import torch

from fastlm.kernels import silu as kernels
from fastlm.ops._shapes import as_rows, column_limit
from fastlm.ops.silu import Args, BackwardArgs, Gradients, empty_backward, empty_forward

limit = column_limit


def silu_fwd(args: Args) -> torch.Tensor:
    y, x = empty_forward(args), as_rows(args.x)
    kernels.silu_fwd(x, as_rows(args.gate), y.view(x.shape))
    return y


def silu_bwd(args: BackwardArgs) -> Gradients:
    out = empty_backward(args)
    x, gate = as_rows(args.forward.x), as_rows(args.forward.gate)
    dgate = None if gate is None else out.dgate.view(x.shape)
    kernels.silu_bwd(as_rows(args.dy), x, gate, out.dx.view(x.shape), dgate)
    return out
