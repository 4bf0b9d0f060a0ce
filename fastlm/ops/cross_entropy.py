"""cross_entropy: softmax cross-entropy with class indices, its loss and its gradient in one pass over the logits.

For a row x (V,) with target t, class weights w (1 without), label smoothing ε, and lse = log Σ_c exp(x_c):

    loss = (1 - ε) w_t (lse - x_t) + ε/V Σ_c w_c (lse - x_c) + z_loss lse²
    dx_j = (a + 2 z_loss lse) exp(x_j - lse) - (1 - ε) w_t [j = t] - ε/V w_j,    a = (1 - ε) w_t + ε/V Σ_c w_c

A row whose target is ignore_index has loss 0 and gradient 0. "sum" adds the rows; "mean" divides that sum, the z term
included, by Σ w_t over the rows that are not ignored (their number without weights). As in torch, it is NaN if all rows
are ignored. Everything is computed in float32 and rounded once.

The denominator depends only on the targets, so the forward can compute the gradient up to the factor dloss. It writes
the gradient in the pass that reads the logits; backward multiplies it by dloss.

Sources: Szegedy et al. 2016 (arXiv:1512.00567) for ε; Chowdhery et al. 2022 (arXiv:2204.02311, PaLM) for z_loss;
Milakov, Gimelshein 2018 (arXiv:1805.02867) for the running maximum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastlm.ops import _checks, _registry
from fastlm.ops._autocast import autocast_dtype
from fastlm.ops._labels import IGNORE_INDEX

__all__ = ["cross_entropy", "cross_entropy_reference"]

REDUCTIONS = ("none", "mean", "sum")


def outside(target: torch.Tensor, vocabulary: int, ignore_index: int) -> torch.Tensor:
    """bool, True for each target that is neither a class nor ignore_index."""
    return ((target < 0) | (target >= vocabulary)) & (target != ignore_index)


def cross_entropy_reference(
    logits, target, *, weight=None, ignore_index=IGNORE_INDEX, label_smoothing=0.0, z_loss=0.0, reduction="mean"
):
    """The loss in plain differentiable torch, in the dtype of the logits. Arguments as of `cross_entropy`."""
    vocabulary = logits.shape[-1]
    x, t = logits.reshape(-1, vocabulary), target.reshape(-1)
    weight = None if weight is None else weight.to(x.dtype)
    bad = outside(t, vocabulary, ignore_index)
    t = t.masked_fill(bad, 0)
    loss = F.cross_entropy(
        x, t, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )
    if z_loss:
        keep = t != ignore_index
        z = z_loss * torch.where(keep, torch.logsumexp(x, -1).square(), 0.0)
        if reduction == "mean":
            each = torch.ones_like(z) if weight is None else weight[t.masked_fill(~keep, 0)]
            z = z.sum() / torch.where(keep, each, 0.0).sum()
        loss = loss + (z.sum() if reduction == "sum" else z)
    bad = bad.reshape(target.shape) if reduction == "none" else bad.any()
    return loss.reshape(bad.shape) * torch.where(bad, torch.nan, 1.0).to(loss.dtype)


# ---- checks shared with linear_cross_entropy


def check_options(device, vocabulary, weight, weight_name, label_smoothing, reduction, ignore_index):
    if weight is not None:
        _checks.is_float(weight_name, weight)
        _checks.is_tensor(weight_name, weight, device=device, shape=(vocabulary,))
        if weight.requires_grad:
            raise ValueError(f"{weight_name}: expected constants, got a tensor that requires a gradient; detach it")
    _checks.probability("label_smoothing", label_smoothing)
    _checks.one_of("reduction", reduction, REDUCTIONS)
    if not isinstance(ignore_index, int) or not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an integer of 64 bits, got {ignore_index!r}")


def check_target(target, device, shape):
    if isinstance(target, torch.Tensor) and target.dtype.is_floating_point:
        raise ValueError(
            f"target: expected class indices in torch.int64, got {target.dtype}; "
            "for class probabilities use torch.nn.functional.cross_entropy"
        )
    _checks.is_tensor("target", target, device=device, dtypes=(torch.int64,), shape=shape)


def raise_outside(row: int, value: int, vocabulary: int, ignore_index: int) -> None:
    raise ValueError(
        f"target: expected class indices in [0, {vocabulary}), the vocabulary, or ignore_index={ignore_index}; "
        f"got {value} at position {row} of the flattened target"
    )


def check_labels(target: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    """ValueError for a label outside the vocabulary, if checking needs no synchronisation."""
    if _checks.readable(target):
        bad = outside(target.reshape(-1), vocabulary, ignore_index)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise_outside(row, int(target.reshape(-1)[row]), vocabulary, ignore_index)


# ---- the raw ops. The loss is float32.


class LossArgs(NamedTuple):
    """The arguments that cross_entropy and linear_cross_entropy share."""

    target: torch.Tensor  # (...) int64
    class_weight: torch.Tensor | None  # (V,)
    ignore_index: int
    label_smoothing: float
    z_loss: float
    reduction: str


class Args(NamedTuple):
    logits: torch.Tensor  # (..., V)
    loss: LossArgs
    needs_dlogits: bool


class Outputs(NamedTuple):
    loss: torch.Tensor  # (), for "none" like target
    dlogits: torch.Tensor  # d(loss)/d(logits), per row for "none"; empty where it is not needed


class InplaceArgs(NamedTuple):
    logits: torch.Tensor  # overwritten with dlogits
    loss: LossArgs


class ScaleArgs(NamedTuple):
    dlogits: torch.Tensor  # (..., V)
    dloss: torch.Tensor  # a scalar or (...)


class Saved(NamedTuple):
    dlogits: torch.Tensor


def empty_loss(args: LossArgs) -> torch.Tensor:
    return args.target.new_empty(args.target.shape if args.reduction == "none" else (), dtype=torch.float32)


def empty_dlogits(args: Args) -> torch.Tensor:
    x = args.logits
    return torch.empty_like(x, memory_format=torch.contiguous_format) if args.needs_dlogits else x.new_empty(0)


def empty_forward(args: Args) -> Outputs:
    return Outputs(empty_loss(args.loss), empty_dlogits(args))


def empty_inplace(args: InplaceArgs) -> torch.Tensor:
    return empty_loss(args.loss)


def empty_scaled(args: ScaleArgs) -> torch.Tensor:
    return torch.empty_like(args.dlogits, memory_format=torch.contiguous_format)


def _nothing(args: ScaleArgs) -> None:
    return None


def scale(gradient: torch.Tensor, dloss: torch.Tensor, backend: str) -> torch.Tensor:
    """gradient * dloss, in place unless the graph is kept for another backward."""
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return _registry.call("cross_entropy_bwd", ScaleArgs(gradient, dloss), backend)
    torch.ops.fastlm.cross_entropy_bwd_(gradient, dloss, backend)
    return gradient


def _save(args: Args, outputs) -> Saved:
    _loss, dlogits = outputs
    if not args.needs_dlogits:
        raise ValueError("needs_dlogits: expected True, since the logits require a gradient, got False")
    return Saved(dlogits)


def _save_inplace(args: InplaceArgs, loss) -> Saved:
    return Saved(args.logits.detach())  # shares the logits' version counter, so autograd notices a later write


def _backward(saved: Saved, needs, backend, dloss, _ddlogits=None):
    return {"logits": scale(saved.dlogits, dloss, backend)}


_registry.page(__name__, "cross_entropy", autocast={"cuda": "float32", "cpu": "float32"})
_registry.define("cross_entropy_fwd", Args, empty_forward)
_registry.define("cross_entropy_fwd_", InplaceArgs, empty_inplace, writes=("logits",))
_registry.define("cross_entropy_bwd", ScaleArgs, empty_scaled)
_registry.define("cross_entropy_bwd_", ScaleArgs, _nothing, writes=("dlogits",))
_registry.differentiable("cross_entropy_fwd", _save, _backward, constant=("dlogits",))
_registry.differentiable("cross_entropy_fwd_", _save_inplace, _backward)


class _Overwritten(torch.autograd.Function):
    """Marks the overwritten logits as a tensor that cannot be differentiated through."""

    @staticmethod
    def forward(ctx, logits):
        ctx.mark_dirty(logits)
        return logits

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "cross_entropy(inplace=True) has overwritten its logits with their gradient, and they were used again; "
            "use them before the loss, in a way that saves no logits, or use inplace=False"
        )


# ---- public


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Cross-entropy of logits (..., V) with class indices: F.cross_entropy with the classes last, plus z_loss·lse².

    Args:
        logits: (..., V), floating point, V ≥ 1. The classes are the last dimension. torch has the same layout for
            (N, V) and (V,); with more dimensions its classes are the second.
        target: int64 (...), class indices in [0, V), or ignore_index for a row without loss and gradient.
        weight: (V,) floating point or None, a factor for each class; it gets no gradient.
        ignore_index: any integer; if it is a class, that class is ignored.
        label_smoothing: ε in [0, 1], see fastlm.ops.cross_entropy.
        z_loss: factor of lse² per row that is not ignored; "mean" divides it by the same denominator as the loss.
        reduction: "none", "mean" (over Σ w_t of the rows that are not ignored; NaN where there are none), "sum".
        inplace: if a gradient is needed, overwrite the logits with it; backward scales it in place. For contiguous
            logits no memory of their size is allocated. Nothing else may use the logits: the backward of another op
            that has saved them, or uses them later, raises. The reference does not overwrite them.
        backend: "auto", "reference", "cpu", "triton", "cuda".

    Returns the loss, of target's shape for "none", else a scalar. It has the dtype of the logits, or float32 for
    bfloat16 and float16 under autocast, as F.cross_entropy. The gradient is computed in float32, in the dtype of the
    logits. Raises ValueError for a wrong shape, dtype or device, for a named backend that cannot run, and, on the CPU,
    for a target outside the vocabulary, before anything is written. On a device this check would stall. There the loss
    of such a row (so the mean and the sum) and its gradient are NaN.
    """
    _checks.is_float("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected (..., V) with V ≥ 1, got shape {tuple(logits.shape)}")
    check_target(target, logits.device, logits.shape[:-1])
    check_options(logits.device, logits.shape[-1], weight, "weight", label_smoothing, reduction, ignore_index)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    overwrites = inplace and needs_grad
    compiling = torch.compiler.is_compiling()
    if overwrites and not compiling and (logits if logits._base is None else logits._base).is_leaf:
        raise ValueError(
            "inplace: expected logits that another op computed, got a leaf that requires a gradient, or a view of one; "
            "use inplace=False"
        )
    if overwrites and any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride())):
        raise ValueError(
            f"inplace: expected logits whose elements have a place each, got strides {logits.stride()} for shape "
            f"{tuple(logits.shape)}; use inplace=False"
        )
    backend = _registry.choose("cross_entropy", backend, logits)
    dtype = autocast_dtype("cross_entropy", logits)
    if backend == "reference":
        check_labels(target, logits.shape[-1], ignore_index)
        return cross_entropy_reference(
            logits.to(dtype),
            target,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction=reduction,
        )
    args = LossArgs(target, weight, ignore_index, label_smoothing, z_loss, reduction)
    if overwrites:
        loss = torch.ops.fastlm.cross_entropy_fwd_(logits, *args, backend)
        if not compiling:
            with torch.autograd._unsafe_preserve_version_counter(logits):
                _Overwritten.apply(logits)
    else:
        loss, _ = _registry.call("cross_entropy_fwd", Args(logits, args, needs_grad), backend)
    return loss.to(dtype)
