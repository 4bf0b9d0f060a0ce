"""dropout on Triton: kernels/dropout.py."""

from __future__ import annotations

import torch

from fastlm.kernels import dropout as kernels
from fastlm.ops import _random
from fastlm.ops._shapes import as_rows, column_limit, contiguous
from fastlm.ops.dropout import Args, BackwardArgs, empty_backward, empty_forward

limit = column_limit


def dropout_fwd(args: Args) -> torch.Tensor:
    y, x = empty_forward(args), as_rows(args.x)
    drop = _random.row_dropout(args.p, args.rng, args.site)
    kernels.dropout_fwd(x, y.view(x.shape), relu=args.relu, **drop._asdict())
    return y


def dropout_bwd(args: BackwardArgs) -> torch.Tensor:
    saved, dx, dy = args.saved, empty_backward(args), as_rows(args.dy)
    drop = _random.row_dropout(saved.p, saved.rng, saved.site)
    kernels.dropout_bwd(dy, as_rows(contiguous(saved.y)), dx.view(dy.shape), **drop._asdict())
    return dx
