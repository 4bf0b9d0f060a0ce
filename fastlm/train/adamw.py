"""AdamW, on a CPU in one pass over the weights.

With the gradient g = p.grad / grad_scale and the update's number t, from 1, for every element:
    m = m + (1 - beta1) (g - m),   v = beta2 v + (1 - beta2) g²
    w = (1 - lr weight_decay) w - lr / (1 - beta1^t) · m / (√v / √(1 - beta2^t) + eps)
Source: Loshchilov, Hutter 2019 (arXiv:1711.05101), algorithm 2, as torch.optim.AdamW computes it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastlm import _native

_REFUSED = ("amsgrad", "maximize", "differentiable", "capturable")


def gradient_norm(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients together, a float32 scalar on their device.

    On a CPU each is read once, and the result has the same bits for any number of threads.
    """
    gradients = list(gradients)
    if _native.missing_cpu() or not all(_plain(g) for g in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    square = _native.cpu().squared_norm([(g.data_ptr(), g.numel()) for g in gradients], _native.threads())
    return torch.tensor(square, dtype=torch.float64).sqrt().float()


def _plain(x: torch.Tensor) -> bool:
    """Whether x is what the C++ reads: float32 on a CPU, one element behind the other."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.layout == torch.strided and x.is_contiguous()


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True), with its state_dict and its `grad_scale` and `found_inf`.

    `step` divides gradients by the attribute `grad_scale`, where it is set, and does nothing where `found_inf` is 1:
    scalars on the parameters' device, as torch.amp.GradScaler sets them. On a CPU all parameters go in one call of C++,
    a read of each gradient and a read and a write of the rest; `.grad` stays as it is, not divided. Tensors that are
    not contiguous float32, and amsgrad, maximize, differentiable and capturable, go torch's way.
    """

    def __init__(self, params, **options) -> None:
        super().__init__(params, **options, fused=True)

    @torch.no_grad()
    def step(self, closure=None):
        native = self._native_arguments()
        if closure is not None or native is None:
            return super().step(closure)
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is None or not found_inf.item():
            _native.cpu().adamw(*native, 1.0 if scale is None else scale.item(), _native.threads())
        return None

    def _native_arguments(self):
        """(tensors, groups) of the C++, or None where torch is to do it."""
        if _native.missing_cpu() or any(group.get(name) for group in self.param_groups for name in _REFUSED):
            return None
        tensors, groups, at = [], [], _native.address
        for index, group in enumerate(self.param_groups):
            groups.append((float(group["lr"]), *map(float, group["betas"]), group["eps"], group["weight_decay"]))
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not (_plain(p) and _plain(p.grad)):
                    return None
                state = self.state[p]
                if not state:  # as torch starts it
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
                if not (_plain(m) and _plain(v) and _plain(step)):
                    return None
                tensors.append((at(p), at(p.grad), at(m), at(v), at(step), p.numel(), index))
        return tensors, groups
