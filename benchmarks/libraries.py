"""Peers that a user may have installed beside us: Liger-Kernel, flash-attn, NVIDIA's apex, Transformer Engine, quack,
and Transformers' collator.

Each is called as its own documentation has it, imported when it first runs, and stands where it offers the op. What it
does not fuse (a residual, a dropout, a bias) torch does around it, as a model's author would write it. All need CUDA
but the collator, which is for a CPU.
Written against liger-kernel, flash-attn, apex and Transformer Engine of August 2026, and quack 0.6.4.
"""

from __future__ import annotations

import functools
from importlib import import_module

import torch
import torch.nn.functional as F
from peers import Peer, Unsupported, relative_bias, residual_stream


def _refuse(**given) -> None:
    """Unsupported, naming the arguments that are more than nothing."""
    if names := [name for name, value in given.items() if isinstance(value, torch.Tensor) or value]:
        raise Unsupported(f"takes no {', '.join(names)}")


# ---- layer_norm and rms_norm: of (h, weight, bias, eps), behind a residual stream that is torch's


def _norm(normalize):
    def call(x, weight=None, bias=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
        h = residual_stream(x, residual, dropout_p)
        return normalize(h, weight, bias, eps), h

    return call


def _liger_layer_norm(h, weight, bias, eps):
    return import_module("liger_kernel.transformers.functional").liger_layer_norm(h, weight, bias, eps)


def _liger_rms_norm(x, weight=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
    # in_place, its default, would overwrite the gradient that it is handed, which here is every call's.
    liger = import_module("liger_kernel.transformers.functional")
    x = F.dropout(x, dropout_p) if dropout_p else x
    if residual is None:
        return liger.liger_rms_norm(x, weight, eps, in_place=False), x
    return liger.liger_fused_add_rms_norm(x, residual, weight, eps, in_place=False)


def _flash_norm(name):
    def call(x, weight=None, bias=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
        norm = getattr(import_module("flash_attn.ops.triton.layer_norm"), name)
        fused = residual is not None or dropout_p > 0  # else h is x itself
        options = {"residual": residual, "eps": eps, "dropout_p": dropout_p, "prenorm": fused}
        out = norm(x, weight, bias, **options)
        return out if fused else (out, x)

    return call


def _apex_layer_norm(h, weight, bias, eps):
    fused = import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return fused(h, weight, bias, h.shape[-1:], eps)


def _apex_rms_norm(h, weight, bias, eps):
    return import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine(h, weight, h.shape[-1:], eps)


def _apex_fast_layer_norm(h, weight, bias, eps):
    return import_module("apex.contrib.layer_norm.layer_norm").FastLayerNormFN.apply(h, weight, bias, eps, False)


def _te_norm(x, weight=None, bias=None, *, module, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
    h = residual_stream(x, residual, dropout_p)
    return module(h), h


def _adapt_te_norm(name):
    """Its modules own their parameters: one is made for every set of inputs, with a copy of the set's."""

    def adapt(inputs, options):
        made = getattr(import_module("transformer_engine.pytorch"), name)
        weight, inputs = inputs["weight"], dict(inputs)
        kind = {"device": weight.device, "dtype": weight.dtype}
        module = made(weight.shape[0], eps=options.get("eps", 1e-5), **kind)
        for parameter in ("weight", "bias"):
            if inputs.get(parameter) is not None:
                with torch.no_grad():
                    getattr(module, parameter).copy_(inputs[parameter])
                inputs[parameter] = getattr(module, parameter)
        return {**inputs, "module": module}, options, None

    return adapt


def _quack_layer_norm(x, weight, bias=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
    """Forward alone, with the statistics that a backward would read: it has no autograd function."""
    _refuse(residual=residual, dropout_p=dropout_p)
    forward = import_module("quack.rmsnorm").layernorm_fwd
    return forward(x, weight, bias, eps=eps, return_rstd=True, return_mean=True)[0], x


def _adapt_quack_layer_norm(inputs, options):
    """Its weight and bias are float32; without a gradient asked for, only the forward is timed."""
    inputs = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    parameters = {name: inputs[name].float() for name in ("weight", "bias") if inputs[name] is not None}
    return {**inputs, **parameters}, options, None


def _quack_rms_norm(x, weight=None, *, eps=1e-5, residual=None, dropout_p=0.0, rng=None, site=0):
    norm = import_module("quack.rmsnorm").rmsnorm
    x = F.dropout(x, dropout_p) if dropout_p else x
    if residual is None:
        return norm(x, weight, eps=eps), x
    return norm(x, weight, residual=residual, eps=eps, prenorm=True)


# ---- cross_entropy and linear_cross_entropy


def _mean(losses, target, ignore_index, reduction):
    """Of losses that are 0 where the target is ignored."""
    if reduction == "none":
        return losses
    return losses.sum() / (target != ignore_index).sum() if reduction == "mean" else losses.sum()


def _copied(logits, inplace):
    """What may be overwritten: a copy, made within the clock, as peers.cross_entropy makes it."""
    return logits + 0.0 if inplace else logits


def _liger_cross_entropy(
    logits, target, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean", inplace=False
):  # its forward overwrites the logits in any case: it can stand beside inplace=True alone, and is told so by the check
    return import_module("liger_kernel.transformers.functional").liger_cross_entropy(
        _copied(logits, inplace), target, weight=weight, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing, lse_square_scale=z_loss,
    )  # fmt: skip


def _flash_cross_entropy(
    logits, target, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean", inplace=False
):
    _refuse(weight=weight)
    losses, _ = import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss(
        _copied(logits, inplace), target, label_smoothing=label_smoothing, lse_square_scale=z_loss,
        ignore_index=ignore_index, inplace_backward=inplace,
    )  # fmt: skip
    return _mean(losses, target, ignore_index, reduction)


def _apex_cross_entropy(
    logits, target, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean", inplace=False
):
    _refuse(weight=weight, z_loss=z_loss)
    loss = import_module("apex.contrib.xentropy").SoftmaxCrossEntropyLoss
    to_float = logits.dtype != torch.float32
    losses = loss.apply(_copied(logits, inplace), target, label_smoothing, ignore_index, to_float)
    return _mean(losses, target, ignore_index, reduction)


def _te_cross_entropy(
    logits, target, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean", inplace=False
):
    _refuse(weight=weight, z_loss=z_loss)
    # (batch, sequence, vocabulary); its own mean is over the targets that count
    losses = import_module("transformer_engine.pytorch").parallel_cross_entropy(
        _copied(logits, inplace)[None], target[None], label_smoothing, reduction == "mean", None, ignore_index
    )
    return losses if reduction == "mean" else _mean(losses[0], target, ignore_index, reduction)


def _quack_cross_entropy(
    logits, target, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean", inplace=False
):
    _refuse(label_smoothing=label_smoothing, z_loss=z_loss)
    return import_module("quack.cross_entropy").cross_entropy(
        _copied(logits, inplace), target, weight=weight, ignore_index=ignore_index, reduction=reduction,
        inplace_backward=inplace,
    )  # fmt: skip


def _liger_linear_cross_entropy(
    hidden, weight, target, bias=None, *, class_weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
    reduction="mean",
):  # fmt: skip
    return import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy(
        hidden, weight, target, bias=bias, ce_weight=class_weight, ignore_index=ignore_index,
        lse_square_scale=z_loss, label_smoothing=label_smoothing, reduction=reduction,
    )  # fmt: skip


def _quack_linear_cross_entropy(
    hidden, weight, target, bias=None, *, class_weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
    reduction="mean",
):  # fmt: skip
    _refuse(bias=bias, class_weight=class_weight, label_smoothing=label_smoothing, z_loss=z_loss)
    loss = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return loss(hidden, weight, target, ignore_index=ignore_index, reduction=reduction)


# ---- gelu


def _liger_gelu(x, bias=None, *, gate=None, approximate="none"):
    if gate is None or approximate != "tanh":
        raise Unsupported("has the gated tanh form alone")
    x = x if bias is None else x + bias
    return import_module("liger_kernel.transformers.functional").liger_geglu(x, gate)


def _adapt_liger_gelu(inputs, options):
    """Copies: its backward puts the gradients where x and gate are. So what it is timed on drifts from call to call."""
    copies = {
        name: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for name, x in inputs.items()
    }
    return copies, options, None


@functools.cache
def _te_gelu_module():
    return import_module("transformer_engine.pytorch").ops.GELU()


def _te_gelu(x, bias=None, *, gate=None, approximate="none"):
    if gate is not None or approximate != "tanh":
        raise Unsupported("has the tanh form alone; gated, it takes x and gate as one tensor")
    return _te_gelu_module()(x if bias is None else x + bias)


# ---- attention: both take packed rows as they are


def _flash_attention(
    q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=False,
    dropout_p=0.0, softmax_scale=None, window_size=(-1, -1), site=0,
):  # fmt: skip
    library = import_module("flash_attn")
    options = {
        "dropout_p": dropout_p,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
    }
    if cu_seqlens_q is None:
        return library.flash_attn_func(q, k, v, **options)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return library.flash_attn_varlen_func(q, k, v, *lengths, **options)


def _adapt_flash_attention(inputs, options):
    inputs = dict(inputs)
    _refuse(key_mask=inputs.pop("key_mask"), relative_bias=inputs.pop("table"))
    inputs.pop("rng")
    return inputs, options, None


@functools.cache
def _te_attention_module(heads, size, groups, dropout, layout, mask, scale):
    return import_module("transformer_engine.pytorch").DotProductAttention(
        heads, size, num_gqa_groups=groups, attention_dropout=dropout, qkv_format=layout, attn_mask_type=mask,
        softmax_scale=scale,
    )  # fmt: skip


def _te_attention(
    q, k, v, *, bias=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=False,
    dropout_p=0.0, softmax_scale=None, site=0,
):  # fmt: skip
    lengths = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_kv": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_kv": max_seqlen_k,
    }
    packed = cu_seqlens_q is not None
    mask = ("padding_causal" if causal else "padding") if packed else ("causal" if causal else "no_mask")
    # The module owns its dropout: the one that is checked, without, and the one that is timed are two.
    layout, groups = "thd" if packed else "bshd", k.shape[-2]
    module = _te_attention_module(q.shape[-2], q.shape[-1], groups, dropout_p, layout, mask, softmax_scale)
    biased = {} if bias is None else {"core_attention_bias_type": "post_scale_bias", "core_attention_bias": bias}
    return module(q, k, v, **(lengths if packed else {}), **biased).reshape(q.shape)  # it joins the heads


def _adapt_te_attention(inputs, options):
    inputs, options = dict(inputs), dict(options)
    _refuse(key_mask=inputs.pop("key_mask"), window_size="window_size" in options)
    inputs.pop("rng")
    bias = relative_bias(inputs, options)
    if bias is not None and "cu_seqlens_q" in inputs:
        raise Unsupported("takes no bias over packed rows")
    return {**inputs, "bias": bias}, options, None


# ---- mlm_mask


@functools.cache
def _transformers_collator(vocab_size, special_ids, mask_token_id, mlm_probability):
    """With a tokenizer that knows the ids."""
    transformers, tokenizers = import_module("transformers"), import_module("tokenizers")
    model = tokenizers.models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token=str(special_ids[0]))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), mask_token=str(mask_token_id), pad_token=str(special_ids[0]),
        extra_special_tokens=[str(i) for i in special_ids[1:]],
    )  # fmt: skip
    return transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)


