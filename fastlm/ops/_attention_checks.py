"""attention's checks of its arguments. The values of cu_seqlens and cache_seqlens are looked at on the CPU alone:
reading them from a device would stall."""

from __future__ import annotations

import itertools

import torch

from fastlm.ops import _checks, _random
from fastlm.ops._relative_bias import RelativeBias

# ---- of values; the raw ops read memory by them, so the CPU's adapters call these too


def _check_offsets(name: str, total: int, cu_seqlens: torch.Tensor, limit: int) -> None:
    """Raises a ValueError unless offsets start at 0, never fall, end at `total` and respect max_seqlen."""
    cu = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(cu)]
    if cu[0] != 0 or cu[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens{name}: expected to start at 0, never to fall, and to end at the number of tokens {total}, "
            f"got {cu}"
        )
    if max(lengths, default=0) > limit:
        raise ValueError(f"max_seqlen{name}: expected at least the longest sequence's {max(lengths)}, got {limit}")


def check_cu_seqlens(args) -> None:
    """Of attention's Args."""
    if args.packed and args.q.device.type == "cpu":
        _check_offsets("_q", args.q.shape[0], args.cu_seqlens_q, args.max_seqlen_q)
        _check_offsets("_k", args.k.shape[0], args.cu_seqlens_k, args.max_seqlen_k)


def check_cached(args) -> None:
    """Of attention's CacheArgs: cu_seqlens_q, and cache_seqlens in [0, S_max]."""
    if args.q.device.type != "cpu":
        return
    if args.packed:
        _check_offsets("_q", args.q.shape[0], args.cu_seqlens_q, args.max_seqlen_q)
    lengths, most = args.cache_seqlens.tolist(), args.k.shape[1]
    if lengths and (min(lengths) < 0 or max(lengths) > most):
        raise ValueError(f"cache_seqlens: expected numbers of keys in [0, {most}], the cache's length, got {lengths}")


# ---- of shapes, dtypes and devices


def _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_mask, cached):
    if key_mask is not None:
        raise ValueError("key_mask: packed input has no padding to mask; leave it out, or leave out cu_seqlens_q")
    queries, keys = ("_q", q, cu_seqlens_q, max_seqlen_q), ("_k", k, cu_seqlens_k, max_seqlen_k)
    for name, x, cu, limit in (queries,) if cached else (queries, keys):
        _checks.is_tensor(f"cu_seqlens{name}", cu, device=q.device, dtypes=(torch.int32,), shape=(None,))
        if cu.shape[0] == 0 or cu.shape[0] != cu_seqlens_q.shape[0]:
            raise ValueError(
                f"cu_seqlens{name}: expected one more entry than there are sequences, as many for keys as for queries, "
                f"got shape {tuple(cu.shape)}"
            )
        if cu.shape[0] == 1 and x.shape[0] > 0:  # the only wrong values that the shape reveals
            raise ValueError(f"cu_seqlens{name}: expected a sequence for {x.shape[0]} tokens, got one entry")
        if not isinstance(limit, (int, torch.SymInt)) or limit < 0:
            raise ValueError(
                f"max_seqlen{name}: expected with cu_seqlens{name}, an integer no sequence is longer than "
                f"(reading it from the device would stall), got {limit!r}"
            )


def _check_cache(q, k, v, batch, cache_seqlens, cu_seqlens_k, max_seqlen_k, key_mask, relative_bias, dropout_p):
    _checks.is_tensor("cache_seqlens", cache_seqlens, device=q.device, dtypes=(torch.int32,), shape=(batch,))
    if cu_seqlens_k is not None or max_seqlen_k is not None:
        raise ValueError(
            "cu_seqlens_k: expected None with cache_seqlens, which says how many rows of each cache are keys; leave "
            "out cu_seqlens_k and max_seqlen_k"
        )
    if key_mask is not None:
        raise ValueError("key_mask: expected None with cache_seqlens; keep the keys of real tokens alone in the cache")
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p: expected 0 with cache_seqlens, which is for inference, got {dropout_p}")
    if not torch.is_grad_enabled():
        return
    table = None if relative_bias is None else relative_bias.table
    for name, x in (("q", q), ("k", k), ("v", v), ("relative_bias.table", table)):
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{name}: expected no gradient to be needed with cache_seqlens, which is for inference, got a tensor "
                "that requires one; call under torch.no_grad() or torch.inference_mode(), or detach it"
            )


