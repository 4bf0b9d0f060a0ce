"""dropout, with a ReLU before it, in one pass.

    y = mask * x, or mask * max(x, 0);   mask is 0 with probability p, else 1/(1-p)
The mask is a function of (seed, step), the call site, and an element's row and column (fastlm/ops/_random.py).

Backward: dx = mask * dy with the mask drawn again; after a ReLU dx = dy/(1-p) where y > 0, else 0, which needs no mask.
Saved: nothing but rng; with a ReLU y, which the product after it keeps in any case.

Source: Srivastava et al. 2014 (JMLR 15), scaled as it drops.
"""

from __future__ import annotations

import torch

from fastlm import _native, philox
from fastlm.ops import _checks, _random, _registry
from fastlm.ops._shapes import as_rows


def dropout_reference(x, p=0.5, *, rng=None, site=0, relu=False):
    """y in plain differentiable torch, in the dtype of x. Arguments as of `dropout`."""
    return _random.dropout_rows(torch.relu(x) if relu else x, p, rng, site)


# ---- the raw ops: x, dy, y (..., cols)


def _fake_fwd(x, p, rng, site, relu, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_bwd(dy, y, p, rng, site, backend):
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


_registry.define(
    "dropout_fwd(Tensor x, float p, Tensor? rng, int site, bool relu, str backend) -> Tensor y", _fake_fwd
)
# y: with a ReLU; then rng is not read.
_registry.define(
    "dropout_bwd(Tensor dy, Tensor? y, float p, Tensor? rng, int site, str backend) -> Tensor dx", _fake_bwd
)


def _setup_context(ctx, args, y):
    _x, p, rng, site, relu, backend = args
    ctx.save_for_backward(*((y, None) if relu else (None, rng)))
    ctx.rest = p, site, backend


def _backward(ctx, dy):
    y, rng = ctx.saved_tensors
    p, site, backend = ctx.rest
    return _registry.call("dropout_bwd", dy, y, p, rng, site, backend), *(None,) * 5


_registry.differentiable("dropout_fwd", _setup_context, _backward)


# ---- CPU C++: csrc/cpu/dropout.cpp


@_registry.implement("dropout_fwd", "cpu")
def _fwd_cpu(x, p, rng, site, relu):
    y = _fake_fwd(x, p, rng, site, relu, "cpu")
    x2, at = as_rows(x), _native.address
    _native.cpu().dropout_fwd(
        at(x2), at(y), *x2.shape, x2.stride(0), relu, philox.threshold(p), _random.row_scale(p), at(rng), site,
        _native.DTYPE_CODES[x.dtype], _native.threads(),
    )  # fmt: skip
    return y


@_registry.implement("dropout_bwd", "cpu")
def _bwd_cpu(dy, y, p, rng, site):
    dx = _fake_bwd(dy, y, p, rng, site, "cpu")
    dy2, at = as_rows(dy), _native.address
    y = None if y is None else y.contiguous()
    _native.cpu().dropout_bwd(
        at(dy2), at(y), at(dx), *dy2.shape, dy2.stride(0), y is not None, philox.threshold(p), _random.row_scale(p),
        at(rng), site, _native.DTYPE_CODES[dy.dtype], _native.threads(),
    )  # fmt: skip
    return dx


# ---- Triton: kernels/dropout.py


@_registry.implement("dropout_fwd", "triton")
def _fwd_triton(x, p, rng, site, relu):
    from fastlm.kernels import dropout as kernels

    y = _fake_fwd(x, p, rng, site, relu, "triton")
    x2 = as_rows(x)
    kernels.dropout_fwd(
        x2, y.view(x2.shape), relu=relu, rng=rng, site=site, threshold=philox.threshold(p),
        scale=_random.row_scale(p),
    )  # fmt: skip
    return y


@_registry.implement("dropout_bwd", "triton")
def _bwd_triton(dy, y, p, rng, site):
    from fastlm.kernels import dropout as kernels

    dx = _fake_bwd(dy, y, p, rng, site, "triton")
    dy2 = as_rows(dy)
    kernels.dropout_bwd(
        dy2, None if y is None else as_rows(y.contiguous()), dx.view(dy2.shape), rng=rng, site=site,
        threshold=philox.threshold(p), scale=_random.row_scale(p),
    )  # fmt: skip
    return dx


_registry.offer("dropout", "cpu", "triton")


@_registry.limit("dropout", "triton")
def _triton_limit(x):
    """Columns are the second axis of its grid, as gelu's."""
    most = 65535 * 256
    return None if x.shape[-1] <= most else f"its rows have at most {most} columns, x has {x.shape[-1]}"


# ---- public


def dropout(
    x: torch.Tensor,
    p: float = 0.5,
    *,
    rng: torch.Tensor | None = None,
    site: int = 0,
    relu: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """y = dropout(x), or with `relu` dropout(max(x, 0)).

    Args:
        x: (..., cols), floating point, any strides (a unit last one saves a copy).
        p: probability of dropping an element; what stays is multiplied by 1/(1-p). 0 without relu: x itself.
        rng: int64 (2,), (seed, step), on the device; None draws from torch's generator. See fastlm.ops._random.
        site: number of this call site, so that two dropouts of one step differ.
        relu: whether a ReLU comes first; its result is not kept.
        backend: "auto", "reference", "cpu", "triton".

    Returns y, like x. Raises ValueError for a wrong shape, dtype or device, and for a named backend that cannot run.
    """
    _checks.is_float("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got a scalar")
    _checks.probability("p", p)
    if p > 0.0 or rng is not None:
        _checks.is_rng(rng, site, x.device)
    backend = _registry.choose("dropout", backend, x)
    if p == 0.0 and not relu:
        return x
    rng = _random.draw_rng(rng, p, x.device)
    if backend == "reference":
        return dropout_reference(x, p, rng=rng, site=site, relu=relu)
    return _registry.call("dropout_fwd", x, p, rng, site, relu, backend)
