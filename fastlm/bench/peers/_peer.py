"""What a peer of an op is, and what several peers share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastlm.ops import IGNORE_INDEX
from fastlm.ops._relative_bias import relative_buckets


class Unsupported(Exception):
    """Why a peer cannot do what is asked for."""


@dataclass(frozen=True)
class Peer:
    """A function with the inputs and options of its OpCase, which returns the op's leading outputs.

    function(**inputs, **options) -> outputs; adapt(inputs, options) -> (inputs, options, real), outside of the clock.
    real (B, S), bool, marks the places of padded inputs that hold a row of the packed ones; None without padding.
    cuda: needs a CUDA device; around(): a context that it runs in, entered outside of the clock.
    by_default: whether it is timed on a CPU where no peer is named.
    """

    function: Callable
    adapt: Callable | None = None
    cuda: bool = False
    around: Callable[[], AbstractContextManager] = nullcontext
    by_default: bool = True


@dataclass(frozen=True)
class OptimizerPeer:
    """make(groups, lr) -> an optimizer over groups {"params", "weight_decay"} of float32 tensors, with BETAS and EPS.

    cuda: needs a CUDA device.
    """

    make: Callable[[list[dict], float], torch.optim.Optimizer]
    cuda: bool = False


BETAS, EPS, MOMENTUM = (0.9, 0.999), 1e-6, 0.95  # of all optimizers


def refuse(**given) -> None:
    """Unsupported, naming the arguments that are neither None, zero nor empty."""
    if names := [name for name, value in given.items() if isinstance(value, torch.Tensor) or value]:
        raise Unsupported(f"takes no {', '.join(names)}")


def add_residual(x, residual, dropout_p):
    h = F.dropout(x, dropout_p) if dropout_p else x
    return h if residual is None else residual + h


def norm_after_residual(normalize):
    """A peer of layer_norm or rms_norm: torch adds the residual, then normalize(h, weight, bias, eps) runs."""

    def call(x, weight=None, bias=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
        h = add_residual(x, residual, dropout_p)
        return normalize(h, weight, bias, eps), h

    return call


@dataclass(frozen=True)
class Loss:
    """The options of a loss, with the ops' defaults; a Peer's function gets those that its OpCase sets."""

    weight: torch.Tensor | None = None
    ignore_index: int = IGNORE_INDEX
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: str = "mean"
    inplace: bool = False

    def logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Where a loss may overwrite its logits, a copy of them, made within the clock as the OpCase makes it."""
        return logits + 0.0 if self.inplace else logits

    def reduce(self, losses: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of losses that are 0 where the target is ignored."""
        if self.reduction == "none":
            return losses
        return losses.sum() / (target != self.ignore_index).sum() if self.reduction == "mean" else losses.sum()


def _loss(options: dict) -> Loss:
    """The options as a Loss; Unsupported for those that no peer here is called with."""
    ours = ("softcap", "return_z_loss", "return_token_accuracy")
    refuse(**{name: value for name, value in options.items() if name in ours})
    return Loss(**{name: value for name, value in options.items() if name not in ours})


def loss_peer(function: Callable) -> Callable:
    """A peer of cross_entropy, of function(logits, target, loss: Loss)."""

    def call(logits, target, **options):
        loss = _loss(options)
        return function(loss.logits(logits), target, loss)

    return call


def linear_loss_peer(function: Callable) -> Callable:
    """A peer of linear_cross_entropy, of function(hidden, weight, target, bias, loss: Loss)."""

    def call(hidden, weight, target, bias=None, *, class_weight=None, **options):
        return function(hidden, weight, target, bias, _loss({"weight": class_weight, **options}))

    return call


def relative_bias(inputs, options):
    """T5's table, taken out of the inputs with its options, as the bias that all of its layers share, or None."""
    table = inputs.pop("table")
    bidirectional, max_distance = options.pop("bidirectional", True), options.pop("max_distance", 128)
    if table is None:
        return None
    place = torch.arange(inputs["q"].shape[1], device=table.device)
    buckets = relative_buckets(place - place[:, None], table.shape[0], bidirectional, max_distance)
    bias = F.embedding(buckets, table.detach()).permute(2, 0, 1)[None].to(inputs["q"].dtype).contiguous()
    return bias.requires_grad_()
