"""torch's attn_mask on `fastlm.ops.attention`: what the op computes is recognised, the rest is attention in torch.

The op takes windows (causal is one) and real keys, not a mask per pair. `recognise` reads the mask's values, as
torch.nn.TransformerEncoder does to detect a causal one. This synchronises with a GPU. A compiled or captured call
cannot read them.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastlm.ops import _checks, _random


class Recognised(NamedTuple):
    """The mask as arguments of `fastlm.ops.attention`."""

    window_size: tuple[int, int]
    key_mask: torch.Tensor | None  # (N, S) bool, True for a real key


NOTHING_MASKED = Recognised((-1, -1), None)


def as_four_dims(attn_mask: torch.Tensor, batch: int, heads: int, lengths: tuple[int, int]) -> torch.Tensor:
    """torch's attn_mask, (L, S) or (N * heads, L, S), as (1, 1, L, S) or (N, heads, L, S). ValueError for others."""
    _checks.is_tensor("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
        raise ValueError(
            f"attn_mask: expected bool (True = masked) or floating point (added to the scores), got {attn_mask.dtype}; "
            "use mask.bool()"
        )
    shape = tuple(attn_mask.shape)
    if shape == lengths:
        return attn_mask[None, None]
    if shape == (batch * heads, *lengths):
        return attn_mask.unflatten(0, (batch, heads))
    raise ValueError(f"attn_mask: expected shape {lengths} or {(batch * heads, *lengths)}, got {shape}")


def _values_are_readable(x: torch.Tensor) -> bool:
    return not torch.compiler.is_compiling() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def recognise(mask: torch.Tensor) -> Recognised | None:
    """The window and the keys that a mask (.., .., L, S) leaves, if it is those alone; None for any other mask.

    Window and keys are read off the pairs that the mask allows, then compared with all pairs.
    """
    sq, sk = mask.shape[-2:]
    if not _values_are_readable(mask) or mask.requires_grad:
        return None
    if mask.numel() == 0:
        return NOTHING_MASKED
    allowed = ~mask if mask.dtype == torch.bool else mask == 0
    relative = torch.arange(sk, device=mask.device) - torch.arange(sq, device=mask.device)[:, None] - (sk - sq)
    low = torch.where(allowed, relative, sk).amin()
    high = torch.where(allowed, relative, -sq - sk).amax()
    keys = allowed.any(-2, keepdim=True).any(1, keepdim=True)  # (N or 1, 1, 1, S)
    left, right = relative >= low, relative <= high
    same = [(keys & window == allowed).all() for window in (torch.ones_like(left), right, left, left & right)]
    plain = mask.new_ones((), dtype=torch.bool) if mask.dtype == torch.bool else (allowed | (mask == -torch.inf)).all()
    facts = torch.stack([low, high, *(fact.long() for fact in (*same, plain, keys.all()))]).tolist()  # one copy
    low, high, no_window, right_alone, left_alone, both, plain, all_keys = facts
    if not plain:
        return None
    window = None
    if no_window:
        window = (-1, -1)
    elif right_alone and high >= 0:
        window = (-1, high)
    elif left_alone and low <= 0:
        window = (-low, -1)
    elif both and low <= 0 <= high:
        window = (-low, high)
    return None if window is None else Recognised(window, None if all_keys else keys[:, 0, 0])


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def warn_once(message: str) -> None:
    if not torch.compiler.is_compiling():
        _warn(message)


def attention(q, k, v, mask, visible, *, dropout_p, rng, site, need_weights):
    """(out, weights) in torch: out like q (N, L, H, D); weights (N, H, L, S) after dropout, or None if not needed.

    mask: torch's, of four dimensions, or None. visible: bool, broadcastable to (N, 1, L, S), from the other arguments.
    A query that sees no key has output and weights 0. The dropout bits are those of `fastlm.ops.attention`.
    """
    bias = None
    if mask is not None and mask.dtype != torch.bool:
        bias = mask.to(q.dtype)
        visible = visible & (mask != -torch.inf)
    elif mask is not None:
        visible = visible & ~mask
    empty = ~visible.any(-1, keepdim=True)  # its softmax would be NaN, so that it sees all keys and is cleared after
    visible = visible | empty
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if bias is not None:
        bias = torch.where(empty, 0.0, bias).masked_fill(~visible, -torch.inf)
    if not need_weights and dropout_p == 0.0:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible if bias is None else bias)
        return out.masked_fill(empty, 0.0).transpose(1, 2), None
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, -torch.inf) if bias is None else scores + bias
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).masked_fill(empty, 0.0)
    if dropout_p > 0.0:
        rng = _random.draw_rng(rng, dropout_p, q.device)
        keep = _random.keep_attention(*weights.shape, dropout_p, rng, site)
        weights = torch.where(keep, weights * _random.attention_scale(dropout_p), 0.0)
    weights = weights.to(v.dtype)
    return (weights @ v).transpose(1, 2), weights
