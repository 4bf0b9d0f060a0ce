"""Plain torch, as a model's author writes it, with torch's own random numbers: eager, SDPA, chunked loss.

bench_ops compiles the eager form of an op as one more peer.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlm.bench.peers._peer import (
    BETAS,
    EPS,
    MOMENTUM,
    OptimizerPeer,
    Peer,
    Unsupported,
    add_residual,
    refuse,
    relative_bias,
)
from fastlm.ops import IGNORE_INDEX


def layer_norm(x, weight=None, bias=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
    h = add_residual(x, residual, dropout_p)
    return F.layer_norm(h, h.shape[-1:], weight, bias, eps), h


def rms_norm(x, weight=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
    h = add_residual(x, residual, dropout_p)
    return F.rms_norm(h, h.shape[-1:], weight, eps), h


def cross_entropy(
    logits,
    target,
    *,
    z_loss=0.0,
    softcap=None,
    inplace=False,
    return_z_loss=False,
    return_token_accuracy=False,
    **options,
):
    """options: weight, ignore_index, label_smoothing, reduction, by torch's own names."""
    refuse(z_loss=z_loss, return_z_loss=return_z_loss, return_token_accuracy=return_token_accuracy)
    if inplace:  # the OpCase overwrites a copy, made within the clock: every contender makes one
        logits = logits + 0.0
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options)


def linear_cross_entropy(hidden, weight, target, bias=None, *, class_weight=None, **options):
    return cross_entropy(F.linear(hidden, weight, bias), target, weight=class_weight, **options)


def linear_cross_entropy_chunked(
    hidden,
    weight,
    target,
    bias=None,
    *,
    class_weight=None,
    z_loss=0.0,
    softcap=None,
    return_z_loss=False,
    return_token_accuracy=False,
    **options,
):
    """torch's own, with its default chunks."""
    refuse(z_loss=z_loss, softcap=softcap, return_z_loss=return_z_loss, return_token_accuracy=return_token_accuracy)
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unsupported(f"torch {torch.__version__} has no chunked linear_cross_entropy; 2.13 has")
    chunks = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(
        hidden, weight, target, linear_bias=bias, weight=class_weight, options=chunks, **options
    )


def gelu(x, bias=None, *, gate=None, approximate="none"):
    y = F.gelu(x if bias is None else x + bias, approximate=approximate)
    return y if gate is None else y * gate


def silu(x, *, gate=None):
    y = F.silu(x)
    return y if gate is None else y * gate


def embedding(
    input_ids,
    word,
    position=None,
    token_type=None,
    *,
    positions=None,
    token_type_ids=None,
    weight=None,
    bias=None,
    eps=1e-12,
    dropout_p=0.0,
    rng=None,
    site=0,
    padding_idx=None,
):
    h = F.embedding(input_ids, word, padding_idx)
    if position is not None:
        h = h + (position[: input_ids.shape[-1]] if positions is None else F.embedding(positions, position))
    if token_type is not None:
        h = h + (token_type[0] if token_type_ids is None else F.embedding(token_type_ids, token_type))
    if weight is not None:
        h = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    return F.dropout(h, dropout_p) if dropout_p else h


def dropout(x, p=0.5, *, rng=None, site=0, relu=False):
    return F.dropout(F.relu(x) if relu else x, p)


def mlm_mask(
    input_ids,
    *,
    mask_token_id,
    vocab_size,
    special_ids,
    seed,
    epoch=0,
    sample_ids=None,
    positions=None,
    special_tokens_mask=None,
    mlm_probability=0.15,
    mask_replace_prob=0.8,
    random_replace_prob=0.1,
    word_starts=None,
    capacity=None,
):
    """Three random passes, as Transformers' collator makes them, the special tokens told apart on the device."""
    if word_starts is not None:
        raise Unsupported("whole words take a loop in Python")
    special = special_tokens_mask
    if special is None:
        special = torch.isin(input_ids, torch.tensor(special_ids, device=input_ids.device))
    selected = (torch.rand(input_ids.shape, device=input_ids.device) < mlm_probability) & ~special
    labels = torch.where(selected, input_ids, IGNORE_INDEX)
    replaced = selected & (torch.rand(input_ids.shape, device=input_ids.device) < mask_replace_prob)
    masked = torch.where(replaced, mask_token_id, input_ids)
    share = random_replace_prob / max(1e-9, 1.0 - mask_replace_prob)
    randomised = selected & ~replaced & (torch.rand(input_ids.shape, device=input_ids.device) < share)
    return torch.where(randomised, torch.randint_like(input_ids, vocab_size), masked), labels


# ---- attention: heads before positions, a mask that is added, as models hand it over


