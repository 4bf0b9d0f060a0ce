"""Transformers' modules on fastlm's ops, as mixins (fastlm.hf._swap): norms, activations, and the blocks around them.

Each `forward` gives the results of the class that it replaces. A part that Transformers did not put there (an adapter
in place of a Linear, a hook, a norm wrapped by another module) is called as it is, and is not fused with its
neighbours.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F

from fastlm import nn, ops
from fastlm.hf._swap import Patched, bare

# ---- norms


class FusedNorm(Patched):
    """A norm whose forward takes (x, residual=None, dropout_p=, return_residual=), as fastlm.nn.LayerNorm's."""


class LayerNorm(FusedNorm):
    """torch.nn.LayerNorm."""

    keep_dtype = False
    forward = nn.LayerNorm.forward


class RMSNorm(FusedNorm):
    """LlamaRMSNorm: the result has the promoted dtype of input and weight, with or without autocast."""

    def forward(self, hidden_states, residual=None, **options):
        x, weight = hidden_states, self.weight
        dtype, device = torch.promote_types(x.dtype, weight.dtype), x.device.type
        off = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
        with off:
            return ops.rms_norm(x.to(dtype), weight, eps=self.variance_epsilon, residual=residual, **options)


class T5LayerNorm(RMSNorm):
    """T5's: the result has the weight's dtype."""

    def forward(self, hidden_states):
        return super().forward(hidden_states).to(self.weight.dtype)


def add_norm(norm, x, residual, dropout=None, return_residual=False):
    """norm(h) with h = residual + dropout(x), or (norm(h), h). One pass if norm and dropout are Transformers'."""
    if isinstance(norm, FusedNorm) and (dropout is None or bare(dropout, torch.nn.Dropout)):
        p = dropout.p if dropout is not None and dropout.training else 0.0
        return norm(x, residual, dropout_p=p, return_residual=return_residual)
    h = residual + (x if dropout is None else dropout(x))
    return (norm(h), h) if return_residual else norm(h)


# ---- activations


class GELU(Patched):
    """GELU by the error function."""

    approximate = "none"

    def forward(self, input):
        return ops.gelu(input, approximate=self.approximate)

    def gated(self, x, gate):
        return ops.gelu(x, gate=gate, approximate=self.approximate)


class TanhGELU(GELU):
    """GELU by tanh."""

    approximate = "tanh"


class SiLU(Patched):
    """SiLU."""

    def forward(self, input):
        return ops.silu(input)

    def gated(self, x, gate):
        return ops.silu(x, gate=gate)


class AfterDense(Patched):
    """A module with gelu(dense(x)) in it, its activation under `act_name`."""

    act_name: str
    activations = (GELU,)


class Gated(Patched):
    """A module with act(x) * gate in it, its activation under `act_name`."""

    act_name: str
    activations = (GELU, SiLU)

    def gated(self, x, gate):
        """In one pass where the activation is as it was, without a hook."""
        activation = getattr(self, self.act_name)
        fused = isinstance(activation, self.activations) and bare(activation, type(activation))
        return activation.gated(x, gate) if fused else activation(x) * gate


def dense_gelu(dense, x, activation):
    """activation(dense(x)). A GELU is fused with the bias of a plain Linear or Conv1D."""
    if not isinstance(activation, GELU):
        return activation(dense(x))
    from transformers.pytorch_utils import Conv1D

    if bare(dense, torch.nn.Linear):
        h, bias = F.linear(x, dense.weight), dense.bias
    elif bare(dense, Conv1D):  # GPT-2's: a Linear with its weight transposed
        h, bias = x @ dense.weight, dense.bias
    else:
        h, bias = dense(x), None
    return ops.gelu(h, bias, approximate=activation.approximate)


# ---- BERT, RoBERTa


class DenseAddNorm(Patched):
    """BertSelfOutput, BertOutput: LN(input + dropout(dense(x)))."""

    def forward(self, hidden_states, input_tensor):
        return add_norm(self.LayerNorm, self.dense(hidden_states), input_tensor, self.dropout)


class Intermediate(AfterDense):
    """BertIntermediate: gelu(dense(x))."""

    act_name = "intermediate_act_fn"

    def forward(self, hidden_states):
        return dense_gelu(self.dense, hidden_states, self.intermediate_act_fn)


