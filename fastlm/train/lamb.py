"""LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2): AdamW whose step is scaled to the size of each tensor.

For a weight w with gradient g at step t, from 1:

    m = β1 m + (1 - β1) g;   v = β2 v + (1 - β2) g²
    r = (m / (1 - β1^t)) / (√(v / (1 - β2^t)) + eps) + decay · w
    w = w - lr · (|w| / |r|) · r        the ratio is 1 where either norm is 0, and for tensors that do not decay

On a CPU two passes over all tensors do it, csrc/cpu/lamb.cpp; elsewhere, and for sharded tensors, plain torch.
"""

from __future__ import annotations

import torch

from fastlm.train.adamw import fused_update, takes
from fastlm.train.scaled import Scaled


class LAMB(Scaled):
    """LAMB; `grad_scale` and `found_inf` as of `Scaled`.

    shards: with parameters that are this process's rows of tensors, the `fastlm.train.parallel.Shards` that knows the
        others', for the norms.
    """

    def __init__(
        self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-6, weight_decay: float = 1e-2, shards=None
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.norm = torch.linalg.vector_norm if shards is None else shards.norm
        self.shards = shards

    def update_all(self) -> None:
        if self.shards is None and takes(p for group in self.param_groups for p in group["params"]):
            fused_update(self, "lamb")
        else:
            super().update_all()

    def update(self, p, gradient, state, group):
        beta1, beta2 = group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        step = state["step"] + 1
        mean = state["exp_avg"].lerp(gradient, 1 - beta1)
        square = state["exp_avg_sq"].lerp(gradient.square(), 1 - beta2)
        root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = (mean / (1 - beta1**step)).div_(root)
        ratio = torch.ones((), device=p.device)
        if group["weight_decay"]:
            update.add_(p, alpha=group["weight_decay"])
            sizes = self.norm(p), self.norm(update)
            ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), sizes[0] / sizes[1], ratio)
        return p - update * (group["lr"] * ratio), {"step": step, "exp_avg": mean, "exp_avg_sq": square}
