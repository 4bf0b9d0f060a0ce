"""gelu, with an optional bias added before it and an optional gate multiplied after it, in one pass.

    h = x + bias;   y = gelu(h) * gate
    "none":  gelu(h) = h Φ(h) = h/2 (1 + erf(h/√2))
    "tanh":  gelu(h) = h/2 (1 + tanh(u)),   u = √(2/π) (h + 0.044715 h³)

Backward recomputes h; with φ the normal density:
    dx = dy * gate * gelu'(h);   dbias = Σ dx over rows;   dgate = dy * gelu(h)
    "none":  gelu'(h) = Φ(h) + h φ(h)
    "tanh":  gelu'(h) = (1 + tanh(u))/2 + h/2 (1 - tanh(u)²) √(2/π) (1 + 3·0.044715 h²)
Saved: x, bias, gate.

Sources: Hendrycks, Gimpel 2016 (arXiv:1606.08415); the gate: Shazeer 2020 (arXiv:2002.05202).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastlm.ops import _checks, _registry

__all__ = ["gelu", "gelu_reference"]


def gelu_reference(x, bias=None, *, gate=None, approximate="none"):
    """y in plain differentiable torch, in the dtype of x. Arguments as of `gelu`."""
    h = x if bias is None else x + bias.to(x.dtype)
    y = F.gelu(h, approximate=approximate)
    return y if gate is None else y * gate


# ---- the raw ops


class Args(NamedTuple):
    x: torch.Tensor  # (..., cols)
    bias: torch.Tensor | None  # (cols,)
    gate: torch.Tensor | None  # like x
    tanh: bool


class BackwardArgs(NamedTuple):
    dy: torch.Tensor  # like x
    forward: Args
    has_dbias: bool


class Gradients(NamedTuple):
    dx: torch.Tensor  # like x
    dbias: torch.Tensor  # (cols,) float32; empty if it is not needed
    dgate: torch.Tensor  # like x; empty without a gate


def empty_forward(args: Args) -> torch.Tensor:
    return torch.empty_like(args.x, memory_format=torch.contiguous_format)


def empty_backward(args: BackwardArgs) -> Gradients:
    x, gate = args.forward.x, args.forward.gate
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return Gradients(
        dx=dx,
        dbias=x.new_empty(x.shape[-1] if args.has_dbias else 0, dtype=torch.float32),
        dgate=x.new_empty(0) if gate is None else torch.empty_like(dx),
    )


def _save(args: Args, y) -> Args:
    return args


def _backward(saved: Args, needs: Args, backend, dy):
    dx, dbias, dgate = _registry.call("gelu_bwd", BackwardArgs(dy, saved, has_dbias=needs.bias), backend)
    # Autograd casts dbias to bias's dtype.
    return {"x": dx, "bias": dbias if needs.bias else None, "gate": dgate if needs.gate else None}


_registry.page(__name__, "gelu")
_registry.define("gelu_fwd", Args, empty_forward)
_registry.define("gelu_bwd", BackwardArgs, empty_backward)
_registry.differentiable("gelu_fwd", _save, _backward)


# ---- public


def gelu(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    gate: torch.Tensor | None = None,
    approximate: str = "none",
    backend: str = "auto",
) -> torch.Tensor:
    """y = gelu(x + bias) * gate.

    Args:
        x: (..., cols), floating point, any strides (a unit last one saves a copy).
        bias: (cols,), or None; added to x, not to the gate. Any floating-point dtype: it does not promote x.
        gate: like x, or None: the linear half of a gated MLP. If its dtype differs from x's, both are promoted.
        approximate: "none" (erf) or "tanh", as in F.gelu.
        backend: "auto", "reference", "cpu", "triton".

    Returns y, like x. Raises ValueError for a wrong shape, dtype or device, and for a named backend that cannot run.
    """
    _checks.is_float("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    if bias is not None:
        _checks.is_float("bias", bias, device=x.device, shape=x.shape[-1:])
    if gate is not None:
        _checks.is_float("gate", gate, device=x.device, shape=x.shape)
    _checks.one_of("approximate", approximate, ("none", "tanh"))
    if gate is not None and gate.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, gate.dtype)
        x, gate = x.to(dtype), gate.to(dtype)
    backend = _registry.choose("gelu", backend, x)
    if backend == "reference":
        return gelu_reference(x, bias, gate=gate, approximate=approximate)
    return _registry.call("gelu_fwd", Args(x, bias, gate, tanh=approximate == "tanh"), backend)
