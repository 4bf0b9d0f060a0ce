"""The base of optimizers that update a tensor at a time in plain torch: scaled gradients, steps that are skipped."""

from __future__ import annotations

from typing import ClassVar

import torch

from fastlm.ops._low_weights import LowWeights


class Scaled(torch.optim.Optimizer):
    """An optimizer whose steps are clipped and skipped without the host.

    grad_scale, found_inf   scalar tensors that the caller sets, as torch.amp.GradScaler does for torch's fused
                            optimizers: gradients are divided by the one, and nothing changes where the other is not 0

    A subclass defines `update`.
    """

    grad_scale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None
    low_weights: LowWeights | None = None  # an optimizer may write these copies with the weights
    low_gradients: ClassVar[bool] = True  # a .grad may be of another dtype than its parameter

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; the closure's loss, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_all()
        return loss

    def update_all(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    gradient = p.grad.to(p.dtype)
                    gradient = gradient if self.grad_scale is None else gradient / self.grad_scale
                    self._put(p, *self.update(p, gradient, self.state[p], group))

    def update(
        self, p: torch.Tensor, gradient: torch.Tensor, state: dict[str, torch.Tensor], group: dict
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(the new p, what of its state is new), as new tensors. An empty state is filled with its initial tensors."""
        raise NotImplementedError

    def _put(self, p: torch.Tensor, new: torch.Tensor, changed: dict[str, torch.Tensor]) -> None:
        state = self.state[p]
        if self.found_inf is not None:
            skip = self.found_inf != 0
            changed = {name: torch.where(skip, state[name], value) for name, value in changed.items()}
            new = torch.where(skip, p, new)
        for name, value in changed.items():
            state[name].copy_(value)
        p.copy_(new)
