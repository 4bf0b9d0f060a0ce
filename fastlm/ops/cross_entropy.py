"""cross_entropy: softmax cross-entropy with class indices, its loss and its gradient in one pass over the logits.

For a row x (V,) with target t, class weights w (1 without), label smoothing ε, and lse = log Σ_c exp(x_c):

    loss = (1 - ε) w_t (lse - x_t) + ε/V Σ_c w_c (lse - x_c) + z_loss lse²
    dx_j = (a + 2 z_loss lse) exp(x_j - lse) - (1 - ε) w_t [j = t] - ε/V w_j,    a = (1 - ε) w_t + ε/V Σ_c w_c

With a softcap c, x is c tanh(logits/c), and d(logits)_j = dx_j (1 - (x_j/c)²).

A row whose target is ignore_index has loss 0 and gradient 0. "sum" adds the rows; "mean" divides that sum, the z term
included, by Σ w_t over the rows that are not ignored (their number without weights). As in torch, it is NaN if all rows
are ignored. Everything is computed in float32 and rounded once.

The denominator depends only on the targets, so the forward can compute the gradient up to the factor dloss. It writes
the gradient in the pass that reads the logits; backward multiplies it by dloss. In float16 that gradient would be
rounded before dloss, the loss scale, is applied: a probability below 2^-25 times the denominator would become 0. There
the forward saves the logits, and backward computes the gradient from them ("late"). Backward then reads the logits and
writes the gradient; otherwise it reads and writes the gradient, where dloss is not 1.

The forward can also return z_loss lse², and whether the target has the greatest logit, from the same pass.

Sources: Szegedy et al. 2016 (arXiv:1512.00567) for ε; Chowdhery et al. 2022 (arXiv:2204.02311, PaLM) for z_loss;
Gemma Team 2024 (arXiv:2408.00118, Gemma 2) for the softcap; Milakov, Gimelshein 2018 (arXiv:1805.02867) for the running
maximum.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastlm.ops import _checks, _registry
from fastlm.ops._autocast import autocast_dtype
from fastlm.ops._cross_entropy_auto import PREFER
from fastlm.ops._labels import IGNORE_INDEX

__all__ = ["CrossEntropyOutput", "cross_entropy", "cross_entropy_reference"]

REDUCTIONS = ("none", "mean", "sum")


class CrossEntropyOutput(NamedTuple):
    """What cross_entropy and linear_cross_entropy return where z loss or accuracy are asked for; None: not asked for.

    For reduction "none" each has target's shape, else it is a scalar. Gradients flow through `loss` alone.
    """

    loss: torch.Tensor  # with the z loss
    z_loss: torch.Tensor | None  # the part of `loss` that is z_loss·lse², reduced as the loss, in its dtype
    # float32. 1 for a row whose target is the first of the greatest logits (torch.argmax), before a softcap; 0 for
    # another row, and for an ignored one. "mean" and "sum": the mean over the rows that are not ignored, unweighted.
    token_accuracy: torch.Tensor | None


def outside(target: torch.Tensor, vocabulary: int, ignore_index: int) -> torch.Tensor:
    """bool, True for each target that is neither a class nor ignore_index."""
    return ((target < 0) | (target >= vocabulary)) & (target != ignore_index)


def _accuracy(x, t, keep, reduction):
    """token_accuracy of the logits x (n, V); keep (n,): the rows that are not ignored."""
    right = keep & (x.argmax(-1) == t)
    right = right & ~x.gather(-1, t.masked_fill(~keep, 0)[:, None])[:, 0].isnan()
    return right.float() if reduction == "none" else right.sum() / keep.sum()


def cross_entropy_reference(
    logits,
    target,
    *,
    weight=None,
    ignore_index=IGNORE_INDEX,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    reduction="mean",
    return_z_loss=False,
    return_token_accuracy=False,
):
    """The loss in plain differentiable torch, in the dtype of the logits. Arguments as of `cross_entropy`."""
    vocabulary = logits.shape[-1]
    raw, t = logits.reshape(-1, vocabulary), target.reshape(-1)
    x = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    weight = None if weight is None else weight.to(x.dtype)
    bad = outside(t, vocabulary, ignore_index)
    t = t.masked_fill(bad, 0)
    loss = F.cross_entropy(
        x, t, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )
    keep, z, accuracy = t != ignore_index, None, None
    if z_loss or return_z_loss:
        z = z_loss * torch.where(keep, torch.logsumexp(x, -1).square(), 0.0)
        if reduction == "mean":
            each = torch.ones_like(z) if weight is None else weight[t.masked_fill(~keep, 0)]
            z = z.sum() / torch.where(keep, each, 0.0).sum()
        z = z.sum() if reduction == "sum" else z
        loss = loss + z
    if return_token_accuracy:
        accuracy = _accuracy(raw, t, keep, reduction)
    bad = bad.reshape(target.shape) if reduction == "none" else bad.any()

    def with_nan(value):
        return value.reshape(bad.shape) * torch.where(bad, torch.nan, 1.0).to(value.dtype)

    if not (return_z_loss or return_token_accuracy):
        return with_nan(loss)
    return CrossEntropyOutput(
        with_nan(loss),
        with_nan(z.detach()) if return_z_loss else None,
        with_nan(accuracy) if return_token_accuracy else None,
    )


# ---- checks shared with linear_cross_entropy


def check_options(device, vocabulary, weight, weight_name, label_smoothing, z_loss, softcap, reduction, ignore_index):
    if weight is not None:
        _checks.is_float(weight_name, weight)
        _checks.is_tensor(weight_name, weight, device=device, shape=(vocabulary,))
        if weight.requires_grad:
            raise ValueError(f"{weight_name}: expected constants, got a tensor that requires a gradient; detach it")
    _checks.probability("label_smoothing", label_smoothing)
    _checks.finite("z_loss", z_loss)
    if softcap is not None:
        _checks.softcap(softcap, "None")
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


# ---- the raw ops. The loss is float32. With figures it is three tensors in one: loss, z loss and accuracy.


class LossArgs(NamedTuple):
    """The arguments that cross_entropy and linear_cross_entropy share."""

    target: torch.Tensor  # (...) int64
    class_weight: torch.Tensor | None  # (V,)
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none
    reduction: str
    figures: bool  # whether the z loss and the accuracy are needed


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


class GradientArgs(NamedTuple):
    dloss: torch.Tensor  # a scalar, for "none" like target
    logits: torch.Tensor  # cross_entropy_gradient_ overwrites them with the gradient
    loss: LossArgs


class ScaleArgs(NamedTuple):
    dlogits: torch.Tensor  # (..., V)
    dloss: torch.Tensor  # a scalar or (...)


class Saved(NamedTuple):
    dlogits: torch.Tensor | None
    logits: torch.Tensor | None  # instead of dlogits where the gradient is late
    loss: LossArgs  # with its tensors where the gradient is late


# `loss` of a Saved that has dlogits, by `figures`.
_SCALED = tuple(LossArgs(None, None, 0, 0.0, 0.0, 0.0, "", figures) for figures in (False, True))


def is_late(dtype: torch.dtype) -> bool:
    """Whether backward computes the gradient, since it would lose too much if it were rounded before dloss."""
    return dtype == torch.float16


def empty_loss(args: LossArgs) -> torch.Tensor:
    shape = args.target.shape if args.reduction == "none" else ()
    return args.target.new_empty((3, *shape) if args.figures else shape, dtype=torch.float32)


def empty_dlogits(args: Args) -> torch.Tensor:
    x = args.logits
    return torch.empty_like(x, memory_format=torch.contiguous_format) if args.needs_dlogits else x.new_empty(0)


def empty_forward(args: Args) -> Outputs:
    return Outputs(empty_loss(args.loss), empty_dlogits(args))


def empty_inplace(args: InplaceArgs) -> torch.Tensor:
    return empty_loss(args.loss)


def empty_scaled(args: ScaleArgs) -> torch.Tensor:
    return torch.empty_like(args.dlogits, memory_format=torch.contiguous_format)


def empty_gradient(args: GradientArgs) -> torch.Tensor:
    return torch.empty_like(args.logits, memory_format=torch.contiguous_format)


def _nothing(args) -> None:
    return None


def _allocates() -> bool:
    """Whether a backward must leave alone what was saved: for a compiler, or since the graph is kept for another."""
    return torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()


def scale(gradient: torch.Tensor, dloss: torch.Tensor, backend: str) -> torch.Tensor:
    """gradient * dloss, in place unless the graph is kept for another backward."""
    if _allocates():
        return _registry.call("cross_entropy_bwd", ScaleArgs(gradient, dloss), backend)
    torch.ops.fastlm.cross_entropy_bwd_(gradient, dloss, backend)
    return gradient


def _save(args: Args, outputs) -> Saved:
    if args.needs_dlogits:
        return Saved(outputs[1], None, _SCALED[args.loss.figures])
    return Saved(None, args.logits, args.loss)


def _save_inplace(args: InplaceArgs, loss) -> Saved:
    logits = args.logits.detach()  # shares the logits' version counter, so autograd notices a later write
    if is_late(logits.dtype):
        return Saved(None, logits, args.loss)
    return Saved(logits, None, _SCALED[args.loss.figures])


def _backward(saved: Saved, needs, backend, dloss, _ddlogits=None, inplace=False):
    if saved.loss.figures:
        dloss = dloss[0]
    if saved.dlogits is not None:
        return {"logits": scale(saved.dlogits, dloss, backend)}
    args = GradientArgs(dloss, saved.logits, saved.loss)
    if inplace and not _allocates():
        torch.ops.fastlm.cross_entropy_gradient_(dloss, saved.logits, *saved.loss, backend)
        return {"logits": saved.logits}
    return {"logits": _registry.call("cross_entropy_gradient", args, backend)}


_registry.page(__name__, "cross_entropy", prefer=PREFER, autocast={"cuda": "float32", "cpu": "float32"})
_registry.define("cross_entropy_fwd", Args, empty_forward)
_registry.define("cross_entropy_fwd_", InplaceArgs, empty_inplace, writes=("logits",))
_registry.define("cross_entropy_gradient", GradientArgs, empty_gradient)
_registry.define("cross_entropy_gradient_", GradientArgs, _nothing, writes=("logits",))
_registry.define("cross_entropy_bwd", ScaleArgs, empty_scaled)
_registry.define("cross_entropy_bwd_", ScaleArgs, _nothing, writes=("dlogits",))
_registry.differentiable("cross_entropy_fwd", _save, _backward, constant=("dlogits",))
_registry.differentiable("cross_entropy_fwd_", _save_inplace, functools.partial(_backward, inplace=True))


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


def outputs_of(loss: torch.Tensor, dtype: torch.dtype, z_loss: bool, accuracy: bool):
    """What a public function returns for a raw op's `loss`. z_loss, accuracy: whether they are asked for."""
    if not (z_loss or accuracy):
        return loss.to(dtype)
    figures = loss.detach()
    return CrossEntropyOutput(
        loss[0].to(dtype), figures[1].to(dtype) if z_loss else None, figures[2] if accuracy else None
    )


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    backend: str = "auto",
) -> torch.Tensor | CrossEntropyOutput:
    """Cross-entropy of logits (..., V) with class indices: F.cross_entropy with the classes last, plus z_loss·lse².

    Args:
        logits: (..., V), floating point, V ≥ 1. The classes are the last dimension. torch has the same layout for
            (N, V) and (V,); with more dimensions its classes are the second.
        target: int64 (...), class indices in [0, V), or ignore_index for a row without loss and gradient.
        weight: (V,) floating point or None, a factor for each class; it gets no gradient.
        ignore_index: any integer; if it is a class, that class is ignored.
        label_smoothing: ε in [0, 1], see fastlm.ops.cross_entropy.
        z_loss: factor of lse² per row that is not ignored; "mean" divides it by the same denominator as the loss.
        softcap: c > 0, the loss is of c·tanh(logits / c), as in Gemma 2; None: of the logits.
        reduction: "none", "mean" (over Σ w_t of the rows that are not ignored; NaN where there are none), "sum".
        inplace: if a gradient is needed, overwrite the logits with it; backward scales it in place. In float16 backward
            overwrites them. For contiguous logits no memory of their size is allocated. Nothing else may use the
            logits: the backward of another op that has saved them, or uses them later, raises. The reference does not
            overwrite them.
        return_z_loss, return_token_accuracy: also return the z loss, or the share of the targets that have the greatest
            logit, without another pass over the logits. The result is then a CrossEntropyOutput.
        backend: "auto", "reference", "cpu", "triton", "cuda".

    Returns the loss, of target's shape for "none", else a scalar. It has the dtype of the logits, or float32 for
    bfloat16 and float16 under autocast, as F.cross_entropy. The gradient is computed in float32, in the dtype of the
    logits. In float16 backward computes it, and rounds it once, after dloss (with a loss scale) is applied.
    Raises ValueError for a wrong shape, dtype or device, for a named backend that cannot run, and, on the CPU, for a
    target outside the vocabulary, before anything is written. On a device this check would stall. There the loss of
    such a row (so the mean and the sum), its z loss and accuracy, and its gradient are NaN.
    """
    _checks.is_float("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected (..., V) with V ≥ 1, got shape {tuple(logits.shape)}")
    check_target(target, logits.device, logits.shape[:-1])
    classes = logits.device, logits.shape[-1], weight, "weight"
    check_options(*classes, label_smoothing, z_loss, softcap, reduction, ignore_index)
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
    figures = return_z_loss or return_token_accuracy
    backend = _registry.choose("cross_entropy", backend, logits, softcap=softcap is not None, figures=figures)
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
            softcap=softcap,
            reduction=reduction,
            return_z_loss=return_z_loss,
            return_token_accuracy=return_token_accuracy,
        )
    args = LossArgs(target, weight, ignore_index, label_smoothing, z_loss, softcap or 0.0, reduction, figures)
    if overwrites:
        loss = torch.ops.fastlm.cross_entropy_fwd_(logits, *args, backend)
        if not compiling:
            with torch.autograd._unsafe_preserve_version_counter(logits):
                _Overwritten.apply(logits)
    else:
        early = needs_grad and not is_late(logits.dtype)
        loss, _ = _registry.call("cross_entropy_fwd", Args(logits, args, early), backend)
    return outputs_of(loss, dtype, return_z_loss, return_token_accuracy)
