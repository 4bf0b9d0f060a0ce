"""AdamW, the learning rate, and one training step.

A fused AdamW, fastlm's on a CPU and torch's elsewhere, reads two device scalars, as under torch.amp.GradScaler:
gradients are divided by `grad_scale`, and nothing is updated where `found_inf` is 1. So neither clipping nor the mean
over the predicted tokens costs a pass over the gradients, and a gradient that is not finite skips the step. The host
reads neither scalar.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from fastlm.tasks import Micro, TrainTable
from fastlm.train.adamw import AdamW, runs_on, total_norm


def make_optimizer(model: nn.Module, table: TrainTable) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, biases and norms (parameters of one dimension) do not.

    fastlm.train.adamw's for float32 parameters on a CPU where the C++ kernels are built, else torch's: the state is the
    same, and a checkpoint of either is one of the other.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": table.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings = {"lr": table.lr, "betas": (table.beta1, table.beta2), "eps": table.eps}
    return AdamW(groups, **settings) if runs_on(parameters) else torch.optim.AdamW(groups, fused=True, **settings)


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
    optimizer: torch.optim.Optimizer,
    micros: Sequence[Micro],
    *,
    lr: float,
    grad_clip: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One update from the micro-batches of a global batch, on the model's device; nothing waits for the device.

    The loss is the mean over the predicted tokens of all micro-batches together. Backward runs on their sum: a loss
    whose gradient is 1 has a fused cross-entropy leave its gradients as they are on a CPU, and the optimizer divides
    by the number of tokens as it clips.

    Returns float32 (2,): that mean, and the norm of its gradient before clipping. Where either is not finite, the
    parameters and the optimizer's state are as they were. No parameter has a .grad afterwards.
    """
    device = next(model.parameters()).device
    predicted = max(1, sum(micro.counts.predicted for micro in micros))
    losses = []
    for micro in micros:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**micro.inputs)
        loss.backward()
        losses.append(loss.detach().float())
    mean = torch.stack(losses).sum() / predicted
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = total_norm(gradients) / predicted
    clip = (norm / grad_clip).clamp(min=1.0) if grad_clip else torch.ones_like(norm)
    optimizer.grad_scale = clip * predicted
    optimizer.found_inf = (~torch.isfinite(norm + mean)).float()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack([mean, norm])
