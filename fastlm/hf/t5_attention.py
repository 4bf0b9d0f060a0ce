"""T5's attention module, with the relative bias inside fastlm.ops.attention."""

from __future__ import annotations

import torch

from fastlm import ops
from fastlm.hf._swap import Patched
from fastlm.hf.attention import (
    attend,
    attend_eagerly,
    in_autocast_dtype,
    module_is_causal,
    packed_rows,
    refuse_options,
    refuse_packed_weights,
    wants_weights,
    warn_other_mask,
)
from fastlm.ops._relative_bias import relative_buckets


class T5Attention(Patched):
    """T5's attention with the relative bias inside the kernel, which gives its table a gradient.

    Transformers passes the bias that the first layer made, (1, H, Sq, Sk), from layer to layer; here it passes the
    table (buckets, H), and None for cross-attention. With output_attentions=True T5's eager attention runs, with the
    bias as a matrix.
    """

    def forward(
        self, hidden_states, mask=None, key_value_states=None, position_bias=None, past_key_values=None, **kwargs
    ):
        refuse_options(kwargs)
        heads = (-1, self.key_value_proj_dim)
        q = self.q(hidden_states).unflatten(-1, heads)
        past = 0
        if past_key_values is None:
            k, v = (proj(hidden_states if key_value_states is None else key_value_states) for proj in (self.k, self.v))
            k, v = k.unflatten(-1, heads), v.unflatten(-1, heads)
        else:
            past = past_key_values.get_seq_length(self.layer_idx)
            past = past.clone() if isinstance(past, torch.Tensor) else past  # a static cache counts in place
            k, v = (x.transpose(1, 2) for x in self._cached(hidden_states, key_value_states, past_key_values, heads))

        if self.has_relative_attention_bias:
            # A copy: reentrant checkpointing makes what a layer returns its own result, never a parameter.
            position_bias = self.relative_attention_bias.weight.clone()
        q, k, v = in_autocast_dtype(q, k, v)
        options = {"softmax_scale": self.scaling, "dropout_p": self.dropout if self.training else 0.0}
        causal = module_is_causal(self, None)
        other_mask = mask is not None and mask.dim() == 4
        weights, wanted = None, wants_weights(self, kwargs)
        packed = packed_rows(q.shape[0], kwargs)
        if packed is not None:
            self._check_packed(key_value_states, wanted)
            mask, other_mask = None, False
        if other_mask and not wanted:
            warn_other_mask()
        aligned = isinstance(past, int) and past + q.shape[1] == k.shape[1]
        if wanted:
            bias = self._bias(q, k, mask, position_bias, past, causal)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out, weights = attend_eagerly(self, q, k, v, bias, options)
        elif other_mask or (position_bias is not None and key_value_states is None and causal and not aligned):
            out = self._attend_by_bias(q, k, v, mask, position_bias, past, causal, options)
        else:
            if position_bias is not None:
                options["relative_bias"] = ops.RelativeBias(
                    position_bias, bidirectional=not self.is_decoder, max_distance=self.relative_attention_max_distance
                )
            if packed is None:
                out = attend(q, k, v, mask, {**options, "causal": causal})
            else:
                out = ops.attention(q[0], k[0], v[0], **packed, **options)[None]
        return self.o(out.flatten(-2)), position_bias, weights

    def _check_packed(self, key_value_states, weights):
        """ValueError where packed rows cannot be computed."""
        if self.is_decoder or key_value_states is not None:
            raise ValueError(
                "cu_seq_lens_q: expected for T5's encoder alone (T5EncoderModel), since one set of offsets cannot "
                "divide the input and the target; got it in the decoder. Pass padded rows with an attention_mask"
            )
        if weights:
            refuse_packed_weights()

    def _cached(self, hidden_states, key_value_states, cache, heads):
        """k, v (B, H, Sk, D) out of the cache and, but for a cross-attention that is there already, added to it."""
        from transformers import EncoderDecoderCache

        cross, both = key_value_states is not None, isinstance(cache, EncoderDecoderCache)
        own = cache
        if both:
            own = cache.cross_attention_cache if cross else cache.self_attention_cache
            if cross and cache.is_updated.get(self.layer_idx):
                return own.layers[self.layer_idx].keys, own.layers[self.layer_idx].values
        states = key_value_states if cross else hidden_states
        k, v = (proj(states).unflatten(-1, heads).transpose(1, 2) for proj in (self.k, self.v))
        k, v = own.update(k, v, self.layer_idx)
        if cross and both:
            cache.is_updated[self.layer_idx] = True
        return k, v

    def _attend_by_bias(self, q, k, v, mask, table, past, causal, options):
        """With the bias as a matrix, by torch: for 4-D masks, and where keys follow that are not filled yet."""
        bias = self._bias(q, k, mask, table, past, causal)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, scale=options["softmax_scale"], dropout_p=options["dropout_p"]
        )
        return out.transpose(1, 2)

    def _bias(self, q, k, mask, table, past, causal):
        """Relative bias, mask and causality as one matrix to add, broadcasting to (B, H, Sq, Sk)."""
        query = torch.arange(q.shape[1], device=q.device)[:, None] + past
        relative = torch.arange(k.shape[1], device=q.device) - query
        visible = relative <= 0 if causal else torch.ones_like(relative, dtype=torch.bool)
        bias = torch.zeros((), dtype=q.dtype, device=q.device)
        if mask is not None and mask.dim() == 4:
            visible = mask if mask.dtype == torch.bool else torch.ones_like(visible)
            bias = bias if mask.dtype == torch.bool else mask
        elif mask is not None:
            mask = torch.nn.functional.pad(mask, (0, k.shape[1] - mask.shape[1]))
            visible = visible & mask[:, None, None, :]
        if table is not None:
            buckets = relative_buckets(
                relative, table.shape[0], not self.is_decoder, self.relative_attention_max_distance
            )
            bias = bias + table[buckets].movedim(-1, 0).to(q.dtype)
        return torch.where(visible, bias, torch.finfo(q.dtype).min)
