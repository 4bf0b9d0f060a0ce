"""cross_entropy: softmax cross-entropy with class indices, its loss and its gradient in one pass over the logits.

For a row x (V,) with target t, class weights w (1 without), label smoothing ε, and lse = log Σ_c exp(x_c):

    loss = (1 - ε) w_t (lse - x_t) + ε/V Σ_c w_c (lse - x_c) + z_loss lse²
    dx_j = (a + 2 z_loss lse) exp(x_j - lse) - (1 - ε) w_t [j = t] - ε/V w_j,    a = (1 - ε) w_t + ε/V Σ_c w_c

A row whose target is ignore_index has loss 0 and gradient 0. "sum" adds the rows; "mean" divides that sum, the z term
included, by Σ w_t over the rows that are not ignored (their number without weights): NaN where there is none, as torch.
Everything is computed in float32 and rounded once.

The denominator needs the targets alone, so the forward knows the gradient but for the factor dloss that comes from
above: it writes the gradient in the pass that reads the logits, and backward multiplies it by dloss.

Sources: Szegedy et al. 2016 (arXiv:1512.00567) for ε; Chowdhery et al. 2022 (arXiv:2204.02311, PaLM) for z_loss;
Milakov, Gimelshein 2018 (arXiv:1805.02867) for the running maximum.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastlm import _native
from fastlm.ops import _checks, _registry
from fastlm.ops._autocast import autocast_dtype
from fastlm.ops._labels import IGNORE_INDEX
from fastlm.ops._shapes import as_rows, contiguous

REDUCTIONS = ("none", "mean", "sum")


def outside(target: torch.Tensor, vocabulary: int, ignore_index: int) -> torch.Tensor:
    """Which targets are neither a class nor ignore_index, bool."""
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
    if not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index: expected an integer, got {ignore_index!r}")


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
    """ValueError for a label outside the vocabulary, where looking costs no synchronisation."""
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = outside(target.reshape(-1), vocabulary, ignore_index)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise_outside(row, int(target.reshape(-1)[row]), vocabulary, ignore_index)


# ---- the raw ops. The loss is float32; dlogits, where needed, is d(loss)/d(logits), per row for "none".


def _fake_loss(target, reduction):
    return target.new_empty(target.shape if reduction == "none" else (), dtype=torch.float32)


def _fake_dlogits(logits, needs_dlogits):
    return torch.empty_like(logits, memory_format=torch.contiguous_format) if needs_dlogits else logits.new_empty(0)


def _fake_fwd(logits, target, weight, ignore_index, label_smoothing, z_loss, reduction, needs_dlogits, backend):
    return _fake_loss(target, reduction), _fake_dlogits(logits, needs_dlogits)


def _fake_fwd_(logits, target, weight, ignore_index, label_smoothing, z_loss, reduction, backend):
    return _fake_loss(target, reduction)


def _fake_bwd(dlogits, dloss, backend):
    return torch.empty_like(dlogits, memory_format=torch.contiguous_format)


_OPTIONS = "Tensor target, Tensor? weight, int ignore_index, float label_smoothing, float z_loss, str reduction"
_registry.define(
    f"cross_entropy_fwd(Tensor logits, {_OPTIONS}, bool needs_dlogits, str backend) -> (Tensor loss, Tensor dlogits)",
    _fake_fwd,
)
# Leaves dlogits in the logits.
_registry.define(f"cross_entropy_fwd_(Tensor(a!) logits, {_OPTIONS}, str backend) -> Tensor loss", _fake_fwd_)
# dlogits (..., cols) * dloss, a scalar or (...).
_registry.define("cross_entropy_bwd(Tensor dlogits, Tensor dloss, str backend) -> Tensor", _fake_bwd)
_registry.define("cross_entropy_bwd_(Tensor(a!) dlogits, Tensor dloss, str backend) -> ()", lambda *args: None)


def scale(gradient: torch.Tensor, dloss: torch.Tensor, backend: str) -> torch.Tensor:
    """gradient * dloss, in the gradient's own memory unless the graph is kept for another backward."""
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return _registry.call("cross_entropy_bwd", gradient, dloss, backend)
    torch.ops.fastlm.cross_entropy_bwd_(gradient, dloss, backend)
    return gradient


