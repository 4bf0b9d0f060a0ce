"""gelu on Triton: kernels/gelu.py."""

from __future__ import annotations

import torch

from fastlm.kernels import gelu as kernels
from fastlm.ops._shapes import as_rows, column_limit, contiguous
from fastlm.ops.gelu import Args, BackwardArgs, Gradients, empty_backward, empty_forward

limit = column_limit


def gelu_fwd(args: Args) -> torch.Tensor:
    y, x = empty_forward(args), as_rows(args.x)
    kernels.gelu_fwd(x, contiguous(args.bias), as_rows(args.gate), y.view(x.shape), tanh=args.tanh)
    return y


def gelu_bwd(args: BackwardArgs) -> Gradients:
    forward, out = args.forward, empty_backward(args)
    x, gate = as_rows(forward.x), as_rows(forward.gate)
    kernels.gelu_bwd(
        as_rows(args.dy),
        x,
        contiguous(forward.bias),
        gate,
        out.dx.view(x.shape),
        out.dbias if args.has_dbias else None,
        None if gate is None else out.dgate.view(x.shape),
        tanh=forward.tanh,
    )
    return out