def _transformers_mlm_mask(
    input_ids, *, mask_token_id, vocab_size, special_ids, seed, epoch=0, sample_ids=None, positions=None,
    special_tokens_mask=None, mlm_probability=0.15, word_starts=None,
):  # fmt: skip
    """Its masking alone, of a batch that is put together; without a special_tokens_mask it asks the tokenizer."""
    _refuse(word_starts=word_starts)
    collator = _transformers_collator(vocab_size, special_ids, mask_token_id, mlm_probability)
    rows = input_ids.clone().reshape(-1, input_ids.shape[-1])
    return tuple(x.view_as(input_ids) for x in collator.torch_mask_tokens(rows, special_tokens_mask))


def _peer(function, adapt=None) -> Peer:
    return Peer(function, adapt, cuda=True)


LIBRARIES: dict[str, dict[str, Peer]] = {
    "layer_norm": {
        "liger": _peer(_norm(_liger_layer_norm)),
        "flash_attn": _peer(_flash_norm("layer_norm_fn")),
        "apex": _peer(_norm(_apex_layer_norm)),
        "apex fast": _peer(_norm(_apex_fast_layer_norm)),
        "te": _peer(_te_norm, _adapt_te_norm("LayerNorm")),
        "quack": _peer(_quack_layer_norm, _adapt_quack_layer_norm),
    },
    "rms_norm": {
        "liger": _peer(_liger_rms_norm),
        "flash_attn": _peer(_flash_norm("rms_norm_fn")),
        "apex": _peer(_norm(_apex_rms_norm)),
        "te": _peer(_te_norm, _adapt_te_norm("RMSNorm")),
        "quack": _peer(_quack_rms_norm),
    },
    "cross_entropy": {
        "liger": _peer(_liger_cross_entropy),
        "flash_attn": _peer(_flash_cross_entropy),
        "apex": _peer(_apex_cross_entropy),
        "te": _peer(_te_cross_entropy),
        "quack": _peer(_quack_cross_entropy),
    },
    "linear_cross_entropy": {
        "liger": _peer(_liger_linear_cross_entropy),
        "quack": _peer(_quack_linear_cross_entropy),
    },
    "mlm_mask": {"transformers": Peer(_transformers_mlm_mask)},
    "gelu": {
        "liger": _peer(_liger_gelu, _adapt_liger_gelu),
        "te": _peer(_te_gelu),
    },
    "attention": {
        "flash_attn": _peer(_flash_attention, _adapt_flash_attention),
        "te": _peer(_te_attention, _adapt_te_attention),
    },
}