def _setup_context(ctx, args, outputs):
    _loss, dlogits = outputs
    needs_dlogits, ctx.backend = args[-2:]
    if not needs_dlogits:
        raise ValueError("needs_dlogits: expected True, since the logits require a gradient, got False")
    ctx.mark_non_differentiable(dlogits)
    ctx.save_for_backward(dlogits)


def _backward(ctx, dloss, _ddlogits):
    (dlogits,) = ctx.saved_tensors
    return scale(dlogits, dloss, ctx.backend), *(None,) * 8


def _setup_context_(ctx, args, loss):
    ctx.backend = args[-1]
    ctx.save_for_backward(args[0].detach())  # one version counter with the logits: a later write to them is noticed


def _backward_(ctx, dloss):
    (dlogits,) = ctx.saved_tensors
    return scale(dlogits, dloss, ctx.backend), *(None,) * 7


_registry.differentiable("cross_entropy_fwd", _setup_context, _backward)
_registry.differentiable("cross_entropy_fwd_", _setup_context_, _backward_)


class _Overwritten(torch.autograd.Function):
    """Makes the overwritten logits a tensor through which nothing can be differentiated."""

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


def _implement(backend, losses, scaled, rows=as_rows):
    """The raw ops of a backend, of what it has for rows (rows, V), as `rows` gives them, with a unit last stride:

    losses(target, weight, vocabulary, options, reduction), a class of Losses, below.
    scaled(x, dloss, out) writes x * dloss into out, which may be x. dloss: float32, contiguous, a scalar or (rows,).
    """

    def forward(x, dx, target, weight, *options, reduction):
        all_losses = losses(target, weight, x.shape[-1], options, reduction)
        all_losses.add(x, dx)
        return all_losses.loss()

    @_registry.implement("cross_entropy_fwd", backend)
    def fwd(logits, target, weight, ignore_index, label_smoothing, z_loss, reduction, needs_dlogits):
        dlogits = _fake_dlogits(logits, needs_dlogits)
        dx = as_rows(dlogits) if needs_dlogits else None
        options = ignore_index, label_smoothing, z_loss
        return forward(rows(logits), dx, target, weight, *options, reduction=reduction), dlogits

    @_registry.implement("cross_entropy_fwd_", backend)
    def fwd_(logits, target, weight, ignore_index, label_smoothing, z_loss, reduction):
        x = rows(logits)
        loss = forward(x, x, target, weight, ignore_index, label_smoothing, z_loss, reduction=reduction)
        if x.data_ptr() != logits.data_ptr():  # a copy, where the strides are not such rows
            logits.copy_(x.view(logits.shape))
        return loss

    def scale_into(dlogits, dloss, out):
        y = as_rows(out)
        scaled(as_rows(dlogits), dloss.float().reshape(-1 if dloss.dim() else ()).contiguous(), y)
        if y.data_ptr() != out.data_ptr():
            out.copy_(y.view(out.shape))

    @_registry.implement("cross_entropy_bwd", backend)
    def bwd(dlogits, dloss):
        out = _fake_bwd(dlogits, dloss, backend)
        scale_into(dlogits, dloss, out)
        return out

    @_registry.implement("cross_entropy_bwd_", backend)
    def bwd_(dlogits, dloss):
        scale_into(dlogits, dloss, dlogits)


