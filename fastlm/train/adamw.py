"""AdamW on a CPU: torch's fused one, in one pass over memory.

For a weight w with gradient g at step t, from 1 (Loshchilov, Hutter 2019, arXiv:1711.05101):

    m = β1 m + (1 - β1) g
    v = β2 v + (1 - β2) g²
    w = (1 - lr·decay) w - lr / (1 - β1^t) · m / (√v / √(1 - β2^t) + eps)

where g is the gradient divided by `grad_scale`, as torch.amp.GradScaler has torch's fused AdamW do. torch writes the
quotient back into the gradient, a fourth tensor to write; here it is never stored. What a step costs is then its bytes:
a gradient is read once for the norm, and once for the update, which reads and writes w, m and v. Where a weight has a
copy in bfloat16 that the next step multiplies (`low_weights`), the update writes it too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn
from torch.autograd.profiler import record_function

from fastlm import _native
from fastlm.ops._low_weights import LowWeights

_REMEDY = "use torch.optim.AdamW(fused=True)"
_WEIGHTS, _GRADIENTS = (torch.float32,), (torch.float32, torch.bfloat16)


def runs_on(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether `AdamW` takes them all: dense float32 on a CPU, and the C++ kernels are built."""
    return _native.missing_cpu() is None and all(_refusal(p) is None for p in parameters)


def takes(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether `fused_update` takes these, with the gradients that they have."""
    parameters = list(parameters)
    return runs_on(parameters) and all(p.grad is None or _refusal(p.grad, _GRADIENTS) is None for p in parameters)


def total_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all `gradients` together, a scalar.

    Of float32 and bfloat16 on a CPU it is float32, with the same bits for any number of threads.
    """
    gradients = list(gradients)
    ours = _native.missing_cpu() is None and all(_refusal(g, _GRADIENTS) is None for g in gradients)
    if not gradients or not ours:
        return torch.nn.utils.get_total_norm(gradients)
    dense = [g if _is_dense(g) else g.contiguous() for g in gradients]
    spans = [(g, g.numel(), _native.DTYPE_CODES[g.dtype]) for g in dense]
    with record_function("fastlm::squared_norm"):
        square = _native.cpu().squared_norm(spans=spans, threads=_native.threads())
    return torch.tensor(math.sqrt(square), dtype=torch.float32)


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True) for dense float32 parameters on a CPU.

    Its state_dict is torch's, and loads there and here alike; `grad_scale` and `found_inf`, float32 scalars that
    GradScaler or the caller sets, mean what they mean there: nothing is touched where found_inf is not 0, the number of
    steps neither. A parameter's .grad is left as backward made it, not divided by grad_scale; it may be bfloat16.

    low_weights: copies of the parameters, which the caller sets; a step writes those in bfloat16 with the parameters.

    ValueError for other parameters or gradients, and for amsgrad, maximize, capturable or differentiable, which a
    loaded state_dict may ask for.
    """

    low_weights: LowWeights | None = None
    low_gradients: ClassVar[bool] = True  # a .grad may be bfloat16

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
        if (missing := _native.missing_cpu()) is not None:
            raise ValueError(f"AdamW: {missing}, or {_REMEDY}")
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        try:
            for parameter in self.param_groups[-1]["params"]:
                _check("params", parameter)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for option in ("amsgrad", "maximize", "capturable", "differentiable"):
                if group[option]:
                    raise ValueError(f"{option}: expected False, got {group[option]}; {_REMEDY}")
        fused_update(self, "adamw")
        return loss


def fused_update(optimizer: torch.optim.Optimizer, kernel: str) -> None:
    """One update of every parameter that has a gradient by a kernel of csrc/cpu, "adamw" or "lamb".

    The optimizer's groups have lr, betas, eps and weight_decay, its states step, exp_avg and exp_avg_sq; grad_scale,
    found_inf and low_weights as of `AdamW`. ValueError for parameters or gradients that the kernels do not take.
    """
    found_inf, grad_scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is not None and found_inf.item():
        return
    tensors, groups, written, copies, low, cast = [], [], [], [], optimizer.low_weights, []
    for number, group in enumerate(optimizer.param_groups):
        beta1, beta2 = map(float, group["betas"])
        groups.append((float(group["lr"]), beta1, beta2, float(group["eps"]), float(group["weight_decay"])))
        for w in group["params"]:
            if w.grad is None:
                continue
            _check("params", w)
            _check("grad", w.grad, w, _GRADIENTS)
            state = optimizer.state[w]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(w, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(w, memory_format=torch.preserve_format)
            # All four in one order: the weight's, where its elements lie one behind the other.
            work = w if _is_dense(w) else torch.empty_like(w).copy_(w)
            if work is not w:
                copies.append((w, work))
            for name in ("exp_avg", "exp_avg_sq"):
                _check(name, state[name], w)
                state[name] = _ordered_as(work, state[name])
            _check("step", state["step"])
            gradient = _ordered_as(work, w.grad)
            written += (w, state["exp_avg"], state["exp_avg_sq"], state["step"])
            moments = state["exp_avg"], state["exp_avg_sq"]
            copy = low.writable(w) if low is not None and work is w else None
            if copy is not None:
                cast.append(w)
                written.append(copy)
            size = w.numel(), number, _native.DTYPE_CODES[gradient.dtype]
            tensors.append((work, gradient, *moments, state["step"], copy, *size))
    with record_function(f"fastlm::{kernel}"):
        getattr(_native.cpu(), kernel)(
            tensors=tensors,
            groups=groups,
            grad_scale=1.0 if grad_scale is None else grad_scale.item(),
            threads=_native.threads(),
        )
    for w, work in copies:
        w.copy_(work)
    torch.autograd.graph.increment_version(written)
    if low is not None:
        low.wrote(cast)


def _refusal(x: torch.Tensor, dtypes: tuple[torch.dtype, ...] = _WEIGHTS) -> str | None:
    """Why the kernels cannot take x, or None."""
    if x.dtype not in dtypes or x.layout is not torch.strided or x.device.type != "cpu":
        return f"{x.dtype} {x.layout} on {x.device}"
    if (type(x) is not torch.Tensor and type(x) is not nn.Parameter) or x.is_neg() or x._is_zerotensor():
        return f"a {type(x).__name__} that is more, or less, than memory"
    return None


def _check(name: str, x: torch.Tensor, like: torch.Tensor | None = None, dtypes=_WEIGHTS) -> None:
    if (why := _refusal(x, dtypes)) is not None:
        expected = " or ".join(map(str, dtypes))
        raise ValueError(f"{name}: expected dense {expected} on a cpu, got {why}; {_REMEDY}")
    shape = () if name == "step" else x.shape if like is None else like.shape
    if x.shape != shape:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}; load the state of the same parameters"
        )


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the elements lie one behind the other, in whichever order of the dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _ordered_as(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it, with the elements in the order that those of the dense w have."""
    if x.stride() == w.stride() or (x.is_contiguous() and w.is_contiguous()):
        return x
    return torch.empty_like(w).copy_(x)
