"""q, k and v as views of one product's output, and their gradients as one tensor for that product's backward."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


def side_by_side(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the rows are those of q, k and v as `split_heads` returns them, (..., H, D)."""
    heads, d = q.shape[-2:]
    return q.shape == k.shape == v.shape and all(x.stride()[-3:] == (3 * heads * d, d, 1) for x in (q, k, v))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, heads):
        ctx.set_materialize_grads(False)
        ctx.shape = qkv.shape
        return qkv.unflatten(-1, (3, heads, -1)).unbind(-3)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        shape = ctx.shape
        base = None if gradients[0] is None else gradients[0]._base
        if base is not None and all(g is not None and g._base is base for g in gradients):
            parts = base.unbind(-3) if base.dim() > 3 and base.numel() == shape.numel() else ()
            if len(parts) == 3 and all(
                (g.shape, g.stride(), g.storage_offset()) == (p.shape, p.stride(), p.storage_offset())
                for g, p in zip(gradients, parts)
            ):
                return base.view(shape), None
        like = next(g for g in gradients if g is not None)
        return torch.stack([torch.zeros_like(like) if g is None else g for g in gradients], -3).view(shape), None


def split_heads(qkv: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(..., 3 H D) as views q, k and v (..., H, D).

    Backward of attention on a GPU writes dq, dk and dv into one tensor, which is then the gradient without a copy.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and qkv.requires_grad):
        return qkv.unflatten(-1, (3, heads, -1)).unbind(-3)
    return _Split.apply(qkv, heads)
