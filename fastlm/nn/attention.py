"""Multi-head attention: torch's module on `fastlm.ops.attention`, padded or packed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.nn import _masks
from fastlm.ops import _checks
from fastlm.ops.attention import visible_keys

_WEIGHTS = (
    "fastlm.nn.MultiheadAttention: need_weights=True (torch's default) has attention run in plain torch, since the "
    "fused kernel never holds the weights. Pass need_weights=False if they are not used."
)
_OTHER_MASK = (
    "fastlm.nn.MultiheadAttention: this attn_mask is neither causal nor a window nor padding of keys, or was not read "
    "(under torch.compile or graph capture, or if it requires a gradient), so attention runs in torch. Pass "
    "is_causal=True for a causal mask, and key_padding_mask for padding."
)


def _checkable(mask: torch.Tensor) -> bool:
    return mask.device.type == "cpu" and not torch.compiler.is_compiling()


def nan_for_other_values(v: torch.Tensor, key_padding_mask: torch.Tensor | None) -> torch.Tensor:
    """v (N, S, H, D), all NaN in a sequence whose mask has values that `real_keys` could not refuse."""
    if key_padding_mask is None or key_padding_mask.dtype == torch.bool or _checkable(key_padding_mask):
        return v
    other = ((key_padding_mask != 0) & (key_padding_mask != -torch.inf)).any(-1)
    return torch.where(other[:, None, None, None], torch.nan, v)


def real_keys(key_padding_mask: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor | None:
    """torch's key_padding_mask as the op's key_mask: bool, True for a real token.

    torch's is bool, True for padding, or floating point, 0 and -inf (`torch.nn.TransformerEncoder` converts to that).
    ValueError for another shape or dtype and, on the CPU, for another value. On a device, where the check would stall,
    and under torch.compile every value except 0 counts as padding; `nan_for_other_values` makes such a result NaN.
    """
    if key_padding_mask is None:
        return None
    _checks.is_tensor("key_padding_mask", key_padding_mask, shape=shape)
    if key_padding_mask.dtype == torch.bool:
        return ~key_padding_mask
    if not key_padding_mask.dtype.is_floating_point:
        raise ValueError(
            f"key_padding_mask: expected bool (True = padding), got {key_padding_mask.dtype}; use mask == 0"
        )
    real = key_padding_mask == 0
    if _checkable(key_padding_mask) and not bool((real | (key_padding_mask == -torch.inf)).all()):
        raise ValueError(
            "key_padding_mask: expected 0 (a real token) and -inf (padding) in a floating-point mask, got others; "
            "an additive bias per key is torch.nn.MultiheadAttention's alone"
        )
    return real


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention (arguments, state_dict, initialisation) on `fastlm.ops.attention`.

    Inputs are padded as in torch, (L, E), (L, N, E) or with batch_first (N, L, E); or packed, (T, E) with `cu_seqlens`.
    An attn_mask runs on the op if it masks nothing, or is causal, a window, padding of keys, or these together. Any
    other runs on F.scaled_dot_product_attention, with a warning. Returned attention weights (torch's default) make
    attention run in plain torch, with a warning; pass need_weights=False. Each warning is given once.
    A ValueError with the remedy: add_bias_kv, add_zero_attn, nested tensors.
    A query with no real key gives out_proj's bias; torch gives NaN. The dropout probability is in steps of 1/256.

    Args beyond torch's:
        site: number of this dropout call site, so that two dropouts of one step differ.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        site: int = 0,
    ) -> None:
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise ValueError(f"{name}: expected False, got {value}; torch.nn.MultiheadAttention has it")
        if num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.site = site

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        max_seqlen_k: int | None = None,
        rng: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(output, weights), the output shaped like query; weights as torch's, None without need_weights.

        Args:
            query, key, value, average_attn_weights: as torch's. The same tensor three times runs one GEMM.
            key_padding_mask: (N, S), or (S,) without a batch; bool, True = padding (or float, 0 and -inf).
            need_weights: return the attention weights, after dropout; see the class. Not with cu_seqlens.
            attn_mask: (L, S) or (N * num_heads, L, S); bool, True = masked, or float, added to the scores. With
                is_causal=True it is not read and must be the causal mask (as is torch's rule). Not with cu_seqlens.
            is_causal: each query sees the keys up to its position; query and key have equal lengths.
            cu_seqlens, max_seqlen: int32 (B + 1,) offsets of packed sequences, query (T, E), and a bound on their
                length; the keys' are the same unless cu_seqlens_k, max_seqlen_k say otherwise.
            rng: int64 (2,), (seed, step), for the dropout; None draws from torch's generator.
        """
        packed = cu_seqlens is not None
        self._check(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal, packed)
        if packed and max_seqlen is None:
            raise ValueError("max_seqlen: expected an integer with cu_seqlens, a bound on a sequence's length")
        if is_causal and cu_seqlens_k is not None:
            raise ValueError("is_causal: expected False with cu_seqlens_k; fastlm.ops.attention says how it aligns")
        q, k, v = self._project(query, key, value)
        if query.dim() == 2 and not packed:
            q, k, v = (t.unsqueeze(0) for t in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif query.dim() == 3 and not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        key_mask = real_keys(key_padding_mask, tuple(k.shape[:2]))
        v = nan_for_other_values(v, key_padding_mask)
        dropout = {"dropout_p": self.dropout if self.training else 0.0, "rng": rng, "site": self.site}
        weights, window, other_mask = None, (-1, 0 if is_causal else -1), None
        if attn_mask is not None and not is_causal:
            window, key_mask, other_mask = self._read(attn_mask, q, k, key_mask)
        if need_weights or other_mask is not None:
            _masks.warn_once(_WEIGHTS if need_weights else _OTHER_MASK)
            visible, _ = visible_keys(q.shape[1], k.shape[1], None, None, key_mask, window, q.device)
            visible = visible if visible.dim() == 2 else visible[:, None]
            out, weights = _masks.attention(q, k, v, other_mask, visible, need_weights=need_weights, **dropout)
        else:
            out = ops.attention(
                q,
                k,
                v,
                window_size=window,
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens_k,
                max_seqlen_q=max_seqlen,
                max_seqlen_k=max_seqlen_k,
                key_mask=key_mask,
                **dropout,
            )
        out = self.out_proj(out.flatten(-2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if query.dim() == 2:
            return out.view_as(query), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _read(self, attn_mask, q, k, key_mask):
        """(window, key_mask, None) if the op can do the mask; else (-1s, key_mask, mask), mask in four dimensions."""
        lengths = q.shape[1], k.shape[1]
        mask = _masks.as_four_dims(attn_mask, q.shape[0], self.num_heads, lengths)
        found = _masks.recognise(mask)
        if found is None:
            return (-1, -1), key_mask, mask
        if found.key_mask is None:
            return found.window_size, key_mask, None
        keys = found.key_mask.expand(k.shape[:2])
        return found.window_size, keys if key_mask is None else keys & key_mask, None

    def _project(self, query, key, value):
        """q, k, v (..., heads, head_dim): views of one GEMM's result where the inputs are one tensor."""
        heads = (self.num_heads, self.head_dim)
        if query is key and key is value and self.in_proj_weight is not None:
            qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            return qkv.unflatten(-1, (3, *heads)).unbind(-3)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b).unflatten(-1, heads) for x, w, b in zip((query, key, value), weights, biases))

    def _check(self, query, key, value, key_padding_mask, need_weights, attn_mask, is_causal, packed):
        dims = (2,) if packed else (2, 3)
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            _checks.is_float(name, x)
            if x.is_nested:
                raise ValueError(
                    f"{name}: expected a plain tensor, got a nested one; pass packed tokens with cu_seqlens"
                )
            if x.dim() not in dims or x.dim() != query.dim() or x.shape[-1] != width:
                wanted = f"(T, {width})" if packed else f"(L, {width}) or (L, N, {width}), N first where batch_first"
                raise ValueError(f"{name}: expected {wanted}, got {tuple(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"value: expected as many vectors as key {tuple(key.shape)}, got {tuple(value.shape)}")
        lengths = [x.shape[1 if self.batch_first and x.dim() == 3 else 0] for x in (query, key)]
        if is_causal and lengths[0] != lengths[1]:
            raise ValueError(
                f"is_causal: expected query and key of one length, got {lengths[0]} and {lengths[1]}; torch aligns "
                "such a mask top left, fastlm.ops.attention bottom right: call the op, or torch's module"
            )
        if packed and need_weights:
            raise ValueError(
                "need_weights: expected False with cu_seqlens, got True (torch's default): packed sequences have no "
                "common shape of weights; pass need_weights=False"
            )
        if packed and attn_mask is not None and not is_causal:
            raise ValueError(
                "attn_mask: expected None with cu_seqlens, got a tensor; pass is_causal=True for a causal mask, or "
                "padded input"
            )
        if packed and key_padding_mask is not None:
            raise ValueError(
                "key_padding_mask: expected None with cu_seqlens, which leave no padding; pass one of them"
            )