class Losses:
    """The losses of rows of logits that are added in order, all at once or in chunks.

    add(x, dx, dloss=None) takes the next rows x (n, V) and writes their gradient into dx, which may be x, or None.
        dloss: float32 (n,), a factor of each row's gradient, or None.
    loss() is what the raw op returns, once every row is there.
    """

    def __init__(self, target, reduction):
        self.target, self.reduction = target.reshape(-1).contiguous(), reduction
        self.each = target.new_empty(target.shape, dtype=torch.float32)
        self.added = 0

    def next(self, rows):
        """Target and loss, (rows,), of the rows to be added."""
        chunk = slice(self.added, self.added + rows)
        self.added += rows
        return self.target[chunk], self.each.view(-1)[chunk]


# ---- CPU C++: csrc/cpu/cross_entropy.cpp


class LossesCPU(Losses):
    """Raises ValueError at once for a label outside the vocabulary."""

    def __init__(self, target, weight, vocabulary, options, reduction):
        super().__init__(target, reduction)
        self.weight = None if weight is None else weight.float().contiguous()
        self.options, at = options, _native.address
        row, count = _native.cpu().cross_entropy_count(
            at(self.target), at(self.weight), self.target.numel(), vocabulary, options[0]
        )
        if row >= 0:
            raise_outside(row, int(self.target[row]), vocabulary, options[0])
        self.denominator, self.sum = count if reduction == "mean" else 1.0, 0.0

    def add(self, x, dx, dloss=None):
        target, loss = self.next(x.shape[0])
        at = _native.address
        self.sum += _native.cpu().cross_entropy_fwd(
            at(x), at(target), at(self.weight), at(dloss), at(loss), at(dx), *x.shape, x.stride(0),
            0 if dx is None else dx.stride(0), *self.options, self.denominator,
            _native.DTYPE_CODES[x.dtype], _native.threads(),
        )  # fmt: skip

    def loss(self):
        if self.reduction == "none":
            return self.each
        return self.each.new_full((), self.sum if self.denominator else math.nan)


def _scaled_cpu(x, dloss, y):
    at = _native.address
    _native.cpu().cross_entropy_bwd(
        at(x), at(dloss), at(y), *x.shape, x.stride(0), y.stride(0), dloss.dim() > 0,
        _native.DTYPE_CODES[x.dtype], _native.threads(),
    )  # fmt: skip


_implement("cpu", LossesCPU, _scaled_cpu)


# ---- Triton: kernels/cross_entropy.py


class LossesTriton(Losses):
    """A label outside the vocabulary makes its row's loss and gradient NaN."""

    def __init__(self, target, weight, vocabulary, options, reduction):
        from fastlm.kernels import cross_entropy as kernels

        super().__init__(target, reduction)
        self.kernels, self.options, self.weight = kernels, options, contiguous(weight)
        self.weight_sum = None if weight is None else weight.sum(dtype=torch.float32)
        mean = reduction == "mean"
        self.parts = kernels.count_targets(self.target, self.weight, vocabulary, options[0]) if mean else None

    def add(self, x, dx, dloss=None):
        target, loss = self.next(x.shape[0])
        ignore_index, label_smoothing, z_loss = self.options
        self.kernels.cross_entropy_fwd(
            x, target, self.weight, self.weight_sum, self.parts, dloss, loss, dx,
            ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
        )  # fmt: skip

    def loss(self):
        return self.each if self.reduction == "none" else self.kernels.sum_losses(self.each.view(-1), self.parts)


def _scaled_triton(x, dloss, y):
    from fastlm.kernels import cross_entropy as kernels

    kernels.cross_entropy_bwd(x, dloss, y)


def _rows_triton(x):
    """A copy unless rows are aligned as in a contiguous tensor: which of them a thread adds up depends on it, and the
    same logits give the same bits whatever their strides."""
    from fastlm.kernels import cross_entropy as kernels

    x = as_rows(x)
    return x if kernels.aligned_alike(x, None) else x.clone(memory_format=torch.contiguous_format)


_implement("triton", LossesTriton, _scaled_triton, _rows_triton)


# ---- CUDA C++: csrc/cuda/cross_entropy.cu


