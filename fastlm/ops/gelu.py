"""gelu, with a bias added before it and a gate multiplied after it, in one pass.

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

import torch
import torch.nn.functional as F

from fastlm import _native
from fastlm.ops import _checks, _registry
from fastlm.ops._shapes import as_rows, contiguous


def gelu_reference(x, bias=None, *, gate=None, approximate="none"):
    """y in plain differentiable torch, in the dtype of x. Arguments as of `gelu`."""
    h = x if bias is None else x + bias.to(x.dtype)
    y = F.gelu(h, approximate=approximate)
    return y if gate is None else y * gate


# ---- the raw ops: x, gate (..., cols)


def _fake_fwd(x, bias, gate, tanh, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_bwd(dy, x, bias, gate, tanh, has_dbias, backend):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dbias = x.new_empty(x.shape[-1] if has_dbias else 0, dtype=torch.float32)
    return dx, dbias, x.new_empty(0) if gate is None else torch.empty_like(dx)


_registry.define("gelu_fwd(Tensor x, Tensor? bias, Tensor? gate, bool tanh, str backend) -> Tensor y", _fake_fwd)
_registry.define(
    "gelu_bwd(Tensor dy, Tensor x, Tensor? bias, Tensor? gate, bool tanh, bool has_dbias, str backend) "
    "-> (Tensor dx, Tensor dbias, Tensor dgate)",
    _fake_bwd,
)


def _setup_context(ctx, args, outputs):
    x, bias, gate, tanh, backend = args
    ctx.save_for_backward(x, bias, gate)
    ctx.rest = tanh, backend


def _backward(ctx, dy):
    x, bias, gate = ctx.saved_tensors
    tanh, backend = ctx.rest
    has_dbias = ctx.needs_input_grad[2]
    dx, dbias, dgate = _registry.call("gelu_bwd", dy, x, bias, gate, tanh, has_dbias, backend)
    return dx, dbias.to(bias.dtype) if has_dbias else None, None if gate is None else dgate, None, None


_registry.differentiable("gelu_fwd", _setup_context, _backward)


# ---- CPU C++: csrc/cpu/gelu.cpp


@_registry.implement("gelu_fwd", "cpu")
def _fwd_cpu(x, bias, gate, tanh):
    y = _fake_fwd(x, bias, gate, tanh, "cpu")
    x2, gate2 = as_rows(x), None if gate is None else as_rows(gate)
    bias = None if bias is None else bias.float().contiguous()
    at = _native.address
    _native.cpu().gelu_fwd(
        at(x2), at(bias), at(gate2), at(y), *x2.shape, x2.stride(0), 0 if gate2 is None else gate2.stride(0), tanh,
        _native.DTYPE_CODES[x.dtype], _native.threads(),
    )  # fmt: skip
    return y


@_registry.implement("gelu_bwd", "cpu")
def _bwd_cpu(dy, x, bias, gate, tanh, has_dbias):
    dx, dbias, dgate = _fake_bwd(dy, x, bias, gate, tanh, has_dbias, "cpu")
    dy2, x2, gate2 = as_rows(dy), as_rows(x), None if gate is None else as_rows(gate)
    bias = None if bias is None else bias.float().contiguous()
    rows, cols = x2.shape
    partial = x.new_empty(_native.cpu().row_blocks(rows) * cols if has_dbias else 0, dtype=torch.float32)
    at = _native.address
    _native.cpu().gelu_bwd(
        at(dy2), at(x2), at(bias), at(gate2), at(dx), 0 if gate is None else at(dgate), at(dbias) if has_dbias else 0,
        at(partial), rows, cols, dy2.stride(0), x2.stride(0), 0 if gate2 is None else gate2.stride(0), tanh,
        _native.DTYPE_CODES[x.dtype], _native.threads(),
    )  # fmt: skip
    return dx, dbias, dgate


# ---- Triton: kernels/gelu.py


@_registry.implement("gelu_fwd", "triton")
def _fwd_triton(x, bias, gate, tanh):
    from fastlm.kernels import gelu as kernels

    y = _fake_fwd(x, bias, gate, tanh, "triton")
    x2 = as_rows(x)
    kernels.gelu_fwd(x2, contiguous(bias), None if gate is None else as_rows(gate), y.view(x2.shape), tanh=tanh)
    return y


@_registry.implement("gelu_bwd", "triton")
def _bwd_triton(dy, x, bias, gate, tanh, has_dbias):
    from fastlm.kernels import gelu as kernels

    dx, dbias, dgate = out = _fake_bwd(dy, x, bias, gate, tanh, has_dbias, "triton")
    x2, gate2 = as_rows(x), None if gate is None else as_rows(gate)
    kernels.gelu_bwd(
        as_rows(dy), x2, contiguous(bias), gate2, dx.view(x2.shape), dbias if has_dbias else None,
        None if gate is None else dgate.view(x2.shape), tanh=tanh,
    )  # fmt: skip
    return out


_registry.offer("gelu", "cpu", "triton")


@_registry.limit("gelu", "triton")
def _triton_limit(x):
    """Columns are the second axis of its grid, 65535 programs of 256: a tensor of one dimension is a single row."""
    most = 65535 * 256
    return None if x.shape[-1] <= most else f"its rows have at most {most} columns, x has {x.shape[-1]}"


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
        gate: like x, or None: the linear half of a gated MLP. Where its dtype differs from x's, both are promoted.
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
    return _registry.call("gelu_fwd", x, bias, gate, approximate == "tanh", backend)