class HeadTransform(AfterDense):
    """BertPredictionHeadTransform: LN(gelu(dense(x)))."""

    act_name = "transform_act_fn"

    def forward(self, hidden_states):
        return self.LayerNorm(dense_gelu(self.dense, hidden_states, self.transform_act_fn))


class RobertaLMHead(Patched):
    """decoder(LN(gelu(dense(x)))); the GELU is a function in Transformers."""

    def forward(self, features, **kwargs):
        if bare(self.dense, torch.nn.Linear):
            x = ops.gelu(F.linear(features, self.dense.weight), self.dense.bias)
        else:
            x = ops.gelu(self.dense(features))
        return self.decoder(self.layer_norm(x))


# ---- DistilBERT


class DistilBertFFN(AfterDense):
    """dropout(lin2(gelu(lin1(x)))), in chunks of the sequence if the configuration asks for them."""

    act_name = "activation"

    def ff_chunk(self, input):
        return self.dropout(self.lin2(dense_gelu(self.lin1, input, self.activation)))


class DistilBertBlock(Patched):
    """Post-LN: each addition and the LN after it are one pass."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = add_norm(self.sa_layer_norm, attended, hidden_states)
        return add_norm(self.output_layer_norm, self.ffn(hidden_states), hidden_states)


# ---- ModernBERT


class ModernBertMLP(Gated):
    """Wo(dropout(act(a) * b)) with (a, b) the halves of Wi(x)."""

    act_name = "act"

    def forward(self, hidden_states):
        x, gate = self.Wi(hidden_states).chunk(2, dim=-1)
        return self.Wo(self.drop(self.gated(x, gate)))


class ModernBertLayer(Patched):
    """Pre-LN: the addition after attention and the second LN are one pass."""

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        attended, _ = self.attn(
            self.attn_norm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        normed, hidden_states = add_norm(self.mlp_norm, attended, hidden_states, return_residual=True)
        return hidden_states + self.mlp(normed)


class ModernBertHead(AfterDense):
    """LN(gelu(dense(x)))."""

    act_name = "act"

    def forward(self, hidden_states):
        return self.norm(dense_gelu(self.dense, hidden_states, self.act))


# ---- GPT-2


class GPT2MLP(AfterDense):
    """dropout(c_proj(gelu(c_fc(x))))."""

    act_name = "act"

    def forward(self, hidden_states):
        return self.dropout(self.c_proj(dense_gelu(self.c_fc, hidden_states, self.act)))


class GPT2Block(Patched):
    """Pre-LN: the addition after attention and the second LN are one pass. Unchanged if it has cross-attention."""

    def forward(
        self,
        hidden_states,
        past_key_values=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        use_cache=False,
        **kwargs,
    ):
        if encoder_hidden_states is not None:
            return super().forward(
                hidden_states,
                past_key_values,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                use_cache,
                **kwargs,
            )
        attended, _ = self.attn(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        normed, hidden_states = add_norm(self.ln_2, attended, hidden_states, return_residual=True)
        return hidden_states + self.mlp(normed)


# ---- T5


class T5GatedDense(Gated):
    """wo(dropout(act(wi_0(x)) * wi_1(x)))."""

    act_name = "act"

    def forward(self, hidden_states):
        x = self.dropout(self.gated(self.wi_0(hidden_states), self.wi_1(hidden_states)))
        weight = self.wo.weight  # float32 in a half-precision model; int8 if quantised, which takes x unchanged
        if isinstance(weight, torch.Tensor) and weight.dtype not in (x.dtype, torch.int8):
            x = x.to(weight.dtype)
        return self.wo(x)


# ---- Llama


class LlamaLayer(Patched):
    """Pre-norm: the addition after attention and the second norm are one pass."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask, **kwargs
        )
        normed, hidden_states = add_norm(self.post_attention_layernorm, attended, hidden_states, return_residual=True)
        return hidden_states + self.mlp(normed)


class LlamaMLP(Gated):
    """down_proj(act(gate_proj(x)) * up_proj(x)); what Llama calls the gate is x of ops.silu."""

    act_name = "act_fn"

    def forward(self, x):
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))
