"""NVIDIA's apex, as of August 2026. Imported when a peer first runs."""

from __future__ import annotations

from importlib import import_module

import torch

from fastlm.bench.peers._peer import BETAS, EPS, Loss, OptimizerPeer, Peer, loss_peer, norm_after_residual, refuse


@norm_after_residual
def _layer_norm(h, weight, bias, eps):
    fused = import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return fused(h, weight, bias, h.shape[-1:], eps)


@norm_after_residual
def _fast_layer_norm(h, weight, bias, eps):
    return import_module("apex.contrib.layer_norm.layer_norm").FastLayerNormFN.apply(h, weight, bias, eps, False)


@norm_after_residual
def _rms_norm(h, weight, bias, eps):
    return import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine(h, weight, h.shape[-1:], eps)


@loss_peer
def _cross_entropy(logits, target, loss: Loss):
    refuse(weight=loss.weight, z_loss=loss.z_loss)
    to_float = logits.dtype != torch.float32
    losses = import_module("apex.contrib.xentropy").SoftmaxCrossEntropyLoss.apply(
        logits, target, loss.label_smoothing, loss.ignore_index, to_float
    )
    return loss.reduce(losses, target)


PEERS = {
    "layer_norm": {"apex": Peer(_layer_norm, cuda=True), "apex fast": Peer(_fast_layer_norm, cuda=True)},
    "rms_norm": {"apex": Peer(_rms_norm, cuda=True)},
    "cross_entropy": {"apex": Peer(_cross_entropy, cuda=True)},
}


def _adam(groups, lr):
    return import_module("apex.optimizers").FusedAdam(groups, lr=lr, betas=BETAS, eps=EPS, adam_w_mode=True)


def _lamb(groups, lr):
    # It clips the norm of all gradients by default, and leaves the updates in the gradients.
    return import_module("apex.optimizers").FusedLAMB(groups, lr=lr, betas=BETAS, eps=EPS, max_grad_norm=1e30)


OPTIMIZERS = {
    "adamw": {"apex": OptimizerPeer(_adam, cuda=True)},
    "lamb": {"apex": OptimizerPeer(_lamb, cuda=True)},
}
