"""layer_norm and rms_norm, with the residual addition and the dropout before them in one pass.

    h = residual + dropout(x)
    layer_norm:  y = (h - mean(h)) * rstd * weight + bias,   rstd = 1 / sqrt(mean((h - mean(h))^2) + eps)
    rms_norm:    y = h * rstd * weight,                      rstd = 1 / sqrt(mean(h^2) + eps)

over the last dimension; statistics in float32. h is rounded to its dtype first, so y belongs to the h that is returned.

Backward, with x̂ = (h - mean) rstd and g = dy * weight:
    dh = rstd (g - mean(g) - x̂ mean(g x̂)) + (gradient of the returned h);   rms_norm has no mean(g)
    dresidual = dh;   dx = dropout mask * dh;   dweight = Σ dy x̂;   dbias = Σ dy
Saved: h (x itself where there is neither residual nor dropout), mean and rstd, (rows,) float32.

Sources: Ba, Kiros, Hinton 2016 (arXiv:1607.06450); Zhang, Sennrich 2019 (arXiv:1910.07467).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm import _native, philox
from fastlm.ops import _checks, _random, _registry
from fastlm.ops._autocast import autocast
from fastlm.ops._shapes import as_rows, contiguous


def layer_norm_reference(x, weight=None, bias=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
    """(y, h) in plain differentiable torch, in the dtype of its inputs. Arguments as of `layer_norm`."""
    h = _random.dropout_rows(x, dropout_p, rng, site)
    h = h if residual is None else residual + h
    return F.layer_norm(h, h.shape[-1:], weight, bias, eps), h


def rms_norm_reference(x, weight=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
    """(y, h) in plain differentiable torch, in the dtype of its inputs. Arguments as of `rms_norm`."""
    h = _random.dropout_rows(x, dropout_p, rng, site)
    h = h if residual is None else residual + h
    return F.rms_norm(h, h.shape[-1:], weight, eps), h


# ---- the raw ops: x, residual (..., cols); rms leaves out the mean. h is empty where it would equal x.


def _fake_fwd(x, residual, weight, bias, eps, dropout_p, rng, site, rms, backend):
    keeps_h = residual is not None or dropout_p > 0.0
    rows = x.shape[:-1].numel()
    h = torch.empty_like(x, memory_format=torch.contiguous_format) if keeps_h else x.new_empty(0)
    mean = x.new_empty(0 if rms else rows, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), h, mean, x.new_empty(rows, dtype=torch.float32)


def _fake_bwd(dy, dh, h, weight, mean, rstd, dropout_p, rng, site, rms, has_bias, backend):
    dresidual = torch.empty_like(h, memory_format=torch.contiguous_format)
    dx = torch.empty_like(dresidual) if dropout_p > 0.0 else h.new_empty(0)
    cols = h.shape[-1]
    dweight = h.new_empty(0) if weight is None else weight.new_empty(cols)
    return dresidual, dx, dweight, h.new_empty(cols if has_bias else 0, dtype=torch.float32)


_registry.define(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float dropout_p, Tensor? rng, "
    "int site, bool rms, str backend) -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    _fake_fwd,
)
_registry.define(
    "layer_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor mean, Tensor rstd, float dropout_p, "
    "Tensor? rng, int site, bool rms, bool has_bias, str backend) "
    "-> (Tensor dresidual, Tensor dx, Tensor dweight, Tensor dbias)",
    _fake_bwd,
)


def _setup_context(ctx, args, outputs):
    x, residual, weight, bias, _eps, dropout_p, rng, site, rms, backend = args
    _y, h, mean, rstd = outputs
    ctx.mark_non_differentiable(mean, rstd)
    keeps_h = residual is not None or dropout_p > 0.0
    ctx.save_for_backward(h if keeps_h else x, weight, mean, rstd, rng)
    ctx.rest = dropout_p, site, rms, bias is not None and bias.dtype, residual is not None, backend


def _backward(ctx, dy, dh, _dmean, _drstd):
    h, weight, mean, rstd, rng = ctx.saved_tensors
    dropout_p, site, rms, bias_dtype, has_residual, backend = ctx.rest
    if dy is None:  # only the residual stream was used
        dy = torch.zeros_like(h)
    dresidual, dx, dweight, dbias = _registry.call(
        "layer_norm_bwd", dy, dh, h, weight, mean, rstd, dropout_p, rng, site, rms, bool(bias_dtype), backend
    )
    return (
        dx if dropout_p > 0.0 else dresidual,
        dresidual if has_residual else None,
        None if weight is None else dweight,
        dbias.to(bias_dtype) if bias_dtype else None,
        *(None,) * 6,
    )


_registry.differentiable("layer_norm_fwd", _setup_context, _backward)


# ---- CPU C++: csrc/cpu/layer_norm.cpp


def _float(weight):
    return None if weight is None else weight.float().contiguous()


@_registry.implement("layer_norm_fwd", "cpu")
def _fwd_cpu(x, residual, weight, bias, eps, dropout_p, rng, site, rms):
    y, h, mean, rstd = _fake_fwd(x, residual, weight, bias, eps, dropout_p, rng, site, rms, "cpu")
    rows, x2 = rstd.numel(), as_rows(x)
    residual2 = None if residual is None else as_rows(residual)
    weight, bias = _float(weight), _float(bias)
    at = _native.address
    _native.cpu().layer_norm_fwd(
        at(x2), at(residual2), at(weight), at(bias), at(h) if h.numel() else 0, at(y), 0 if rms else at(mean), at(rstd),
        rows, x.shape[-1], x2.stride(0), 0 if residual2 is None else residual2.stride(0), eps, rms,
        philox.threshold(dropout_p), _random.row_scale(dropout_p), at(rng), site,
        _native.DTYPE_CODES[x.dtype], _native.threads(),
    )  # fmt: skip
    return y, h, mean, rstd


@_registry.implement("layer_norm_bwd", "cpu")
def _bwd_cpu(dy, dh, h, weight, mean, rstd, dropout_p, rng, site, rms, has_bias):
    dresidual, dx, dweight, dbias = _fake_bwd(
        dy, dh, h, weight, mean, rstd, dropout_p, rng, site, rms, has_bias, "cpu"
    )
    rows, cols = rstd.numel(), h.shape[-1]
    dy2, h2, dh2 = as_rows(dy), as_rows(h), None if dh is None else as_rows(dh)
    weight32 = _float(weight)
    dweight32 = None if weight is None else h.new_empty(cols, dtype=torch.float32)
    partial = h.new_empty(2 * _native.cpu().row_blocks(rows) * cols, dtype=torch.float32)
    at = _native.address
    _native.cpu().layer_norm_bwd(
        at(dy2), at(dh2), at(h2), at(weight32), 0 if rms else at(mean), at(rstd), at(dresidual),
        at(dx) if dropout_p > 0.0 else 0, at(dweight32), at(dbias) if has_bias else 0, at(partial),
        rows, cols, dy2.stride(0), 0 if dh2 is None else dh2.stride(0), h2.stride(0), rms,
        philox.threshold(dropout_p), _random.row_scale(dropout_p), at(rng), site,
        _native.DTYPE_CODES[h.dtype], _native.threads(),
    )  # fmt: skip
    return dresidual, dx, dweight if weight is None else dweight32.to(weight.dtype), dbias


# ---- Triton: kernels/layer_norm.py


@_registry.implement("layer_norm_fwd", "triton")
def _fwd_triton(x, residual, weight, bias, eps, dropout_p, rng, site, rms):
    from fastlm.kernels import layer_norm as kernels

    y, h, mean, rstd = _fake_fwd(x, residual, weight, bias, eps, dropout_p, rng, site, rms, "triton")
    rows = rstd.numel(), x.shape[-1]
    kernels.layer_norm_fwd(
        as_rows(x), None if residual is None else as_rows(residual), contiguous(weight), contiguous(bias),
        h.view(rows) if h.numel() else None, y.view(rows), None if rms else mean, rstd,
        eps=eps, threshold=philox.threshold(dropout_p), scale=_random.row_scale(dropout_p), rng=rng, site=site,
        rms=rms,
    )  # fmt: skip
    return y, h, mean, rstd


@_registry.implement("layer_norm_bwd", "triton")
def _bwd_triton(dy, dh, h, weight, mean, rstd, dropout_p, rng, site, rms, has_bias):
    from fastlm.kernels import layer_norm as kernels

    out = _fake_bwd(dy, dh, h, weight, mean, rstd, dropout_p, rng, site, rms, has_bias, "triton")
    dresidual, dx, dweight, dbias = out
    rows = rstd.numel(), h.shape[-1]
    kernels.layer_norm_bwd(
        as_rows(dy), None if dh is None else as_rows(dh), as_rows(h), contiguous(weight), None if rms else mean, rstd,
        dresidual.view(rows), dx.view(rows) if dropout_p > 0.0 else None, None if weight is None else dweight,
        dbias if has_bias else None,
        threshold=philox.threshold(dropout_p), scale=_random.row_scale(dropout_p), rng=rng, site=site, rms=rms,
    )  # fmt: skip
    return out


# ---- CUDA C++: csrc/cuda/layer_norm.cu


def _parameter(weight, x):
    """A weight as the kernel reads it, float32 or of x's dtype; and whether it is float32."""
    if weight is None:
        return None, False
    if weight.dtype not in (x.dtype, torch.float32):
        weight = weight.float()
    return weight.contiguous(), weight.dtype == torch.float32


