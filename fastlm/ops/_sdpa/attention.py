"""attention on torch's fused kernel, F.scaled_dot_product_attention.

On the CPU, "auto" chooses it for float16 and float64, which the C++ kernel does not take. Its time divided by that of
the C++ kernel: one thread, medians of interleaved rounds, AVX-512 and AVX2, S = 128 to 2048, d = 32 to 128:

                             forward       with backward
    float32, square          0.8 to 1.1    0.9 to 1.2
    float32, causal or
      half padded            1.3 to 1.7    1.4 to 1.8
    bfloat16                 0.9 to 1.5    3 to 8

At S = 32 the forward's ratio is 0.7 to 0.9.

On a GPU it is cuDNN's kernel where that takes the input, else torch's flash, memory-efficient or plain one. "auto"
chooses it for what fastlm/ops/_attention_auto.py says. On an H100, TFLOP/s of the forward in bfloat16:

                                   Triton (ours)    cuDNN (published)
    d 64, 512 tokens                    245              335
    d 128, causal, 8192 tokens          405
    d 128, 2048 to 16384 tokens                          595 to 617

Ours: LOG.md, 2026-11-26. Published: Shah et al. 2024 (arXiv:2407.08608). The two were not timed in one run. Backward of
d 64 and 512 tokens is 245 and 266, and cuDNN's adds to dq in any order. Where a gradient is needed ours runs, whose
results have the same bits in every run.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlm.ops._relative_bias import relative_buckets
from fastlm.ops.attention import Args, visible_keys

_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def limit(
    q, *, cached=False, packed=False, dropout=False, return_lse=False, bias_gradient=False, softcap=False, **features
):
    if cached:
        return "it takes no cache_seqlens"
    if packed:
        return "it takes padded input, not cu_seqlens"
    if dropout:
        return "torch draws other dropout bits than fastlm's rng and site say"
    if softcap:
        return "it has no softcap"
    if return_lse:
        return "it returns no lse"
    if bias_gradient:
        return "it has no fused gradient for the table of relative_bias"
    return None


def _order(q: torch.Tensor) -> contextlib.AbstractContextManager:
    """On a GPU cuDNN's kernel first; torch's own order has flash first, at about half of its rate on an H100."""
    if not q.is_cuda or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return sdpa_kernel(_ORDER, set_priority=True)


def attention(args: Args) -> torch.Tensor:
    """The output; the input is padded, not packed."""
    q, k, v, key_mask, table = args.q, args.k, args.v, args.key_mask, args.table
    window = args.window_left, args.window_right
    options = {"scale": args.softmax_scale, "enable_gqa": q.shape[2] != k.shape[2]}
    empty = None
    if window == (-1, 0) and q.shape[1] == k.shape[1] and key_mask is None and table is None:
        options["is_causal"] = True
    elif window != (-1, -1) or key_mask is not None or table is not None:
        mask, relative = visible_keys(q.shape[1], k.shape[1], None, None, key_mask, window, q.device)
        # torch may give NaN for a row without keys. Such a row sees every key here; its output is overwritten with 0.
        empty = ~mask.any(-1, keepdim=True)
        mask, empty = (x[:, None] if x.dim() == 3 else x for x in (mask | empty, empty))
        if table is not None:
            table = table.to(q.dtype)
            buckets = relative_buckets(relative, table.shape[0], args.bidirectional, args.max_distance)
            mask = torch.where(mask, table[buckets].movedim(-1, -3), -torch.inf)
        options["attn_mask"] = mask
    if key_mask is not None:  # torch's kernels multiply masked rows by 0, and 0·NaN is NaN
        k, v = (torch.where(key_mask[..., None, None], x, 0) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with _order(q):
        out = F.scaled_dot_product_attention(q, k, v, **options)
    return (out if empty is None else out.masked_fill(empty, 0.0)).transpose(1, 2)
