"""linear_cross_entropy: cross_entropy(hidden @ weightᵀ + bias, target), without all logits in memory at once.

The rows of hidden (N, D) are processed in chunks. The BLAS computes the logits (rows, V) of a chunk into a buffer that
all chunks reuse. cross_entropy of fastlm turns them into loss and gradient in place. The maths of a row is in
fastlm/ops/cross_entropy.py. With G = dlogits,

    dhidden = G weight,   dweight = Gᵀ hidden,   dbias = Σ_rows G

For "mean" and "sum" the forward computes the needed gradients together with each chunk's logits, and backward
multiplies them by dloss: three matrix products a step, as without chunks. For "none", dloss differs from row to row.
In float16, dloss with the loss scale has to be applied before the gradients are rounded (see cross_entropy). In both
cases the forward saves only its inputs, and backward computes the logits again, a fourth product ("late").

All chunks have the same size. On a CPU a chunk has half of the rows, or a quarter in bfloat16, but at most 512, and at
least 256 if there are that many. In bfloat16 up to 2 D rows more are one chunk: without a float32 sum of its gradient,
the weight then takes less memory, and 1020 rows of GPT-2's head 315 ms in place of 509 (one core with AMX). Smaller
chunks cost time, since each chunk packs the weight for the BLAS twice, and reads and writes the whole weight gradient.
1024 rows of BERT's head in 1, 2, 4 and 16 chunks take 480, 500, 541 and
792 ms in float32, and 304, 283, 311 and 517 ms in bfloat16 (two Sapphire Rapids cores).

On a GPU a chunk has a quarter of the rows, at most 4096 and at least 1024, in multiples of 128. At 600 TFLOP/s and
3 TB/s, reading and writing the weight gradient in float32 takes the time of the products of 267 rows: a quarter of a
chunk of 1024 and 7% of one of 4096. If the bytes of a row of classes are not a multiple of 16 (30522, 50257), a copy of
the weight (V D elements) is padded with rows of zeros, since the BLAS is slow for such shapes. A chunk's logits are
contiguous, so torch has cuBLASLt add the bias in the product. The bias's gradient is a pass over G of its own, 2 of the
12 bytes that an element of the logits moves. In a kernel over rows its sums (122 KB for BERT) would have no place.

The weight gradient is summed over the chunks in float32. On a GPU the matrix product adds to it. On the CPU, torch has
no product of bfloat16 matrices with a float32 result: the product of a chunk, a few classes at a time, is bfloat16, and
is added while it is in the cache. Under autocast the gradient of a float32 weight is that sum, not rounded to bfloat16.

Sources: Hsu et al. 2024 (arXiv:2410.10989, Liger Kernel) for gradients in the forward, chunk by chunk;
Wijmans et al. 2024 (arXiv:2411.09009) for the memory that logits take.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastlm.ops import _checks, _registry
from fastlm.ops._autocast import autocast, autocast_dtype
from fastlm.ops._labels import IGNORE_INDEX
from fastlm.ops._low_weights import low_copy
from fastlm.ops.cross_entropy import (
    CrossEntropyOutput,
    LossArgs,
    check_labels,
    check_options,
    check_target,
    cross_entropy_reference,
    empty_loss,
    is_late,
    outputs_of,
    scale,
)

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]


def linear_cross_entropy_reference(
    hidden,
    weight,
    target,
    bias=None,
    *,
    class_weight=None,
    ignore_index=IGNORE_INDEX,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    reduction="mean",
    return_z_loss=False,
    return_token_accuracy=False,
    dtype=None,
):
    """The loss in plain differentiable torch; the logits exist. dtype: of the loss, hidden's by default."""
    logits = F.linear(hidden, weight, bias)
    return cross_entropy_reference(
        logits if dtype is None else logits.to(dtype),
        target,
        weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
        return_z_loss=return_z_loss,
        return_token_accuracy=return_token_accuracy,
    )


