"""attention on torch's fused kernel, F.scaled_dot_product_attention.

On the CPU, "auto" chooses it for float16 and float64, which the C++ kernel does not take. Its time divided by that of
the C++ kernel: one thread, medians of interleaved rounds, AVX-512 and AVX2, S = 128 to 2048, d = 32 to 128:

                             forward       with backward
    float32, square          0.8 to 1.1    0.9 to 1.2
    float32, causal or
      half padded            1.3 to 1.7    1.4 to 1.8
    bfloat16                 0.9 to 1.5    3 to 8

At S = 32 the forward's ratio is 0.7 to 0.9.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm.ops._relative_bias import relative_buckets
from fastlm.ops.attention import Args, visible_keys


def limit(
    q, *, packed=False, dropout=False, return_lse=False, bias_gradient=False, softcap=False, bias=False, key_mask=False
):
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
    out = F.scaled_dot_product_attention(q, k, v, **options)
    return (out if empty is None else out.masked_fill(empty, 0.0)).transpose(1, 2)