@_registry.implement("layer_norm_fwd", "cuda")
def _fwd_cuda(x, residual, weight, bias, eps, dropout_p, rng, site, rms):
    y, h, mean, rstd = _fake_fwd(x, residual, weight, bias, eps, dropout_p, rng, site, rms, "cuda")
    x2, residual2 = as_rows(x), None if residual is None else as_rows(residual)
    (weight, weight_is_float), (bias, bias_is_float) = _parameter(weight, x), _parameter(bias, x)
    at = _native.address
    _native.cuda().layer_norm_fwd(
        at(x2), at(residual2), at(weight), at(bias), at(h) if h.numel() else 0, at(y), 0 if rms else at(mean), at(rstd),
        *x2.shape, x2.stride(0), 0 if residual2 is None else residual2.stride(0), eps, weight_is_float, bias_is_float,
        philox.threshold(dropout_p), _random.row_scale(dropout_p), at(rng), site,
        _native.DTYPE_CODES[x.dtype], *_native.cuda_place(x),
    )  # fmt: skip
    return y, h, mean, rstd


@_registry.implement("layer_norm_bwd", "cuda")
def _bwd_cuda(dy, dh, h, weight, mean, rstd, dropout_p, rng, site, rms, has_bias):
    dresidual, dx, dweight, dbias = out = _fake_bwd(
        dy, dh, h, weight, mean, rstd, dropout_p, rng, site, rms, has_bias, "cuda"
    )
    rows, cols = rstd.numel(), h.shape[-1]
    if rows == 0:
        return dresidual, dx, dweight.zero_(), dbias.zero_()
    dy2, h2, dh2 = as_rows(dy), as_rows(h), None if dh is None else as_rows(dh)
    weight2, weight_is_float = _parameter(weight, h)
    dweight2 = None if weight is None else dweight if dweight.dtype == weight2.dtype else torch.empty_like(weight2)
    device, queue = _native.cuda_place(h)
    partial = None
    if weight is not None or has_bias:
        partial = h.new_empty(2 * _native.cuda().partial_rows(device) * cols, dtype=torch.float32)
    at = _native.address
    _native.cuda().layer_norm_bwd(
        at(dy2), at(dh2), at(h2), at(weight2), 0 if rms else at(mean), at(rstd), at(dresidual),
        at(dx) if dropout_p > 0.0 else 0, at(dweight2), at(dbias) if has_bias else 0, at(partial),
        rows, cols, dy2.stride(0), 0 if dh2 is None else dh2.stride(0), h2.stride(0), weight_is_float,
        philox.threshold(dropout_p), _random.row_scale(dropout_p), at(rng), site,
        _native.DTYPE_CODES[h.dtype], device, queue,
    )  # fmt: skip
    if dweight2 is not None and dweight2 is not dweight:
        dweight.copy_(dweight2)
    return out


