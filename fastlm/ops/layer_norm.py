"""layer_norm and rms_norm, each in one pass with the dropout and the residual addition before it.

    h = residual + dropout(x)
    layer_norm:  y = (h - mean(h)) * rstd * weight + bias,   rstd = 1 / sqrt(mean((h - mean(h))^2) + eps)
    rms_norm:    y = h * rstd * weight,                      rstd = 1 / sqrt(mean(h^2) + eps)

over the last dimension, statistics in float32. h is rounded to its dtype first, so y is the norm of the returned h.

Backward, with x̂ = (h - mean) rstd and g = dy * weight:
    dh = rstd (g - mean(g) - x̂ mean(g x̂)) + (gradient of the returned h);   rms_norm has no mean(g)
    dresidual = dh;   dx = dropout mask * dh;   dweight = Σ dy x̂;   dbias = Σ dy;   dx_bias = Σ dx
Saved: h (x if there is neither residual nor dropout), rstd, (rows,) float32, and mean, (2, rows) float32: the rounded
mean m, and the offset o = mean((h - m) rstd), what its rounding lost. Both passes take x̂ = (h - m) rstd - o. At a mean
of 100, m alone is wrong by up to 4e-6 or, for a row with a standard deviation of 1e-3, y by 4e-3.

Sources: Ba, Kiros, Hinton 2016 (arXiv:1607.06450); Zhang, Sennrich 2019 (arXiv:1910.07467).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastlm import philox
from fastlm.ops import _checks, _random, _registry
from fastlm.ops._autocast import autocast

__all__ = ["layer_norm", "layer_norm_reference", "rms_norm", "rms_norm_reference"]


def normalize(h, weight, bias, eps):
    """F.layer_norm of h over its last dimension, in h's dtype, for parameters of any floating-point dtype.

    F.layer_norm takes parameters of h's dtype, and on the CPU also float32 ones for a low-precision h. For any others
    the norm is computed in h's dtype or float32, whichever is wider, and rounded once.
    """
    dtypes, shape = {p.dtype for p in (weight, bias) if p is not None}, h.shape[-1:]
    wide = torch.promote_types(h.dtype, torch.float32)
    if dtypes <= {h.dtype} or (dtypes == {wide} and h.device.type == "cpu"):
        return F.layer_norm(h, shape, weight, bias, eps)
    weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
    return F.layer_norm(h.to(wide), shape, weight, bias, eps).to(h.dtype)


def _with_gradient_of(x, x_bias):
    """x, which contains x_bias as a constant, with a gradient to it."""
    return x if x_bias is None else x + (x_bias - x_bias.detach()).to(x.dtype)


def layer_norm_reference(
    x, weight=None, bias=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0, x_bias=None
):
    """(y, h) in plain differentiable torch, in the dtype of its inputs. Arguments as of `layer_norm`."""
    h = _random.dropout_rows(_with_gradient_of(x, x_bias), dropout_p, rng, site)
    h = h if residual is None else residual + h
    return normalize(h, weight, bias, eps), h


def rms_norm_reference(x, weight=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
    """(y, h) in plain differentiable torch, in the dtype of its inputs. Arguments as of `rms_norm`."""
    h = _random.dropout_rows(x, dropout_p, rng, site)
    h = h if residual is None else residual + h
    return F.rms_norm(h, h.shape[-1:], weight, eps), h


# ---- the raw ops; rms leaves out the mean


class Args(NamedTuple):
    x: torch.Tensor  # (..., cols)
    residual: torch.Tensor | None  # like x
    weight: torch.Tensor | None  # (cols,)
    bias: torch.Tensor | None  # (cols,)
    x_bias: torch.Tensor | None  # (cols,), in x already; read for its gradient alone
    eps: float
    dropout_p: float
    rng: torch.Tensor | None
    site: int
    rms: bool

    @property
    def keeps_h(self) -> bool:
        """Whether h differs from x, or a gradient through it does, which x_bias has a part in."""
        return self.residual is not None or self.dropout_p > 0.0 or self.x_bias is not None


class Outputs(NamedTuple):
    y: torch.Tensor  # like x
    h: torch.Tensor  # like x; empty unless keeps_h
    mean: torch.Tensor  # (2, rows) float32, means and offsets; empty for rms
    rstd: torch.Tensor  # (rows,) float32


class Saved(NamedTuple):
    h: torch.Tensor
    weight: torch.Tensor | None
    mean: torch.Tensor
    rstd: torch.Tensor
    dropout_p: float
    rng: torch.Tensor | None
    site: int
    rms: bool


class BackwardArgs(NamedTuple):
    dy: torch.Tensor  # like h
    dh: torch.Tensor | None  # like h: the gradient of the returned h
    saved: Saved
    has_bias: bool
    sum_dx: bool


class Gradients(NamedTuple):
    dresidual: torch.Tensor  # like h
    dx: torch.Tensor  # like h; empty without dropout, where it equals dresidual
    dweight: torch.Tensor  # (cols,) in weight's dtype; empty without a weight
    dbias: torch.Tensor  # (cols,) float32; empty without a bias
    sum_dx: torch.Tensor  # (cols,) float32: Σ dx over rows; empty if it is not needed


def empty_forward(args: Args) -> Outputs:
    x = args.x
    rows = x.numel() // x.shape[-1]  # not torch.Size.numel, which fixes a symbolic length
    return Outputs(
        y=torch.empty_like(x, memory_format=torch.contiguous_format),
        h=torch.empty_like(x, memory_format=torch.contiguous_format) if args.keeps_h else x.new_empty(0),
        mean=x.new_empty(0 if args.rms else (2, rows), dtype=torch.float32),
        rstd=x.new_empty(rows, dtype=torch.float32),
    )


def empty_backward(args: BackwardArgs) -> Gradients:
    h, weight, cols = args.saved.h, args.saved.weight, args.saved.h.shape[-1]
    dresidual = torch.empty_like(h, memory_format=torch.contiguous_format)
    return Gradients(
        dresidual=dresidual,
        dx=torch.empty_like(dresidual) if args.saved.dropout_p > 0.0 else h.new_empty(0),
        dweight=h.new_empty(0) if weight is None else weight.new_empty(cols),
        dbias=h.new_empty(cols if args.has_bias else 0, dtype=torch.float32),
        sum_dx=h.new_empty(cols if args.sum_dx else 0, dtype=torch.float32),
    )


def add_rows(args: BackwardArgs, out: Gradients) -> None:
    """Fills sum_dx from dx, for kernels that do not."""
    if args.sum_dx:
        dx = out.dx if args.saved.dropout_p > 0.0 else out.dresidual
        torch.sum(dx.flatten(0, -2) if dx.dim() > 1 else dx[None], 0, dtype=torch.float32, out=out.sum_dx)


def _save(args: Args, outputs) -> Saved:
    _y, h, mean, rstd = outputs
    kept = h if args.keeps_h else args.x
    return Saved(kept, args.weight, mean, rstd, args.dropout_p, args.rng, args.site, args.rms)


def _backward(saved: Saved, needs: Args, backend, dy, dh, _dmean, _drstd):
    if dy is None:  # only h was used
        dy = torch.zeros_like(saved.h)
    args = BackwardArgs(dy, dh, saved, has_bias=needs.bias, sum_dx=needs.x_bias)
    dresidual, dx, dweight, dbias, sum_dx = _registry.call("layer_norm_bwd", args, backend)
    return {
        "x": dx if saved.dropout_p > 0.0 else dresidual,
        "residual": dresidual if needs.residual else None,
        "weight": dweight if needs.weight else None,
        "bias": dbias if needs.bias else None,  # autograd casts it to bias's dtype
        "x_bias": sum_dx if needs.x_bias else None,
    }


_registry.page(__name__, "layer_norm", autocast={"cuda": "float32"})
# torch put rms_norm on autocast's list in 2.12.
_registry.page(__name__, "rms_norm", autocast={"cuda": "float32"} if torch.__version__ >= (2, 12) else None)
_registry.define("layer_norm_fwd", Args, empty_forward)
_registry.define("layer_norm_bwd", BackwardArgs, empty_backward)
_registry.differentiable("layer_norm_fwd", _save, _backward, constant=("mean", "rstd"))


# ---- public


def _norm(op, x, weight, bias, eps, residual, dropout_p, rng, site, return_residual, backend, x_bias=None):
    _checks.is_float("x", x)
    device, cols = x.device, x.shape[-1:]
    if not cols or cols[0] == 0:
        raise ValueError(f"x: expected at least one dimension, the last not empty, got shape {tuple(x.shape)}")
    if weight is not None:
        _checks.is_float("weight", weight, device=device, shape=cols)
    if bias is not None:
        _checks.is_float("bias", bias, device=device, shape=cols)
    if x_bias is not None:
        _checks.is_float("x_bias", x_bias, device=device, shape=cols)
    if residual is not None:
        _checks.is_float("residual", residual, device=device, shape=x.shape)
    _checks.probability("dropout_p", dropout_p)
    _checks.is_rng(rng, site, device)

    if bias is not None and weight is None:  # the kernels do not support this
        weight = torch.ones_like(bias)
    if dropout_p and philox.threshold(dropout_p) == 0:  # p < 2^-32 drops nothing
        dropout_p = 0.0
    x, weight, bias, residual = autocast(op, x, weight, bias, residual)
    if residual is not None and residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    backend = _registry.choose(op, backend, x, dropout=dropout_p > 0.0, weight=weight, bias=bias)
    rng = _random.draw_rng(rng, dropout_p, device)
    if backend == "reference":
        arguments = {"eps": eps, "residual": residual, "dropout_p": dropout_p, "rng": rng, "site": site}
        if op == "rms_norm":
            y, h = rms_norm_reference(x, weight, **arguments)
        else:
            y, h = layer_norm_reference(x, weight, bias, x_bias=x_bias, **arguments)
    else:
        args = Args(x, residual, weight, bias, x_bias, eps, dropout_p, rng, site, rms=op == "rms_norm")
        if backend == "apex":
            args = args._replace(x=_with_gradient_of(x, x_bias))
            y, h = _registry.column("layer_norm", backend).layer_norm(args)
            return (y, h) if return_residual else y
        y, h, _, _ = _registry.call("layer_norm_fwd", args, backend)
        h = (
            x if residual is None and x_bias is None and not dropout_p else h
        )  # Dynamo of torch 2.10 reads no property of a NamedTuple
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
    x_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = LN(h) * weight + bias with h = residual + dropout(x), over the last dimension.

    Args:
        x: (..., cols), floating point, any strides (a unit last one saves a copy).
        weight, bias: (cols,) or None. Any floating-point dtype: they do not promote x, and each gradient has the dtype
            of its parameter.
        eps: added to the variance.
        residual: like x, or None. If its dtype differs from x's, both are promoted.
        dropout_p: probability of dropping an element of x; the kept ones are scaled by 1/(1-p).
        rng: int64 (2,), (seed, step), on x's device; None draws from torch's generator. See fastlm.ops._random.
        site: number of this call site; it makes the dropouts of one step differ.
        return_residual: return (y, h); a gradient through h is included.
        x_bias: (cols,), or None: the bias of the linear layer that made x, where that layer added it as a constant. It
            is in x already, and y does not depend on it again; its gradient, Σ dx over the rows, is summed where
            backward computes dx, in place of another pass over it (`fastlm.nn.linear.linear`, `constant_bias`).
        backend: "auto", "reference", "cpu", "triton", "cuda", "apex" (if installed; no dropout).

    Returns y, like x (float32 under CUDA autocast, as F.layer_norm); with `return_residual`, (y, h).
    Raises ValueError for a wrong shape, dtype or device, and for a named backend that cannot run.
    """
    return _norm("layer_norm", x, weight, bias, eps, residual, dropout_p, rng, site, return_residual, backend, x_bias)


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