# ---- the raw ops. The loss is float32; an output that is not needed is empty.


class Inputs(NamedTuple):
    hidden: torch.Tensor  # (..., D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    loss: LossArgs
    low: torch.Tensor | None = None  # weight in hidden's dtype, where its own is float32, which dweight then has


class Wanted(NamedTuple):
    """Which gradients are needed; the others are empty."""

    dhidden: bool
    dweight: bool
    dbias: bool


class Args(NamedTuple):
    inputs: Inputs
    wanted: Wanted  # nothing where the gradients are late: linear_cross_entropy_bwd computes them


class Outputs(NamedTuple):
    loss: torch.Tensor
    dhidden: torch.Tensor
    dweight: torch.Tensor
    dbias: torch.Tensor


class BackwardArgs(NamedTuple):
    dloss: torch.Tensor  # a scalar, for "none" like target
    inputs: Inputs
    wanted: Wanted


class Gradients(NamedTuple):
    dhidden: torch.Tensor
    dweight: torch.Tensor
    dbias: torch.Tensor


class Saved(NamedTuple):
    inputs: Inputs  # with tensors where the gradients are late
    gradients: Gradients  # for the others
    wanted: Wanted


def _empty_gradients(inputs: Inputs, wanted: Wanted) -> Gradients:
    hidden, weight = inputs.hidden, inputs.weight
    return Gradients(
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if wanted.dhidden else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted.dweight else weight.new_empty(0),
        hidden.new_empty(weight.shape[0] if wanted.dbias else 0),
    )


def empty_forward(args: Args) -> Outputs:
    return Outputs(empty_loss(args.inputs.loss), *_empty_gradients(args.inputs, args.wanted))


def empty_backward(args: BackwardArgs) -> Gradients:
    return _empty_gradients(args.inputs, args.wanted)


def _save(args: Args, outputs) -> Saved:
    inputs, (_loss, *gradients) = args.inputs, outputs
    tensors = inputs.hidden, inputs.weight, inputs.bias
    needed = Wanted(*(t is not None and t.requires_grad for t in tensors))
    if not any(args.wanted):
        return Saved(inputs, Gradients(None, None, None), needed)
    if any(need and not want for need, want in zip(needed, args.wanted)):
        raise ValueError(
            f"wanted: expected {needed}, since hidden, weight or bias requires a gradient, got {args.wanted}"
        )
    no_tensors = Inputs(None, None, None, inputs.loss._replace(target=None, class_weight=None), None)
    return Saved(no_tensors, Gradients(*gradients), args.wanted)


def _backward(saved: Saved, needs: Args, backend, dloss, *_):
    if saved.inputs.loss.figures:
        dloss = dloss[0]
    if saved.inputs.hidden is not None:
        args = BackwardArgs(dloss, saved.inputs, saved.wanted)
        gradients = Gradients(*_registry.call("linear_cross_entropy_bwd", args, backend))
    else:
        pairs = zip(saved.gradients, saved.wanted)
        gradients = Gradients(*(scale(g, dloss, backend) if want else None for g, want in pairs))
    return {
        "hidden": gradients.dhidden if saved.wanted.dhidden else None,
        "weight": gradients.dweight if saved.wanted.dweight else None,
        "bias": gradients.dbias if saved.wanted.dbias else None,
    }


_registry.page(__name__, "linear_cross_entropy", autocast={"cuda": "low", "cpu": "low"})
_registry.define("linear_cross_entropy_fwd", Args, empty_forward)
_registry.define("linear_cross_entropy_bwd", BackwardArgs, empty_backward)
_registry.differentiable("linear_cross_entropy_fwd", _save, _backward, constant=("dhidden", "dweight", "dbias"))