class LossesCUDA(Losses):
    """A label outside the vocabulary makes its row's loss and gradient NaN."""

    def __init__(self, target, weight, vocabulary, options, reduction):
        super().__init__(target, reduction)
        self.options, self.place = options, _native.cuda_place(target)
        self.weight = None if weight is None else weight.float().contiguous()
        self.weight_sum = None if weight is None else self.weight.sum()
        self.parts = None
        if reduction == "mean":
            module, at = _native.cuda(), _native.address
            self.parts = self.each.new_empty(module.LOSS_PARTS)
            module.cross_entropy_count(
                at(self.target), at(self.weight), at(self.parts), self.target.numel(), vocabulary, options[0],
                *self.place,
            )  # fmt: skip

    def add(self, x, dx, dloss=None):
        target, loss = self.next(x.shape[0])
        at = _native.address
        _native.cuda().cross_entropy_fwd(
            at(x), at(target), at(self.weight), at(self.weight_sum), at(self.parts), at(dloss), at(loss), at(dx),
            *x.shape, x.stride(0), 0 if dx is None else dx.stride(0), *self.options,
            _native.DTYPE_CODES[x.dtype], *self.place,
        )  # fmt: skip

    def loss(self):
        if self.reduction == "none":
            return self.each
        module, at = _native.cuda(), _native.address
        scratch, out = self.each.new_empty(module.LOSS_PARTS), self.each.new_empty(())
        module.cross_entropy_sum(
            at(self.each), at(self.parts), at(scratch), at(out), self.each.numel(), *self.place
        )  # fmt: skip
        return out


def _scaled_cuda(x, dloss, y):
    at = _native.address
    _native.cuda().cross_entropy_bwd(
        at(x), at(dloss), at(y), *x.shape, x.stride(0), y.stride(0), dloss.dim() > 0,
        _native.DTYPE_CODES[x.dtype], *_native.cuda_place(x),
    )  # fmt: skip


_implement("cuda", LossesCUDA, _scaled_cuda)
_registry.offer("cross_entropy", "cpu", "triton", "cuda")


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
        logits: (..., V), floating point, V ≥ 1. Classes are the last dimension; for (N, V) and (V,) that is torch's
            own layout, for more dimensions torch takes them second.
        target: int64 (...), class indices in [0, V), or ignore_index for a row without loss and gradient.
        weight: (V,) floating point or None, a factor for each class; no gradient flows to it.
        ignore_index: any integer; where it is a class, that class is ignored.
        label_smoothing: ε in [0, 1], see fastlm.ops.cross_entropy.
        z_loss: factor of lse² per row that is not ignored; "mean" divides it by the same denominator as the loss.
        reduction: "none", "mean" (over Σ w_t of the rows that are not ignored; NaN where there are none), "sum".
        inplace: where a gradient is needed, overwrite the logits with it, and let backward only scale it in place:
            no memory of the logits' size is allocated if they are contiguous. They must not be used again, before or
            after: an op that saved them raises in its backward, and so does one that uses them later. The reference
            leaves them alone.
        backend: "auto", "reference", "cpu", "triton", "cuda".

    Returns the loss, of target's shape for "none", else a scalar; in the dtype of the logits, float32 for bfloat16 and
    float16 under autocast, as F.cross_entropy. Computed in float32, the gradient is in the dtype of the logits.
    Raises ValueError for a wrong shape, dtype or device, for a named backend that cannot run, and, on the CPU, for a
    target outside the vocabulary, before anything is written. On a device nothing can be raised without a stall: there
    such a row's loss (hence the mean and the sum) and its gradient are NaN.
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
    options = target, weight, ignore_index, label_smoothing, z_loss, reduction
    if overwrites:
        loss = torch.ops.fastlm.cross_entropy_fwd_(logits, *options, backend)
        if not compiling:
            with torch.autograd._unsafe_preserve_version_counter(logits):
                _Overwritten.apply(logits)
    else:
        loss, _ = _registry.call("cross_entropy_fwd", logits, *options, needs_grad, backend)
    return loss.to(dtype)
