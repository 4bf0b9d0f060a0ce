"""NVIDIA's Transformer Engine ("te"), as of August 2026. Imported when a peer first runs."""

from __future__ import annotations

import functools
from importlib import import_module

import torch

from fastlm.bench.peers._peer import Loss, Peer, Unsupported, add_residual, loss_peer, refuse, relative_bias


def _library():
    return import_module("transformer_engine.pytorch")


def _norm(x, weight=None, bias=None, *, module, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
    h = add_residual(x, residual, dropout_p)
    return module(h), h


def _adapt_norm(name):
    """Its modules own their parameters: one module is made for every set of inputs, with a copy of the set's."""

    def adapt(inputs, options):
        weight, inputs = inputs["weight"], dict(inputs)
        made = getattr(_library(), name)
        module = made(weight.shape[0], eps=options.get("eps", 1e-5), device=weight.device, dtype=weight.dtype)
        for parameter in ("weight", "bias"):
            if inputs.get(parameter) is not None:
                with torch.no_grad():
                    getattr(module, parameter).copy_(inputs[parameter])
                inputs[parameter] = getattr(module, parameter)
        return {**inputs, "module": module}, options, None

    return adapt


@loss_peer
def _cross_entropy(logits, target, loss: Loss):
    """It takes (batch, sequence, vocabulary); its own mean is over the targets that are not ignored."""
    refuse(weight=loss.weight, z_loss=loss.z_loss)
    mean = loss.reduction == "mean"
    losses = _library().parallel_cross_entropy(
        logits[None], target[None], loss.label_smoothing, mean, None, loss.ignore_index
    )
    return losses if mean else loss.reduce(losses[0], target)


@functools.cache
def _gelu_module():
    return _library().ops.GELU()


def _gelu(x, bias=None, *, gate=None, approximate="none"):
    if gate is not None or approximate != "tanh":
        raise Unsupported("has the tanh form alone; gated, it takes x and gate as one tensor")
    return _gelu_module()(x if bias is None else x + bias)


@functools.cache
def _attention_module(heads, size, **options):
    """The module owns its dropout: the one that is checked, without dropout, and the timed one are two."""
    return _library().DotProductAttention(heads, size, **options)


def _attention(q, k, v, *, bias=None, causal=False, dropout_p=0.0, softmax_scale=None, site=0, **lengths):
    """lengths: cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k where the rows are packed."""
    if lengths:
        lengths["cu_seqlens_kv"], lengths["max_seqlen_kv"] = lengths.pop("cu_seqlens_k"), lengths.pop("max_seqlen_k")
        mask = "padding_causal" if causal else "padding"
    else:
        mask = "causal" if causal else "no_mask"
    module = _attention_module(
        q.shape[-2],
        q.shape[-1],
        num_gqa_groups=k.shape[-2],
        attention_dropout=dropout_p,
        qkv_format="thd" if lengths else "bshd",
        attn_mask_type=mask,
        softmax_scale=softmax_scale,
    )
    biased = {} if bias is None else {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": bias}
    return module(q, k, v, **lengths, **biased).reshape(q.shape)  # its output has the heads joined


def _adapt_attention(inputs, options):
    """Packed rows as they are, T5's table as a bias."""
    inputs, options = dict(inputs), dict(options)
    refuse(
        key_mask=inputs.pop("key_mask"),
        window_size="window_size" in options,
        cache_seqlens=inputs.get("cache_seqlens"),
    )
    inputs.pop("rng")
    bias = relative_bias(inputs, options)
    if bias is not None and "cu_seqlens_q" in inputs:
        raise Unsupported("takes no bias over packed rows")
    return {**inputs, "bias": bias}, options, None


PEERS = {
    "layer_norm": {"te": Peer(_norm, _adapt_norm("LayerNorm"), cuda=True)},
    "rms_norm": {"te": Peer(_norm, _adapt_norm("RMSNorm"), cuda=True)},
    "cross_entropy": {"te": Peer(_cross_entropy, cuda=True)},
    "gelu": {"te": Peer(_gelu, cuda=True)},
    "attention": {"te": Peer(_attention, _adapt_attention, cuda=True)},
}
