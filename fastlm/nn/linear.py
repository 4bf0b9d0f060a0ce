"""Linear layers in the dtype of autocast, with fewer kernels and host calls than torch's.

    y = x Wᵀ + b;   dx = dy W (+ the gradient of x from elsewhere),   dW = dyᵀ x,   db = Σ dy over rows

Under autocast torch casts W and b in every forward, and their gradients back in every backward: seven casts for two
layers with biases. Here `LowWeights` (fastlm/ops/_low_weights.py) casts all weights of a model once a step, and on a
GPU the matrix product writes dW in float32 itself, which also saves its rounding to bfloat16. db is summed in float32.

Where x is also added to the residual, `keep` makes backward add both gradients of x in the matrix product. Where y goes
to a LayerNorm, `constant_bias` leaves db to it: `x_bias` of `fastlm.ops.layer_norm` sums it where dy is computed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastlm.ops import _products
from fastlm.ops._autocast import device_type
from fastlm.ops._low_weights import low_copy
from fastlm.ops._products import transposed_mm


def _low(weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return weight if weight is None or weight.dtype == dtype else low_copy(weight, dtype)


class _Linear(torch.autograd.Function):
    """y, and with `keep` x itself. low_w, low_b: the weights in x's dtype, without a gradient."""

    @staticmethod
    def forward(ctx, x, w, b, low_w, low_b, keep):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, low_w)
        ctx.dtypes = w.dtype, None if b is None else b.dtype
        y = _products.linear(x, low_w, low_b)
        return (y, x.view_as(x)) if keep else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dkept=None):
        (x, w), (w_dtype, b_dtype) = ctx.saved_tensors, ctx.dtypes
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        if dy is None:
            return dkept, None, None, None, None, None
        g, rows, dx, dw, db = dy.flatten(0, -2), x.flatten(0, -2), None, None, None
        if needs_x and dkept is None:
            dx = torch.mm(g, w).view(x.shape)
        elif needs_x and g.is_cuda:  # the sum is rounded once
            dx = torch.addmm(dkept.flatten(0, -2), g, w).view(x.shape)
        elif needs_x:
            dx = torch.mm(g, w).view(x.shape) + dkept
        if needs_w and g.is_cuda and w_dtype == torch.float32 != g.dtype:
            dw = torch.mm(g.t(), rows, out_dtype=torch.float32)
        elif needs_w:
            dw = transposed_mm(g, rows)  # autograd casts it, unless w takes a gradient of any dtype
        if needs_b:
            db = g.sum(0, dtype=b_dtype)
        return dx, dw, db, None, None, None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    keep: bool = False,
    constant_bias: bool = False,
):
    """F.linear: x (..., in), weight (out, in), bias (out,) -> (..., out). Autocast casts as it casts F.linear's.

    keep: returns (y, x), where the x is for the residual: backward adds its gradient to that of the product.
    constant_bias: bias gets no gradient here; the layer_norm that y goes to has it as `x_bias`.
    """
    given = bias
    if constant_bias and bias is not None:
        bias = bias.detach()
    device = device_type(x)
    low = torch.is_autocast_enabled(device)
    plain = not torch.is_grad_enabled() or torch.compiler.is_compiling() or not (low or (keep and device == "cuda"))
    if plain or x.dim() < 2 or not weight.requires_grad or torch.float64 in (x.dtype, weight.dtype):
        y = F.linear(x, weight, bias)
        return (y, x) if keep else y
    dtype = torch.get_autocast_dtype(device) if low else torch.promote_types(x.dtype, weight.dtype)
    x = x.to(dtype)
    return _Linear.apply(x, weight, bias, _low(weight, dtype), _low(given, dtype), keep)


class Linear(torch.nn.Linear):
    """torch.nn.Linear (arguments, state_dict, defaults) on `linear`, whose options its forward takes."""

    def forward(self, x: torch.Tensor, *, keep: bool = False, constant_bias: bool = False):
        return linear(x, self.weight, self.bias, keep=keep, constant_bias=constant_bias)
