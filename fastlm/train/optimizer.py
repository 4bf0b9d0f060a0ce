"""AdamW, the learning rate, and one training step.

The optimizer reads two scalars on the device that torch.amp.GradScaler made torch's fused AdamW read: gradients are
divided by `grad_scale`, and nothing is updated where `found_inf` is 1. So neither the mean over the predicted tokens
nor clipping costs a pass over the gradients, and a gradient that is not finite skips the step, without a device's host
looking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from fastlm.train.adamw import AdamW, gradient_norm
from fastlm.train.objective import Micro
from fastlm.train.recipe import TrainTable


def make_optimizer(model: nn.Module, table: TrainTable) -> AdamW:
    """AdamW; matrices decay, biases and norms (parameters of one dimension) do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": table.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=table.lr, betas=(table.beta1, table.beta2), eps=table.eps)


def lr_at(step: int, table: TrainTable) -> float:
    """The learning rate of step `step`, from 0: linear to the peak in warmup_steps, then the schedule to max_steps."""
    if step < table.warmup_steps:
        return table.lr * (step + 1) / table.warmup_steps
    if table.schedule == "constant":
        return table.lr
    done = (step - table.warmup_steps) / max(1, table.max_steps - table.warmup_steps)
    left = 1.0 - done if table.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return table.lr * (table.final_lr + (1.0 - table.final_lr) * left)


def train_step(
    model: nn.Module,
    optimizer: AdamW,
    micros: Sequence[Micro],
    *,
    lr: float,
    grad_clip: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One update from the micro-batches of a global batch, on the model's device; nothing waits for the device.

    The loss is the mean over the predicted tokens of all micro-batches together; each gives its sum, and the gradients
    of the sum become the mean's as the optimizer reads them.

    Returns float32 (2,): that mean, and the norm of its gradient before clipping. Where either is not finite, the
    parameters and the optimizer's state are as they were.
    """
    device = micros[0].inputs["input_ids"].device
    predicted = max(1, sum(micro.predicted for micro in micros))
    losses = []
    for micro in micros:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**micro.inputs)
        loss.backward()
        losses.append(loss.detach().float())
    mean = torch.stack(losses).sum() / predicted
    norm = gradient_norm(p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    norm = norm / predicted
    clip = (norm / grad_clip).clamp(min=1.0) if grad_clip else torch.ones_like(norm)
    optimizer.grad_scale = clip * predicted
    optimizer.found_inf = (~torch.isfinite(norm + mean)).float()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack([mean, norm])
