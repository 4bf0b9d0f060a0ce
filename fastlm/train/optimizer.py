"""Optimizers, the learning rate, and one training step.

A fused AdamW, fastlm's on a CPU and torch's elsewhere, reads two device scalars, as under torch.amp.GradScaler:
gradients are divided by `grad_scale`, and nothing is updated where `found_inf` is 1. So neither clipping nor the mean
over the predicted tokens costs a pass over the gradients, and a gradient that is not finite skips the step. The host
reads neither scalar.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastlm.models import Counts, Model
from fastlm.tasks import Micro, TrainTable
from fastlm.train.adamw import AdamW, runs_on, total_norm
from fastlm.train.graph import StepGraph
from fastlm.train.lamb import LAMB
from fastlm.train.micro import copies_of, forward_backward, low_gradients, low_weights
from fastlm.train.muon import Muon, Together
from fastlm.train.parallel import ALONE, Shards, World, sync_gradients


@dataclass(frozen=True)
class Group:
    """Parameters that are updated alike: `optimizer` is "adamw", "muon" or "lamb"; `parts` as of Muon."""

    what: str
    optimizer: str
    parameters: list[nn.Parameter]
    weight_decay: float
    parts: int = 1

    def __str__(self) -> str:
        count = sum(p.numel() for p in self.parameters)
        decay = f"decay {self.weight_decay:g}" if self.weight_decay else "no decay"
        return f"{self.optimizer}: {len(self.parameters)} {self.what} ({count / 1e6:.3g} M), {decay}"


def parameter_groups(model: Model, table: TrainTable) -> list[Group]:
    """How `make_optimizer` divides the parameters: matrices and tables decay, biases and norms do not.

    Muon takes the matrices of linear layers, where each fused projection is as many parts as `Model.parts` says; AdamW
    takes the rest.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} if table.optimizer == "muon" else set()
    other = "adamw" if table.optimizer == "muon" else table.optimizer
    matrices: dict[int, list[nn.Parameter]] = {}
    tables, vectors = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in linear:
            matrices.setdefault(model.parts(name), []).append(p)
        else:
            (tables if p.dim() >= 2 else vectors).append(p)
    groups = [
        Group(f"matrices{f' of {parts} parts' if parts > 1 else ''}", "muon", found, table.weight_decay, parts)
        for parts, found in sorted(matrices.items())
    ]
    groups.append(Group("tables" if linear else "matrices and tables", other, tables, table.weight_decay))
    groups.append(Group("biases and norms", other, vectors, 0.0))
    return [group for group in groups if group.parameters]


def make_optimizer(model: Model, table: TrainTable, shards: Shards | None = None) -> torch.optim.Optimizer:
    """The recipe's optimizer over `parameter_groups`; with `shards`, over this process's part of them.

    AdamW is fastlm.train.adamw's for float32 parameters on a CPU where the C++ kernels are built, else torch's fused
    one: the state is the same, and a checkpoint of either is one of the other.
    """
    groups = parameter_groups(model, table)
    if shards is not None:
        groups = [replace(group, parameters=[shards.local(p) for p in group.parameters]) for group in groups]
    muon = [group for group in groups if group.optimizer == "muon"]
    others = [{"params": g.parameters, "weight_decay": g.weight_decay} for g in groups if g.optimizer != "muon"]
    settings = {"lr": table.lr, "betas": (table.beta1, table.beta2), "eps": table.eps}
    if table.optimizer == "lamb":
        return LAMB(others, **settings, shards=shards)
    fits = runs_on(p for group in others for p in group["params"])
    adamw = AdamW(others, **settings) if fits else torch.optim.AdamW(others, fused=True, **settings)
    if not muon:
        return adamw
    matrices = [{"params": g.parameters, "weight_decay": g.weight_decay, "parts": g.parts} for g in muon]
    low = torch.bfloat16 if table.dtype == "bfloat16" else None  # as the layers, whose matrices these are
    return Together([Muon(matrices, lr=table.lr, momentum=table.momentum, shards=shards, dtype=low), adamw])