# ---- public


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    backend: str = "auto",
) -> torch.Tensor | CrossEntropyOutput:
    """Cross-entropy of the logits hidden @ weightᵀ + bias, without all logits in memory at once.

    Args:
        hidden: (..., D), floating point.
        weight: (V, D), in hidden's dtype: the output projection, or a tied embedding table.
        target: int64 (...), as of cross_entropy.
        bias: (V,) in hidden's dtype, or None.
        class_weight: (V,) floating point or None; cross_entropy's `weight`.
        ignore_index, label_smoothing, z_loss, softcap, reduction: as of cross_entropy.
        return_z_loss, return_token_accuracy: as of cross_entropy; the result is then a CrossEntropyOutput.
        backend: "auto", "reference" (the logits exist), "cpu", "triton", "cuda".

    The forward computes the gradients, chunk by chunk; backward scales them. For "none" and in float16 backward
    computes them, and the logits a second time: a loss scale is then applied before anything is rounded. Beyond the
    gradients it needs memory for a chunk of logits. On a CPU a chunk has half of the rows (bfloat16: a quarter, and up
    to 2 D more at once), at most 512 and at least 256; on a GPU a quarter of the rows, at most 4096 and at least
    1024. For several chunks in bfloat16 it also needs a float32 copy of the weight gradient.

    Returns the loss, of target's shape for "none", else a scalar. It has hidden's dtype, or float32 for bfloat16 and
    float16 under autocast. Autocast casts hidden, weight and bias as for F.linear.
    Raises ValueError as cross_entropy does, and outside of autocast if hidden, weight and bias differ in dtype.
    On a device, a target outside the vocabulary makes the loss and the gradients NaN.
    """
    _checks.is_float("hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden: expected (..., D) with D ≥ 1, got shape {tuple(hidden.shape)}")
    check_target(target, hidden.device, hidden.shape[:-1])
    hidden_dtype = hidden.dtype
    _checks.is_float("weight", weight)
    _checks.is_tensor("weight", weight, device=hidden.device, shape=(None, hidden.shape[-1]))
    if weight.shape[0] == 0:
        raise ValueError(f"weight: expected (V, D) with V ≥ 1, got shape {tuple(weight.shape)}")
    if bias is not None:
        _checks.is_float("bias", bias)
        _checks.is_tensor("bias", bias, device=hidden.device, shape=weight.shape[:1])
    classes = hidden.device, weight.shape[0], class_weight, "class_weight"
    check_options(*classes, label_smoothing, z_loss, softcap, reduction, ignore_index)
    hidden, bias = autocast("linear_cross_entropy", hidden, bias)
    weight_dtype = autocast_dtype("linear_cross_entropy", weight)
    low = None if weight_dtype == weight.dtype else low_copy(weight, weight_dtype)
    _checks.same_dtype("hidden", hidden_dtype, hidden.dtype, weight=weight if low is None else low, bias=bias)
    backend = _registry.choose("linear_cross_entropy", backend, hidden)
    dtype = autocast_dtype("cross_entropy", hidden)
    if backend == "reference":
        check_labels(target, weight.shape[0], ignore_index)
        return linear_cross_entropy_reference(
            hidden,
            weight.to(weight_dtype),
            target,
            bias,
            class_weight=class_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            reduction=reduction,
            return_z_loss=return_z_loss,
            return_token_accuracy=return_token_accuracy,
            dtype=dtype,
        )
    early = reduction != "none" and torch.is_grad_enabled() and not is_late(hidden.dtype)
    wanted = Wanted(*(early and t is not None and t.requires_grad for t in (hidden, weight, bias)))
    figures = return_z_loss or return_token_accuracy
    loss_args = LossArgs(
        target, class_weight, ignore_index, label_smoothing, z_loss, softcap or 0.0, reduction, figures
    )
    args = Args(Inputs(hidden, weight, bias, loss_args, low), wanted)
    loss = _registry.call("linear_cross_entropy_fwd", args, backend)[0]
    return outputs_of(loss, dtype, return_z_loss, return_token_accuracy)
