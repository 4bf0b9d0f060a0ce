"""linear_cross_entropy: cross_entropy(hidden @ weightᵀ + bias, target) whose logits never exist as a whole.

The rows of hidden (N, D) are taken in chunks. A chunk's logits (rows, V) are a matrix product of the platform's BLAS
into one buffer that every chunk reuses; fastlm's cross_entropy turns them into loss and gradient in place. The maths
of a row stand in fastlm/ops/cross_entropy.py; with G = dlogits,

    dhidden = G weight,   dweight = Gᵀ hidden,   dbias = Σ_rows G

For "mean" and "sum" the forward computes these, where they are needed, while a chunk's logits are at hand, and
backward multiplies them by dloss: three matrix products for a step, as without chunks. For "none", dloss differs from
row to row: the forward keeps nothing but its inputs, and backward computes the logits again, a fourth product.

Chunks are of equal size: on a CPU half of the rows, in bfloat16 a quarter, but at most 512, and no fewer than 256 where
there are as many. Fewer rows a chunk cost time, since each chunk packs the weight for the BLAS twice, and reads and
writes the whole weight gradient: 1024 rows of BERT's head take, in one chunk, in two of 512, in four, in sixteen, 480,
500, 541 and 792 ms in float32, and 304, 283, 311 and 517 in bfloat16 (two Sapphire Rapids cores).
On a GPU they are a quarter of the rows, at most 4096 and at least 1024, in multiples of 128: at 600 TFLOP/s and 3 TB/s
reading and writing the weight gradient in float32 takes the time of the products of 267 rows, a quarter of a chunk of
1024 and 7% of one of 4096. Where the classes of a row do not end on 16 bytes (30522, 50257), the weight is copied there
with rows of zeros behind it, V D elements, since the BLAS has slow products alone for such shapes.
The weight gradient is summed over the chunks in float32: on a GPU the product adds to it. With bfloat16 on the CPU,
where torch has no product of bfloat16 matrices with a float32 result, G and the chunk's hidden are widened for that
product, a few classes at a time; the other products stay bfloat16, as F.linear's. oneDNN computes those in a float32
copy of the chunk, hence the smaller chunks.

Sources: Hsu et al. 2024 (arXiv:2410.10989, Liger Kernel) for gradients in the forward, chunk by chunk;
Wijmans et al. 2024 (arXiv:2411.09009) for the memory that logits take.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm.ops import _checks, _registry
from fastlm.ops._autocast import autocast, autocast_dtype
from fastlm.ops._labels import IGNORE_INDEX
from fastlm.ops._shapes import as_rows
from fastlm.ops.cross_entropy import (
    LossesCPU,
    LossesCUDA,
    LossesTriton,
    check_labels,
    check_options,
    check_target,
    cross_entropy_reference,
    scale,
)


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
    reduction="mean",
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
        reduction=reduction,
    )


# ---- the raw ops. The loss is float32; an output that is not needed is empty.


def chunk_rows(rows: int, dtype: torch.dtype, device: str) -> int:
    """Rows of a chunk; the rule stands above."""
    if device == "cuda":
        parts = max(1, min(max(4, -(-rows // 4096)), rows // 1024))
        return min(rows, round_up(-(-rows // parts), 128))
    parts = max(2 if dtype == torch.float32 else 4, -(-rows // 512))
    return -(-rows // max(1, min(parts, rows // 256)))


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _fake_bwd(dloss, hidden, weight, target, bias, class_weight, ignore_index, label_smoothing, z_loss, needs, backend):
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else hidden.new_empty(0)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else weight.new_empty(0)
    return dhidden, dweight, hidden.new_empty(weight.shape[0] if needs[2] else 0)


def _fake_fwd(
    hidden, weight, target, bias, class_weight, ignore_index, label_smoothing, z_loss, reduction, needs, backend
):
    loss = hidden.new_empty(target.shape if reduction == "none" else (), dtype=torch.float32)
    return loss, *_fake_bwd(None, hidden, weight, target, bias, None, 0, 0.0, 0.0, needs, backend)


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, int ignore_index, "
    "float label_smoothing, float z_loss"
)
# needs: of dhidden, dweight, dbias; all false for "none", whose gradients are linear_cross_entropy_bwd's.
_registry.define(
    f"linear_cross_entropy_fwd({_INPUTS}, str reduction, bool[] needs, str backend) "
    "-> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    _fake_fwd,
)
_registry.define(
    f"linear_cross_entropy_bwd(Tensor dloss, {_INPUTS}, bool[] needs, str backend) "
    "-> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    _fake_bwd,
)


def _setup_context(ctx, args, outputs):
    *inputs, reduction, needs, backend = args
    _loss, *gradients = outputs
    ctx.mark_non_differentiable(*gradients)
    hidden, weight, _target, bias = inputs[:4]
    wanted = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
    if reduction == "none":
        ctx.save_for_backward(*inputs[:5])
        ctx.rest = inputs[5:], wanted, backend
    elif any(w and not n for w, n in zip(wanted, needs)):
        raise ValueError(f"needs: expected {wanted}, what requires a gradient of hidden, weight, bias; got {needs}")
    else:
        ctx.save_for_backward(*gradients)
        ctx.rest = None, needs, backend


def _backward(ctx, dloss, *_):
    options, needs, backend = ctx.rest
    if options is None:
        gradients = [scale(g, dloss, backend) if need else None for g, need in zip(ctx.saved_tensors, needs)]
    else:
        gradients = _registry.call("linear_cross_entropy_bwd", dloss, *ctx.saved_tensors, *options, needs, backend)
    dhidden, dweight, dbias = (g if need else None for g, need in zip(gradients, needs))
    return dhidden, dweight, None, dbias, *(None,) * 7


_registry.differentiable("linear_cross_entropy_fwd", _setup_context, _backward)


# ---- every backend: torch's BLAS, and the backend's cross_entropy in place

WIDENED = 2048  # classes whose bfloat16 dlogits are widened at a time


def _add_weight_gradient(dweight, dbias, g, x, needs, first):
    """dweight (V, D) += gᵀ x and dbias (V,) += Σ g, both float32, of dlogits g (n, V) and hidden x (n, D)."""
    beta = 0.0 if first else 1.0
    if g.is_cuda and g.dtype != torch.float32:
        if needs[1]:
            torch.addmm(dweight, g.t(), x, beta=beta, out_dtype=torch.float32, out=dweight)
        if needs[2]:
            dbias += g.sum(0, dtype=torch.float32)
        return
    x, width = x.float(), g.shape[1] if g.dtype == torch.float32 else WIDENED
    for column in range(0, g.shape[1], width):
        columns = slice(column, column + width)
        wide = g[:, columns].float()
        if needs[1]:
            dw = dweight[columns]
            torch.addmm(dw, wide.t(), x, beta=beta, out=dw)
        if needs[2]:
            dbias[columns] += wide.sum(0)


@torch.no_grad()  # products with out=
def _chunks(hidden, weight, bias, losses, dloss, needs, row_bytes):
    """Adds all rows to `losses`; returns the gradients, as _fake_bwd's.

    dloss: (rows,) float32 or None. row_bytes: the rows of a chunk of logits start at multiples of it.
    """
    # Contiguous: for another leading dimension the BLAS may sum in another order, and give other bits.
    h, w = as_rows(hidden).contiguous(), weight.contiguous()
    rows, vocabulary = h.shape[0], w.shape[0]
    step, cols = chunk_rows(rows, h.dtype, h.device.type), round_up(vocabulary, max(1, row_bytes // h.element_size()))
    buffer = h.new_empty(step, cols)
    buffer[:, vocabulary:] = 0  # oneDNN's AMX product of bfloat16 reads on past a row's end, and NaN times 0 is NaN
    # cuBLAS has no fast kernel for a number of classes that 16 bytes do not divide: there the products take the padding
    # too, whose logits and their gradients are 0.
    if row_bytes and vocabulary * h.element_size() % 16:
        w = F.pad(w, (0, 0, 0, cols - vocabulary))
        bias = None if bias is None else F.pad(bias, (0, cols - vocabulary))
    classes = w.shape[0]
    dhidden = h.new_empty(h.shape if needs[0] else 0)
    dweight = w.new_empty(w.shape if needs[1] else 0, dtype=torch.float32)
    dbias = w.new_zeros(classes if needs[2] else 0, dtype=torch.float32)
    if rows == 0:
        dweight.zero_()
    with torch.autocast(h.device.type, enabled=False):  # which would make the float32 products bfloat16
        for begin in range(0, rows, max(1, step)):
            chunk = slice(begin, begin + step)
            x = h[chunk]
            g = buffer[: x.shape[0], :classes]
            if bias is None:
                torch.mm(x, w.t(), out=g)
            else:
                torch.addmm(bias, x, w.t(), out=g)
            logits = g[:, :vocabulary]
            losses.add(logits, logits if any(needs) else None, None if dloss is None else dloss[chunk])
            if needs[0]:
                torch.mm(g, w, out=dhidden[chunk])
            if needs[1] or needs[2]:
                _add_weight_gradient(dweight, dbias, g, x, needs, first=begin == 0)
    dweight, dbias = dweight[:vocabulary], dbias[:vocabulary]
    return dhidden.view(hidden.shape if needs[0] else 0), dweight.to(weight.dtype), dbias.to(weight.dtype)


def _implement(backend, losses, row_bytes=0):
    """The raw ops of a backend, of its class of cross_entropy.Losses."""

    @_registry.implement("linear_cross_entropy_fwd", backend)
    def fwd(hidden, weight, target, bias, class_weight, ignore_index, label_smoothing, z_loss, reduction, needs):
        options = ignore_index, label_smoothing, z_loss
        chunks = losses(target, class_weight, weight.shape[0], options, reduction)
        gradients = _chunks(hidden, weight, bias, chunks, None, needs, row_bytes)
        return chunks.loss(), *gradients

    @_registry.implement("linear_cross_entropy_bwd", backend)
    def bwd(dloss, hidden, weight, target, bias, class_weight, ignore_index, label_smoothing, z_loss, needs):
        options = ignore_index, label_smoothing, z_loss
        chunks = losses(target, class_weight, weight.shape[0], options, "none")
        return _chunks(hidden, weight, bias, chunks, dloss.reshape(-1).float().contiguous(), needs, row_bytes)


_implement("cpu", LossesCPU)
# Rows on whole cache lines: cuBLAS wants leading dimensions on 16 bytes for its fast kernels, whatever the vocabulary.
_implement("triton", LossesTriton, row_bytes=128)
_implement("cuda", LossesCUDA, row_bytes=128)
_registry.offer("linear_cross_entropy", "cpu", "triton", "cuda")


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
    reduction: str = "mean",
    backend: str = "auto",
) -> torch.Tensor:
    """Cross-entropy of the logits hidden @ weightᵀ + bias, which never exist as a whole.

    Args:
        hidden: (..., D), floating point.
        weight: (V, D), in hidden's dtype: the output projection, an embedding table where that is tied.
        target: int64 (...), as of cross_entropy.
        bias: (V,) in hidden's dtype, or None.
        class_weight: (V,) floating point or None; cross_entropy's `weight`.
        ignore_index, label_smoothing, z_loss, reduction: as of cross_entropy.
        backend: "auto", "reference" (the logits exist), "cpu", "triton", "cuda".

    Gradients are computed in the forward, chunk by chunk, and scaled in backward ("none": computed in backward).
    Beyond them the memory of a chunk of logits is taken: on a CPU of half of the rows, in bfloat16 of a quarter, with a
    float32 copy of it, but of 512 at most and 256 at least; on a GPU of a quarter of the rows, 4096 at most and 1024 at
    least. For bfloat16 a float32 copy of the weight gradient comes to that.

    Returns the loss, of target's shape for "none", else a scalar; in hidden's dtype, float32 for bfloat16 and float16
    under autocast, which casts hidden, weight and bias as it would for F.linear.
    Raises ValueError as cross_entropy does, and for dtypes of hidden, weight and bias that differ outside of autocast.
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
    check_options(
        hidden.device, weight.shape[0], class_weight, "class_weight", label_smoothing, reduction, ignore_index
    )
    hidden, weight, bias = autocast("linear_cross_entropy", hidden, weight, bias)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype != hidden.dtype:
            raise ValueError(
                f"{name}: expected {hidden_dtype}, hidden's dtype, got {parameter.dtype}; cast it, or use autocast"
            )
    backend = _registry.choose("linear_cross_entropy", backend, hidden)
    dtype = autocast_dtype("cross_entropy", hidden)
    if backend == "reference":
        check_labels(target, weight.shape[0], ignore_index)
        return linear_cross_entropy_reference(
            hidden,
            weight,
            target,
            bias,
            class_weight=class_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction=reduction,
            dtype=dtype,
        )
    needs = [
        reduction != "none" and torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias)
    ]
    loss, _, _, _ = _registry.call(
        "linear_cross_entropy_fwd", hidden, weight, target, bias, class_weight, ignore_index, label_smoothing, z_loss,
        reduction, needs, backend,
    )  # fmt: skip
    return loss.to(dtype)