for _op in ("layer_norm", "rms_norm"):
    _registry.offer(_op, "cpu", "triton", "cuda")


# ---- public


def _norm(op, x, weight, bias, eps, residual, dropout_p, rng, site, return_residual, backend):
    _checks.is_float("x", x)
    device, cols = x.device, x.shape[-1:]
    if not cols or cols[0] == 0:
        raise ValueError(f"x: expected at least one dimension, the last not empty, got shape {tuple(x.shape)}")
    if weight is not None:
        _checks.is_float("weight", weight, device=device, shape=cols)
    if bias is not None:
        _checks.is_float("bias", bias, device=device, shape=cols)
    if residual is not None:
        _checks.is_float("residual", residual, device=device, shape=x.shape)
    _checks.probability("dropout_p", dropout_p)
    _checks.is_rng(rng, site, device)

    if bias is not None and weight is None:  # the kernels have no such form
        weight = torch.ones_like(bias)
    if dropout_p and philox.threshold(dropout_p) == 0:  # p < 2^-32 drops nothing
        dropout_p = 0.0
    x, weight, bias, residual = autocast(op, x, weight, bias, residual)
    if residual is not None and residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    backend = _registry.choose(op, backend, x)
    rng = _random.draw_rng(rng, dropout_p, device)
    if backend == "reference":
        arguments = {"eps": eps, "residual": residual, "dropout_p": dropout_p, "rng": rng, "site": site}
        if op == "rms_norm":
            y, h = rms_norm_reference(x, weight, **arguments)
        else:
            y, h = layer_norm_reference(x, weight, bias, **arguments)
    else:
        y, h, _, _ = _registry.call(
            "layer_norm_fwd", x, residual, weight, bias, eps, dropout_p, rng, site, op == "rms_norm", backend
        )
        h = h if residual is not None or dropout_p > 0.0 else x
    return (y, h) if return_residual else y


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng: torch.Tensor | None = None,
    site: int = 0,
    return_residual: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = LN(h) * weight + bias with h = residual + dropout(x), over the last dimension.

    Args:
        x: (..., cols), floating point, any strides (a unit last one saves a copy).
        weight, bias: (cols,) or None.
        eps: added to the variance.
        residual: like x, or None. Where its dtype differs from x's, both are promoted.
        dropout_p: probability of dropping an element of x; the kept ones are scaled by 1/(1-p).
        rng: int64 (2,), (seed, step), on x's device; None draws from torch's generator. See fastlm.ops._random.
        site: number of this call site, so that two dropouts of one step differ.
        return_residual: return (y, h); gradients through h are added.
        backend: "auto", "reference", "cpu", "triton", "cuda".

    Returns y, like x (float32 under CUDA autocast, as F.layer_norm); with `return_residual`, (y, h).
    Raises ValueError for a wrong shape, dtype or device, and for a named backend that cannot run.
    """
    return _norm("layer_norm", x, weight, bias, eps, residual, dropout_p, rng, site, return_residual, backend)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng: torch.Tensor | None = None,
    site: int = 0,
    return_residual: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = h / sqrt(mean(h²) + eps) * weight with h = residual + dropout(x). Arguments as of `layer_norm`."""
    return _norm("rms_norm", x, weight, None, eps, residual, dropout_p, rng, site, return_residual, backend)
