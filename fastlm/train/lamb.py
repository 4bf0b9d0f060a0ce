"""LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2): AdamW whose step is scaled to the size of each tensor.

For a weight w with gradient g at step t, from 1:

    m = β1 m + (1 - β1) g;   v = β2 v + (1 - β2) g²
    r = (m / (1 - β1^t)) / (√(v / (1 - β2^t)) + eps) + decay · w
    w = w - lr · (|w| / |r|) · r        the ratio is 1 where either norm is 0, and for tensors that do not decay
"""

from __future__ import annotations

import torch


class LAMB(torch.optim.Optimizer):
    """LAMB. `grad_scale` and `found_inf`, scalar tensors that the caller sets, mean what they do for torch's fused
    optimizers: gradients are divided by the one, and nothing changes where the other is not 0.

    shards: with parameters that are this process's rows of tensors, the `fastlm.train.parallel.Shards` that knows the
        others', for the norms.
    """

    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None

    def __init__(
        self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-6, weight_decay: float = 1e-2, shards=None
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.norm = torch.linalg.vector_norm if shards is None else shards.norm

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: torch.Tensor, group: dict) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        gradient = p.grad if self.grad_scale is None else p.grad / self.grad_scale
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
        new = p - update * (group["lr"] * ratio)
        changed = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        if self.found_inf is not None:
            skip = self.found_inf != 0
            changed = {name: torch.where(skip, state[name], value) for name, value in changed.items()}
            new = torch.where(skip, p, new)
        for name, value in changed.items():
            state[name].copy_(value)
        p.copy_(new)
