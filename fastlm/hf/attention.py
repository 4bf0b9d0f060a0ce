"""attn_implementation="fastlm": Transformers' attention interface on fastlm.ops.attention.

Transformers calls a mask function once per forward, and passes the mask to the attention function of every layer.
The mask function here returns what the op takes: None, or the key mask (B, keys), bool, True for a real token.
Causality and window come from the module (`is_causal`, `sliding_window`). Both are aligned bottom-right. A static cache
has room for more tokens than it holds; a key mask that is shorter than the cache cuts it to the tokens so far.

A call with output_attentions=True runs on the eager attention of the model's own module, with a warning: the fused
kernel never holds the weights.

Any other mask (a 4-D one that the user made, packed position_ids, a mask function combined with another) is 4-D. That
call runs on Transformers' "sdpa", with a warning.

T5's attention module takes its mask and options from here too (fastlm.hf.t5_attention). This module imports nothing of
fastlm.hf: unpickling a patched model (fastlm.hf._swap) registers the interface.
"""

from __future__ import annotations

import sys
import warnings

import torch

from fastlm import ops
from fastlm.ops import _registry

NAME = "fastlm"
_collector = None  # Transformers' variable with the outputs that the running forward collects; not in all versions


def register() -> None:
    """Makes attn_implementation="fastlm" known to Transformers, for `from_pretrained` too. `patch` does this."""
    global _collector
    from transformers import AttentionInterface, AttentionMaskInterface

    _collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, key_mask)


def key_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    allow_is_bidirectional_skip=None,
    use_vmap=False,
    device="cpu",
    **kwargs,
):
    """The mask function. Returns None, (B, keys), or Transformers' (B, 1, queries, keys)."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    # A bidirectional mask, with a window or not, says whether it may be skipped. With added functions it may not.
    causal = allow_is_bidirectional_skip is None
    known = mask_function is causal_mask_function if causal else allow_is_bidirectional_skip
    prefill = isinstance(q_offset, torch.Tensor) and q_length > 1  # into a static cache that holds tokens already
    if use_vmap or not known or (prefill and torch.compiler.is_compiling()):
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            use_vmap=use_vmap,
            device=device,
            **{**kwargs, "allow_is_causal_skip": False},
        )

    real = attention_mask
    if real is not None:
        missing = kv_offset + kv_length - real.shape[-1]
        real = torch.nn.functional.pad(real, (0, missing)) if missing > 0 else real
        real = real[:, kv_offset : kv_offset + kv_length]
    if causal and isinstance(q_offset, torch.Tensor) and q_length == 1:  # no shape depends on how full the cache is
        seen = (torch.arange(kv_length, device=device) + kv_offset <= q_offset).expand(batch_size, -1)
        return seen if real is None else seen & real
    if causal and (seen := int(q_offset) + q_length - kv_offset) < kv_length:
        real = torch.ones(batch_size, seen, dtype=torch.bool, device=device) if real is None else real[:, :seen]
    elif real is not None and real.device.type == "cpu" and not torch.compiler.is_compiling() and bool(real.all()):
        real = None  # on a device, the check would stall
    return real


_REFUSED = {
    "softcap": None,
    "s_aux": None,
    "cache": None,
    "position_bias": 'T5\'s is in its attention module: use fastlm.patch, not attn_implementation="fastlm" alone',
}


def refuse_options(options):
    """ValueError for options that the kernel lacks, and in an export to ONNX. Every patched attention calls it."""
    _registry.refuse_onnx()
    for name, why in _REFUSED.items():
        if options.get(name) is not None and options[name] is not False:
            why = why or "the fused kernel has no such thing"
            raise ValueError(
                f'{name}: expected none with attn_implementation="fastlm"; {why}. Use fastlm.unpatch(model), or for '
                'all families but T5 model.set_attn_implementation("eager")'
            )


def warn_other_mask():
    if not torch.compiler.is_compiling():
        warnings.warn(
            "fastlm: this attention mask is neither padding (B, keys) nor causal nor a window, so attention runs on "
            "Transformers' sdpa. Pass a 2-D attention_mask; for packed rows, cu_seq_lens_q, cu_seq_lens_k, "
            "max_length_q and max_length_k.",
            stacklevel=3,
        )


def wants_weights(module, options) -> bool:
    """Whether this call is to return attention weights. GPT-2 asks only through Transformers' collector of outputs."""
    if options.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    if _collector is None or (torch.compiler.is_compiling() and not _collector.compiling):  # a graph cannot read it
        return False
    return "attentions" in (_collector.get() or ())


