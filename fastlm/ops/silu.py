"""silu, with a gate multiplied after it, in one pass: the middle of a SwiGLU block, Llama's feed-forward.

    y = silu(x) * gate,   silu(x) = x σ(x),   σ(x) = 1/(1 + exp(-x))

Backward recomputes s = σ(x):
    dx = dy * gate * (s + x s (1 - s));   dgate = dy * x s
Saved: x, gate.

Sources: Elfwing, Uchibe, Doya 2017 (arXiv:1702.03118); Ramachandran, Zoph, Le 2017 (arXiv:1710.05941), as Swish with
β = 1; the gate: Shazeer 2020 (arXiv:2002.05202).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastlm.ops import _checks, _registry

__all__ = ["silu", "silu_reference"]


def silu_reference(x, *, gate=None):
    """y in plain differentiable torch, in the dtype of x. Arguments as of `silu`."""
    y = F.silu(x)
    return y if gate is None else y * gate


# ---- the raw ops


class Args(NamedTuple):
    x: torch.Tensor  # (..., cols)
    gate: torch.Tensor | None  # like x


class BackwardArgs(NamedTuple):
    dy: torch.Tensor  # like x
    forward: Args


class Gradients(NamedTuple):
    dx: torch.Tensor  # like x
    dgate: torch.Tensor  # like x; empty without a gate


def empty_forward(args: Args) -> torch.Tensor:
    return torch.empty_like(args.x, memory_format=torch.contiguous_format)


def empty_backward(args: BackwardArgs) -> Gradients:
    x, gate = args.forward.x, args.forward.gate
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return Gradients(dx=dx, dgate=x.new_empty(0) if gate is None else torch.empty_like(dx))


def _save(args: Args, y) -> Args:
    return args


def _backward(saved: Args, needs: Args, backend, dy):
    dx, dgate = _registry.call("silu_bwd", BackwardArgs(dy, saved), backend)
    return {"x": dx, "gate": dgate if needs.gate else None}


_registry.page(__name__, "silu")
_registry.define("silu_fwd", Args, empty_forward)
_registry.define("silu_bwd", BackwardArgs, empty_backward)
_registry.differentiable("silu_fwd", _save, _backward)


# ---- public


def silu(x: torch.Tensor, *, gate: torch.Tensor | None = None, backend: str = "auto") -> torch.Tensor:
    """y = silu(x) * gate.

    Args:
        x: (..., cols), floating point, any strides (a unit last one saves a copy).
        gate: like x, or None: the linear half of a gated MLP. Where its dtype differs from x's, both are promoted.
        backend: "auto", "reference", "cpu", "triton".

    Returns y, like x. Raises ValueError for a wrong shape, dtype or device, and for a named backend that cannot run.
    """
    _checks.is_float("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    if gate is not None:
        _checks.is_float("gate", gate, device=x.device, shape=x.shape)
        if gate.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, gate.dtype)
            x, gate = x.to(dtype), gate.to(dtype)
    backend = _registry.choose("silu", backend, x)
    if backend == "reference":
        return silu_reference(x, gate=gate)
    return _registry.call("silu_fwd", Args(x, gate), backend)