def _check_relative_bias(relative_bias, q):
    if not isinstance(relative_bias, RelativeBias):
        raise ValueError(f"relative_bias: expected a RelativeBias, got {type(relative_bias).__name__}")
    table, least = relative_bias.table, 4 if relative_bias.bidirectional else 2
    _checks.is_float("relative_bias.table", table)
    _checks.is_tensor("relative_bias.table", table, device=q.device, shape=(None, q.shape[-2]))
    if table.shape[0] < least or (relative_bias.bidirectional and table.shape[0] % 2):
        raise ValueError(
            f"relative_bias.table: expected at least {least} buckets, an even number where bidirectional, "
            f"got {table.shape[0]}"
        )
    exact = table.shape[0] // (4 if relative_bias.bidirectional else 2)
    if relative_bias.max_distance <= exact:
        raise ValueError(
            f"relative_bias.max_distance: expected more than {exact}, the distances with a bucket each, "
            f"got {relative_bias.max_distance}"
        )


def check_inputs(
    q,
    k,
    v,
    window_size,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    key_mask,
    relative_bias,
    dropout_p,
    rng,
    site,
    softcap,
    cache_seqlens,
):
    """Raises a ValueError for arguments of `attention` that are wrong by themselves or together."""
    packed, cached = cu_seqlens_q is not None, cache_seqlens is not None
    _checks.is_float("q", q)
    if q.dim() != (3 if packed else 4):
        want = "(T, H, D) with cu_seqlens_q" if packed else "(B, S, H, D), or (T, H, D) with cu_seqlens_q"
        raise ValueError(f"q: expected shape {want}, got {tuple(q.shape)}")
    heads, d = q.shape[-2:]
    if heads == 0 or d == 0:
        raise ValueError(f"q: expected at least one head and one dimension, got shape {tuple(q.shape)}")
    if packed and cached:  # before its shape says how many sequences there are
        _check_packed(q, k, cu_seqlens_q, None, max_seqlen_q, None, None, cached)
    batch = cu_seqlens_q.shape[0] - 1 if packed and cached else q.shape[0]
    shape_k = (None, None, d) if packed and not cached else (batch, None, None, d)
    _checks.is_tensor("k", k, device=q.device, shape=shape_k)
    _checks.is_tensor("v", v, device=q.device, shape=tuple(k.shape))
    if k.shape[-2] == 0 or heads % k.shape[-2]:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {k.shape[-2]}")
    if len(window_size) != 2 or min(window_size) < -1:
        raise ValueError(f"window_size: expected (left, right), each -1 (no limit) or more, got {window_size}")
    if relative_bias is not None:
        _check_relative_bias(relative_bias, q)
    if cached:
        arguments = cache_seqlens, cu_seqlens_k, max_seqlen_k, key_mask, relative_bias, dropout_p
        _check_cache(q, k, v, batch, *arguments)
    elif packed:
        _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_mask, cached)
    if not packed and (cu_seqlens_k is not None or max_seqlen_q is not None or max_seqlen_k is not None):
        raise ValueError("cu_seqlens_q: expected with cu_seqlens_k, max_seqlen_q or max_seqlen_k, got None")
    if key_mask is not None:
        _checks.is_tensor("key_mask", key_mask, device=q.device, dtypes=(torch.bool,), shape=tuple(k.shape[:2]))
    _checks.probability("dropout_p", dropout_p)
    _random.attention_threshold(dropout_p)
    _checks.is_rng(rng, site, q.device)
    if softcap != 0.0:
        _checks.softcap(softcap, "0")
