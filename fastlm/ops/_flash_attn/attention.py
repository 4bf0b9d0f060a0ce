"""attention by the library flash-attn 2: flash_attn_func, and flash_attn_varlen_func for packed input.

From version 2.1 on, the library aligns causal masks and windows to the last query and key, as fastlm does; from 2.6 on
it takes a softcap. Padded input with a key_mask would have to be unpadded, and to count its tokens would synchronise.
"""

from __future__ import annotations

from importlib import import_module

import torch

from fastlm.ops.attention import Args


def limit(q, *, cached=False, dropout=False, return_lse=False, bias=False, key_mask=False, **features):
    if cached:
        return "its function with a cache is not called; fastlm's kernels take cache_seqlens"
    if dropout:
        return "flash-attn draws other dropout bits than fastlm's rng and site say"
    if key_mask:
        return "it takes no key_mask; pack the sequences and give cu_seqlens_q"
    if bias:
        return "it has no relative_bias"
    if return_lse:
        return "its lse has no gradient"
    if not q.numel():
        return "it takes no empty input"
    return None if q.shape[-1] <= 256 else f"it takes head dimensions up to 256, not {q.shape[-1]}"


def attention(args: Args) -> torch.Tensor:
    """The output, like q."""
    library = import_module("flash_attn")
    packed = args.cu_seqlens_q is not None
    most_q, most_k = (
        (args.max_seqlen_q, args.max_seqlen_k) if packed else (args.q.shape[1], args.k.shape[1])
    )  # upper bounds of the sequences' lengths
    left, right = args.window_left, args.window_right
    if most_k <= right < most_q - 1:  # the library takes any `right` from the number of keys on as no limit
        raise ValueError(
            f'window_size: backend="flash_attn" takes a right window below the number of keys, {most_k}, where there '
            f'are more queries, {most_q}; got {right}. Use backend="auto".'
        )
    # The library's windows are 32-bit integers; one as long as the keys, or the queries, is no limit.
    window = -1 if left >= most_k else left, -1 if right >= max(most_q, most_k) else right
    options = {
        "dropout_p": 0.0,
        "softmax_scale": args.softmax_scale,
        "causal": args.window_right == 0,
        "window_size": window,
    }
    if args.softcap:
        options["softcap"] = args.softcap
    if not packed:
        return library.flash_attn_func(args.q, args.k, args.v, **options)
    lengths = args.cu_seqlens_q, args.cu_seqlens_k, args.max_seqlen_q, args.max_seqlen_k
    return library.flash_attn_varlen_func(args.q, args.k, args.v, *lengths, **options)