def lr_at(step: int, table: TrainTable) -> float:
    """The learning rate of step `step`, from 0: linear to the peak in warmup_steps, then the schedule to max_steps."""
    if step < table.warmup_steps:
        return table.lr * (step + 1) / table.warmup_steps
    if table.schedule == "constant":
        return table.lr
    if table.schedule == "wsd":
        decay = max(1, round(table.decay_share * table.max_steps))
        left = min(1.0, (table.max_steps - step) / decay)
        return table.lr * (table.final_lr + (1.0 - table.final_lr) * left)
    done = (step - table.warmup_steps) / max(1, table.max_steps - table.warmup_steps)
    left = 1.0 - done if table.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return table.lr * (table.final_lr + (1.0 - table.final_lr) * left)


def has_low_gradients(optimizer: torch.optim.Optimizer, dtype: torch.dtype, micros: int, processes: int) -> bool:
    """Whether the gradients of a step in `dtype` stay as backward computes them, in bfloat16 (`low_gradients`).

    So on a CPU, of one micro-batch in one process: torch sums those of several in float32. micros: of this process
    """
    single = micros == processes == 1 and dtype == torch.bfloat16 and getattr(optimizer, "low_gradients", False)
    return single and optimizer.param_groups[0]["params"][0].is_cpu


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micros: Sequence[Micro],
    *,
    lr: float,
    grad_clip: float,
    dtype: torch.dtype,
    world: World = ALONE,
    shards: Shards | None = None,
    stop: bool = False,
    graph: StepGraph | None = None,
) -> torch.Tensor:
    """One update from the micro-batches of a global batch, on the model's device; nothing waits for the device.

    The loss is the mean over the predicted tokens of all micro-batches together. Backward runs on their sum: a loss
    whose gradient is 1 has a fused cross-entropy leave its gradients as they are on a CPU, and the optimizer divides
    by the number of tokens as it clips.

    world: the processes that the micro-batches of the step are divided among; `model` averages gradients over them
    shards: where `model` is sharded, what the optimizer's parameters are parts of
    stop: whether this process wants to stop
    graph: runs micro-batches of its shapes in place of `model`

    Returns float64 (2,): that mean, and the norm of its gradient before clipping. Where either is not finite, the
    parameters and the optimizer's state are as they were. No parameter has a .grad afterwards. With several processes
    follow the sums over them of `stop`, of the entries of Counts, and of what was dropped: the same in all.
    """
    optimizer.low_weights = copies_of(model, dtype) if shards is None else None
    low = graph is None and has_low_gradients(optimizer, dtype, len(micros), world.size)
    with low_gradients(p for group in optimizer.param_groups for p in group["params"]) if low else nullcontext():
        return _train_step(model, optimizer, micros, lr, grad_clip, dtype, world, shards, stop, graph)


def _train_step(model, optimizer, micros, lr, grad_clip, dtype, world, shards, stop, graph) -> torch.Tensor:
    counts, losses = Counts.total(micro.counts for micro in micros), []
    with low_weights(model, dtype) if shards is None else nullcontext():
        for micro in micros:
            sync_gradients(model, micro is micros[-1])
            if graph is not None:
                losses.append(graph.run(micro, alone=len(micros) == 1))
            else:
                losses.append(forward_backward(model, micro, dtype))
    total, sums = losses[0] if len(losses) == 1 else torch.stack(losses).sum(), None
    predicted = divisor = max(1, counts.predicted)
    if world.size > 1:
        dropped = sum(micro.dropped for micro in micros)
        sums = world.sum(torch.cat([total.double()[None], world.tensor([stop, *counts, dropped])]))
        predicted = sums[2 + Counts._fields.index("predicted")].clamp(min=1.0).float()
        total, sums = sums[0].float(), sums[1:]
        divisor = predicted / world.size  # torch's average over the processes is a sum but for this factor
    mean = total / predicted
    if shards is not None:
        shards.take_gradients()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = (total_norm(gradients) if shards is None else shards.total_norm(gradients)) / divisor
    clip = (norm / grad_clip).clamp(min=1.0) if grad_clip else torch.ones_like(norm)
    optimizer.grad_scale = clip * divisor
    both = norm + mean
    optimizer.found_inf = (both - both != 0).float()  # x - x is NaN for an x that is not finite; isfinite is 4 kernels
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    if shards is not None:
        model.zero_grad()
    result = torch.stack([mean, norm]).double()
    return result if sums is None else torch.cat([result, sums])
