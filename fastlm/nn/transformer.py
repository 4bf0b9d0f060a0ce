"""torch's Transformer encoder layer, with dropout, residual addition and LayerNorm fused."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.nn.attention import MultiheadAttention
from fastlm.nn.dropout import Dropout
from fastlm.nn.normalization import LayerNorm

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def _gelu_form(activation) -> str | None:
    """The `approximate` of an activation that is a GELU, else None."""
    if activation is F.gelu:
        return "none"
    return activation.approximate if isinstance(activation, torch.nn.GELU) else None


class TransformerEncoderLayer(torch.nn.Module):
    """torch.nn.TransformerEncoderLayer (arguments, state_dict, initialisation) on fastlm's ops.

    norm_first=False (Vaswani et al. 2017):  x = LN1(x + drop(attn(x)));  y = LN2(x + drop(ff(x)))
    norm_first=True (Xiong et al. 2020):     x = x + drop(attn(LN1(x)));  y = x + drop(ff(LN2(x)))

    Each LN is one pass with the dropout and addition before it; so is a GELU with the first bias.
    It works inside torch.nn.TransformerEncoder, which may warn that its nested-tensor path is disabled.
    Which forms of src_mask run on the op, `MultiheadAttention` says.

    Args beyond torch's:
        site: the first of the four dropout site numbers of the layer (attention, after attention, inside the
            feed-forward, after it).
    """

    # torch.nn.TransformerEncoder turns padded batches into nested tensors in evaluation, unless this is 0
    activation_relu_or_gelu = 0

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[torch.Tensor], torch.Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        site: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(activation, str):
            if activation not in _ACTIVATIONS:
                raise ValueError(f'activation: expected "relu", "gelu" or a callable, got {activation!r}')
            activation = _ACTIVATIONS[activation]
        factory = {"device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(
            d_model, nhead, dropout, bias=bias, batch_first=batch_first, **factory, site=site
        )
        self.linear1 = torch.nn.Linear(d_model, dim_feedforward, bias=bias, **factory)
        self.dropout = Dropout(dropout, site=site + 2)
        self.linear2 = torch.nn.Linear(dim_feedforward, d_model, bias=bias, **factory)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.norm2 = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.dropout1 = Dropout(dropout, site=site + 1)
        self.dropout2 = Dropout(dropout, site=site + 3)
        self.activation = activation

    def forward(
        self,
        src: torch.Tensor,
        src_mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        *,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        rng: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """src (L, E), (L, N, E) or with batch_first (N, L, E); or packed, (T, E) with cu_seqlens. Returns the same
        shape.

        The other arguments are those of `MultiheadAttention.forward`. All four dropouts draw from rng.
        """
        x = self.norm1(src) if self.norm_first else src
        attended, _ = self.self_attn(
            x,
            x,
            x,
            src_key_padding_mask,
            need_weights=False,
            attn_mask=src_mask,
            is_causal=is_causal,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            rng=rng,
        )
        if self.norm_first:
            normed, x = self._add_norm(self.norm2, attended, self.dropout1, src, rng, return_residual=True)
            return x + self.dropout2(self._feed_forward(normed, rng), rng)
        x = self._add_norm(self.norm1, attended, self.dropout1, src, rng)
        return self._add_norm(self.norm2, self._feed_forward(x, rng), self.dropout2, x, rng)

    def _add_norm(self, norm, x, dropout, residual, rng, return_residual=False):
        """norm(residual + dropout(x)), in one pass."""
        p = dropout.p if self.training else 0.0
        return norm(x, residual, dropout_p=p, rng=rng, site=dropout.site, return_residual=return_residual)

    def _feed_forward(self, x, rng):
        form = _gelu_form(self.activation)
        if form is None:
            h = self.activation(self.linear1(x))
        else:
            h = ops.gelu(F.linear(x, self.linear1.weight), self.linear1.bias, approximate=form)
        return self.linear2(self.dropout(h, rng))
