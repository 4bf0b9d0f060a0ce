"""Liger-Kernel, as of August 2026. Imported when a peer first runs."""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F

from fastlm.bench.peers._peer import Loss, Peer, Unsupported, linear_loss_peer, loss_peer, norm_after_residual


def _functional():
    return import_module("liger_kernel.transformers.functional")


@norm_after_residual
def _layer_norm(h, weight, bias, eps):
    return _functional().liger_layer_norm(h, weight, bias, eps)


def _rms_norm(x, weight=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
    # in_place, its default, would overwrite the gradient that it is given, which here every call shares.
    x = F.dropout(x, dropout_p) if dropout_p else x
    if residual is None:
        return _functional().liger_rms_norm(x, weight, eps, in_place=False), x
    return _functional().liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)


@loss_peer
def _cross_entropy(logits, target, loss: Loss):
    """Its forward always overwrites the logits, so it passes the check before the clock only with inplace=True."""
    return _functional().liger_cross_entropy(
        logits,
        target,
        weight=loss.weight,
        ignore_index=loss.ignore_index,
        reduction=loss.reduction,
        label_smoothing=loss.label_smoothing,
        lse_square_scale=loss.z_loss,
    )


@linear_loss_peer
def _linear_cross_entropy(hidden, weight, target, bias, loss: Loss):
    return _functional().liger_fused_linear_cross_entropy(
        hidden,
        weight,
        target,
        bias=bias,
        ce_weight=loss.weight,
        ignore_index=loss.ignore_index,
        lse_square_scale=loss.z_loss,
        label_smoothing=loss.label_smoothing,
        reduction=loss.reduction,
    )


def _gelu(x, bias=None, *, gate=None, approximate="none"):
    if gate is None or approximate != "tanh":
        raise Unsupported("has the gated tanh form alone")
    return _functional().liger_geglu(x if bias is None else x + bias, gate)


def _silu(x, *, gate=None):
    if gate is None:
        raise Unsupported("has the gated form alone")
    return _functional().liger_swiglu(x, gate)


def _adapt_gated(inputs, options):
    """Copies: its backward writes the gradients over x and gate. So its inputs drift from call to call."""
    copies = {
        name: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for name, x in inputs.items()
    }
    return copies, options, None


PEERS = {
    "layer_norm": {"liger": Peer(_layer_norm, cuda=True)},
    "rms_norm": {"liger": Peer(_rms_norm, cuda=True)},
    "cross_entropy": {"liger": Peer(_cross_entropy, cuda=True)},
    "linear_cross_entropy": {"liger": Peer(_linear_cross_entropy, cuda=True)},
    "gelu": {"liger": Peer(_gelu, _adapt_gated, cuda=True)},
    "silu": {"liger": Peer(_silu, _adapt_gated, cuda=True)},
}