def attention_scores(q, k, v, *, key_mask=None, bias=None, causal=False, dropout_p=0.0, softmax_scale=None, site=0):
    """The scores in memory, (B, H, S, S)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    mask = _mask(q, key_mask, bias, causal)
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    return (F.dropout(weights, dropout_p) @ v).transpose(1, 2)


def attention_sdpa(q, k, v, *, key_mask=None, bias=None, causal=False, dropout_p=0.0, softmax_scale=None, site=0):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    alone = key_mask is None and bias is None
    mask = None if alone else _mask(q, key_mask, bias, causal)
    options = {"dropout_p": dropout_p, "is_causal": causal and alone, "scale": softmax_scale}
    options["enable_gqa"] = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, **options).transpose(1, 2)


def _mask(q, key_mask, bias, causal):
    """What is added to the scores, broadcast over (B, H, S, S), or None."""
    mask = bias
    if causal:
        size = q.shape[2]
        later = q.new_full((size, size), -torch.inf).triu(1)
        mask = later if mask is None else mask + later
    if key_mask is not None:
        padding = q.new_zeros(key_mask.shape).masked_fill(~key_mask, -torch.inf)[:, None, None]
        mask = padding if mask is None else mask + padding
    return mask


def adapt_attention(inputs, options, biased=True):
    """Packed rows become padded ones with a key mask, T5's table a bias. biased: whether the peer takes what is added.

    Unsupported for what torch has no form of, and, with biased=False, for all that needs a mask.
    """
    inputs, options = dict(inputs), dict(options)
    if "window_size" in options:
        raise Unsupported("windows are not written here")
    cu_seqlens, lengths = inputs.pop("cu_seqlens_q", None), inputs.pop("cache_seqlens", None)
    if lengths is not None:
        if options.get("causal") or cu_seqlens is not None or inputs["table"] is not None:
            raise Unsupported("against a cache, only queries that see all keys are written here")
        most = int(lengths.max())
        inputs["k"], inputs["v"] = inputs["k"][:, :most], inputs["v"][:, :most]
        if int(lengths.min()) < most:
            inputs["key_mask"] = torch.arange(most, device=lengths.device) < lengths[:, None]
    for name in ("rng", "cu_seqlens_k", "max_seqlen_k"):
        inputs.pop(name, None)
    real = None
    if cu_seqlens is not None and inputs["table"] is not None:
        raise Unsupported("a bias over packed rows is not written here")
    if not biased and any(x is not None for x in (cu_seqlens, inputs["table"], inputs["key_mask"])):
        raise Unsupported("takes no mask for padding and no bias")
    if cu_seqlens is not None:
        real = torch.arange(inputs.pop("max_seqlen_q"), device=cu_seqlens.device) < cu_seqlens.diff()[:, None]
        for name in ("q", "k", "v"):
            padded = inputs[name].new_zeros(*real.shape, *inputs[name].shape[1:])
            padded[real] = inputs[name].detach()
            inputs[name] = padded.requires_grad_()
        inputs["key_mask"] = real
    bias = relative_bias(inputs, options)
    return (inputs if bias is None else {**inputs, "bias": bias}), options, real


PEERS = {
    "layer_norm": {"eager": Peer(layer_norm)},
    "rms_norm": {"eager": Peer(rms_norm)},
    "cross_entropy": {"eager": Peer(cross_entropy)},
    "linear_cross_entropy": {"eager": Peer(linear_cross_entropy), "chunked": Peer(linear_cross_entropy_chunked)},
    "mlm_mask": {"eager": Peer(mlm_mask)},
    "gelu": {"eager": Peer(gelu)},
    "silu": {"eager": Peer(silu)},
    "embedding": {"eager": Peer(embedding)},
    "dropout": {"eager": Peer(dropout)},
    "attention": {
        "eager": Peer(attention_scores, adapt_attention),
        "sdpa": Peer(attention_sdpa, adapt_attention),
        "sdpa-flash": Peer(
            attention_sdpa,
            partial(adapt_attention, biased=False),
            around=partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION),
            by_default=False,  # a CPU's sdpa takes this kernel by itself
        ),
        "sdpa-cudnn": Peer(
            attention_sdpa, adapt_attention, cuda=True, around=partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)
        ),
    },
}


def _adamw(groups, lr, **form):
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPS, **form)


def _muon(groups, lr):
    return torch.optim.Muon(groups, lr=lr, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")


OPTIMIZERS = {
    "adamw": {
        "eager": OptimizerPeer(partial(_adamw, foreach=False)),
        "foreach": OptimizerPeer(partial(_adamw, foreach=True)),
        "fused": OptimizerPeer(partial(_adamw, fused=True)),
    },
    "muon": {"eager": OptimizerPeer(_muon)},
}
