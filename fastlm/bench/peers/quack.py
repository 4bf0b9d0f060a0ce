"""quack 0.6.4. Imported when a peer first runs."""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F

from fastlm.bench.peers._peer import Loss, Peer, linear_loss_peer, loss_peer, refuse


def _layer_norm(x, weight, bias=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
    """Forward alone, with the statistics that a backward would read: the library has no backward of it."""
    refuse(residual=residual, dropout_p=dropout_p)
    forward = import_module("quack.rmsnorm").layernorm_fwd
    return forward(x, weight, bias, eps=eps, return_rstd=True, return_mean=True)[0], x


def _adapt_layer_norm(inputs, options):
    """Weight and bias in float32; detached, so that only the forward is timed."""
    inputs = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    parameters = {name: inputs[name].float() for name in ("weight", "bias") if inputs[name] is not None}
    return {**inputs, **parameters}, options, None


def _rms_norm(x, weight=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
    norm = import_module("quack.rmsnorm").rmsnorm
    x = F.dropout(x, dropout_p) if dropout_p else x
    if residual is None:
        return norm(x, weight, eps=eps), x
    return norm(x, weight, residual=residual, eps=eps, prenorm=True)


@loss_peer
def _cross_entropy(logits, target, loss: Loss):
    refuse(label_smoothing=loss.label_smoothing, z_loss=loss.z_loss)
    return import_module("quack.cross_entropy").cross_entropy(
        logits,
        target,
        weight=loss.weight,
        ignore_index=loss.ignore_index,
        reduction=loss.reduction,
        inplace_backward=loss.inplace,
    )


@linear_loss_peer
def _linear_cross_entropy(hidden, weight, target, bias, loss: Loss):
    refuse(bias=bias, class_weight=loss.weight, label_smoothing=loss.label_smoothing, z_loss=loss.z_loss)
    chunked = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return chunked(hidden, weight, target, ignore_index=loss.ignore_index, reduction=loss.reduction)


PEERS = {
    "layer_norm": {"quack": Peer(_layer_norm, _adapt_layer_norm, cuda=True)},
    "rms_norm": {"quack": Peer(_rms_norm, cuda=True)},
    "cross_entropy": {"quack": Peer(_cross_entropy, cuda=True)},
    "linear_cross_entropy": {"quack": Peer(_linear_cross_entropy, cuda=True)},
}