def attend_eagerly(module, q, k, v, visible, options, bias=None):
    """The eager attention of the module's family: ((B, Sq, H, D), weights (B, H, Sq, Sk)).

    q, k, v (B, H, S, D); visible: bool, broadcasting to (B, H, Sq, Sk), or a mask to add; bias is added where it is
    True.
    """
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ValueError(
            f"output_attentions: expected False, since {type(module).__name__} has no eager attention of its own; use "
            "fastlm.unpatch(model)"
        )
    if not torch.compiler.is_compiling():
        warnings.warn(
            "fastlm: output_attentions=True runs on Transformers' eager attention, since the fused kernel never holds "
            "the weights. Leave it out to train or to measure time.",
            stacklevel=3,
        )
    if visible.dtype == torch.bool:
        bias = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias
        visible = torch.where(visible, bias, torch.finfo(q.dtype).min)
    return eager(module, q, k, v, visible, scaling=options["softmax_scale"], dropout=options["dropout_p"])


def visible_keys(queries, keys, mask, options, device):
    """(1 or B, 1, Sq, Sk) bool: what `attend` sees with the key mask, causality and window of `options`."""
    seen = keys if mask is None else mask.shape[1]
    distance = torch.arange(keys, device=device) - (torch.arange(queries, device=device)[:, None] + seen - queries)
    visible = (distance < seen).expand(1, 1, queries, keys)
    if options["causal"] and queries > 1:
        visible = visible & (distance <= 0)
    if "window_size" in options:
        left, right = options["window_size"]
        visible = visible & (distance >= -left) & (distance <= right)
    if mask is not None:
        visible = visible & torch.nn.functional.pad(mask, (0, keys - seen))[:, None, None, :]
    return visible


def module_is_causal(module, is_causal):
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A configuration can turn a decoder into an encoder.
    return is_causal and getattr(getattr(module, "config", None), "is_causal", True)


def in_autocast_dtype(*tensors):
    """q, k, v in one dtype, autocast's: rotary embeddings may leave q and k in another than v."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    sliding_window=None,
    **kwargs,
):
    """The attention function: query (B, H, Sq, D), key and value (B, Hkv, Sk, D) -> ((B, Sq, H, D), weights or None).

    Rows packed without padding come as one row with Transformers' cu_seq_lens_q, cu_seq_lens_k, max_length_q and
    max_length_k (DataCollatorWithFlattening makes them); no mask is read then.
    """
    refuse_options(kwargs)
    query, key, value = in_autocast_dtype(query, key, value)
    causal = module_is_causal(module, is_causal)
    options = {"softmax_scale": scaling, "dropout_p": dropout, "causal": causal}
    if sliding_window is not None:  # it counts the query's own position
        options["window_size"] = sliding_window - 1, 0 if causal else sliding_window - 1
    weights, packed = wants_weights(module, kwargs), packed_rows(query.shape[0], kwargs)
    if weights and packed is None:
        visible = attention_mask
        if visible is None or visible.dim() != 4:
            visible = visible_keys(query.shape[2], key.shape[2], attention_mask, options, query.device)
        return attend_eagerly(module, query, key, value, visible, options)
    if packed is not None:
        if weights:
            refuse_packed_weights()
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return ops.attention(q, k, v, **packed, **options)[None], None
    if attention_mask is not None and attention_mask.dim() == 4:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        warn_other_mask()
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attend(q, k, v, attention_mask, options), None


def packed_rows(batch, options) -> dict | None:
    """The arguments of ops.attention for rows that are packed into one, from Transformers'; None for a batch."""
    if options.get("cu_seq_lens_q") is None:
        return None
    if batch != 1:
        raise ValueError(
            f"cu_seq_lens_q: expected with one packed row, got a batch of {batch}; pack all sequences "
            "into one row, or leave cu_seq_lens_q out and pass an attention_mask"
        )
    for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
        if options.get(name) is None:
            raise ValueError(
                f"{name}: expected with cu_seq_lens_q, got none; "
                "DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes all four"
            )
    return {
        "cu_seqlens_q": options["cu_seq_lens_q"].int(),
        "cu_seqlens_k": options["cu_seq_lens_k"].int(),
        "max_seqlen_q": int(options["max_length_q"]),
        "max_seqlen_k": int(options["max_length_k"]),
    }


def refuse_packed_weights():
    raise ValueError(
        "output_attentions: expected False with cu_seq_lens_q, since no kernel holds the weights of packed "
        "rows; leave it out, or pass padded rows with an attention_mask"
    )


def attend(q, k, v, mask, options):
    """q (B, Sq, H, D), k, v (B, Sk, Hkv, D); a mask shorter than Sk cuts k and v."""
    if mask is not None and mask.shape[1] < k.shape[1]:
        k, v = (x[:, : mask.shape[1]] for x in (k, v))
    if q.shape[1] == 1 and "window_size" not in options:  # one query sees every key, wherever in a cache it stands
        options = {**options, "causal": False}
    return ops.attention(q, k, v, key_mask=mask, **options)
