"""attention: softmax(scale·q kᵀ + bias) v without a stored matrix of scores, over padded or packed sequences.

For query i and key j of one sequence and head, with offset = Sk - Sq (bottom-right alignment):
    u_ij = scale q_i·k_j;  with softcap c > 0:  u_ij = c tanh(scale q_i·k_j / c)
    s_ij = u_ij + table[bucket(j - i - offset)]      over the keys that query i sees
    lse_i = log Σ_j exp(s_ij),   p_ij = exp(s_ij - lse_i),   o_i = Σ_j z_ij p_ij v_j
z is the dropout mask, 0 or 256/(256-t) with t = round(256·dropout_p); without dropout 1. See fastlm/ops/_random.py.
lse does not depend on z. Query i sees key j if the key is real (key_mask), of the same sequence (cu_seqlens), and
    i + offset - left <= j <= i + offset + right,   window_size = (left, right), -1: no limit; causal: right = 0.
A query that sees no key has o = 0, lse = -inf and zero gradients.

Backward, with dlse the gradient of lse:
    delta_i = do_i·o_i - dlse_i,   ds_ij = p_ij (z_ij do_i·v_j - delta_i)
    dq = scale du k,   dk = scale duᵀ q,   dv = (z p)ᵀ do,   dtable[b] = Σ ds_ij over the (i, j) of bucket b
with du = ds or, with softcap, du_ij = ds_ij (1 - (u_ij/c)²).
Saved: q, k, v, o and lse; p is computed again from them.

Sources: Dao et al. 2022 (arXiv:2205.14135), Dao 2023 (arXiv:2307.08691); Milakov, Gimelshein 2018 (arXiv:1805.02867);
the relative position bias: Raffel et al. 2020 (arXiv:1910.10683); softcap: Gemma Team 2024 (arXiv:2408.00118).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastlm.ops import _checks, _random, _registry
from fastlm.ops._args import SymInt
from fastlm.ops._attention_auto import PREFER
from fastlm.ops._attention_checks import check_cached, check_cu_seqlens, check_inputs
from fastlm.ops._autocast import autocast
from fastlm.ops._heads import side_by_side
from fastlm.ops._relative_bias import RelativeBias, bucket_starts, relative_buckets
from fastlm.ops._shapes import gather_padded, padded_rows

__all__ = ["RelativeBias", "attention", "attention_reference"]


# ---- reference


def visible_keys(sq, sk, lengths_q, lengths_k, key_mask, window_size, device):
    """(mask, relative): which keys each query sees, bool, and key minus query; broadcastable to (B, Sq, Sk)."""
    offset = (sk if lengths_k is None else lengths_k) - (sq if lengths_q is None else lengths_q)
    if isinstance(offset, torch.Tensor):
        offset = offset[:, None, None]
    relative = torch.arange(sk, device=device) - torch.arange(sq, device=device)[:, None] - offset
    mask = torch.ones_like(relative, dtype=torch.bool)
    left, right = window_size
    if left >= 0:
        mask = mask & (relative >= -left)
    if right >= 0:
        mask = mask & (relative <= right)
    if key_mask is not None:
        mask = mask & key_mask[:, None, :]
    return mask, relative


def _attend(q, k, v, mask, bias, keep, scale, softcap, dropout_p):
    """q (B, Sq, H, D), k, v (B, Sk, Hkv, D), mask (B or 1, 1, Sq, Sk), bias (B or 1, H, Sq, Sk) or None."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    empty = ~mask.any(-1, keepdim=True)
    # Rows without keys get finite scores, then probability 0, so that neither forward nor backward gives NaN.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~mask, -torch.inf)
    scores = torch.where(empty, 0.0, scores)
    lse = torch.where(empty, -torch.inf, scores.logsumexp(-1, keepdim=True)).squeeze(-1)
    p = torch.where(empty, 0.0, scores.softmax(-1))
    if keep is not None:
        p = torch.where(keep, p * _random.attention_scale(dropout_p), 0.0)
    return (p.to(v.dtype) @ v).transpose(1, 2), lse


def _are_wrong(cu_seqlens, total):
    """Whether offsets fall or leave the `total` rows."""
    return (cu_seqlens.diff() < 0).any() | (cu_seqlens[0] < 0) | (cu_seqlens[-1] > total)


def attention_reference(
    q,
    k,
    v,
    *,
    causal=False,
    window_size=(-1, -1),
    softmax_scale=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    key_mask=None,
    relative_bias=None,
    dropout_p=0.0,
    rng=None,
    site=0,
    softcap=0.0,
    cache_seqlens=None,
):
    """(out, lse) in plain differentiable torch: products in the inputs' dtype, softmax in at least float32.

    Arguments as of `attention`; packed input is padded first.
    """
    packed, cached = cu_seqlens_q is not None, cache_seqlens is not None
    lengths_q = lengths_k = None
    if packed:
        cu_seqlens_q = cu_seqlens_q.long()  # no difference overflows
        total, lengths_q, wrong = q.shape[0], cu_seqlens_q.diff(), _are_wrong(cu_seqlens_q, q.shape[0])
        q = gather_padded(q, *padded_rows(cu_seqlens_q, max_seqlen_q))
    if cached:
        lengths_k, max_seqlen_k = cache_seqlens.long(), k.shape[1]
        key_mask = torch.arange(k.shape[1], device=k.device) < lengths_k[:, None]
    elif packed:
        if cu_seqlens_k is None:
            cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q
        cu_seqlens_k = cu_seqlens_k.long()
        lengths_k, wrong = cu_seqlens_k.diff(), wrong | _are_wrong(cu_seqlens_k, k.shape[0])
        rows_k, key_mask = padded_rows(cu_seqlens_k, max_seqlen_k)
        k, v = gather_padded(k, rows_k, key_mask), gather_padded(v, rows_k, key_mask)
    if key_mask is not None and (cached or not packed):  # a NaN in a masked row would spread: 0·NaN is NaN
        k, v = (torch.where(key_mask[..., None, None], x, 0) for x in (k, v))

    (batch, sq, heads, _), sk = q.shape, k.shape[1]
    window_size = (window_size[0], 0) if causal else window_size
    mask, relative = visible_keys(sq, sk, lengths_q, lengths_k, key_mask, window_size, q.device)
    bias = None
    if relative_bias is not None:
        table = relative_bias.table
        buckets = relative_buckets(relative, table.shape[0], relative_bias.bidirectional, relative_bias.max_distance)
        bias = table[buckets].movedim(-1, -3)
    keep = _random.keep_attention(batch, heads, sq, sk, dropout_p, rng, site) if dropout_p > 0.0 else None
    mask = mask[:, None] if mask.dim() == 3 else mask
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = _attend(q, k, v, mask, bias, keep, scale, softcap, dropout_p)
    if packed:
        token = torch.arange(total, device=q.device)
        sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True).clamp(max=len(lengths_q) - 1)
        position = token - cu_seqlens_q[sequence]
        # Wrong cu_seqlens and max_seqlen raise on the CPU alone. Here a row of no sequence, and a sequence longer than
        # max_seqlen, are NaN; all rows are if cu_seqlens fall or leave the tensors.
        lost = (position < 0) | (position >= lengths_q[sequence]) | wrong
        too_long = (lengths_q > max_seqlen_q) | (lengths_k > max_seqlen_k) | (lengths_k < 0)
        lost = lost | too_long[sequence]
        position = position.clamp(0, max_seqlen_q - 1)
        out = torch.where(lost[:, None, None], torch.nan, out[sequence, position])
        lse = torch.where(lost[:, None], torch.nan, lse.transpose(1, 2)[sequence, position]).transpose(0, 1)
    elif cached:
        lost = ((lengths_k < 0) | (lengths_k > max_seqlen_k))[:, None, None]
        out, lse = torch.where(lost[..., None], torch.nan, out), torch.where(lost, torch.nan, lse)
    return out, lse


# ---- the raw ops; causal is window_right = 0


class Args(NamedTuple):
    q: torch.Tensor  # (B, Sq, H, D), packed (Tq, H, D)
    k: torch.Tensor  # (B, Sk, Hkv, D), packed (Tk, Hkv, D)
    v: torch.Tensor  # like k
    cu_seqlens_q: torch.Tensor | None  # (sequences + 1,) int32: packed
    cu_seqlens_k: torch.Tensor | None  # like cu_seqlens_q
    key_mask: torch.Tensor | None  # (B, Sk) bool; None where packed
    table: torch.Tensor | None  # (buckets, H)
    rng: torch.Tensor | None
    max_seqlen_q: SymInt  # read where packed
    max_seqlen_k: SymInt
    window_left: int
    window_right: int
    softmax_scale: float
    bidirectional: bool  # of the table
    max_distance: int
    dropout_p: float
    site: int
    softcap: float  # 0: none

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def starts(self) -> tuple[int, ...]:
        """The smallest distance of each bucket of one direction; empty without a table."""
        return _starts(self)


class CacheArgs(NamedTuple):
    """Of queries against a cache: sequence b's keys are the first cache_seqlens[b] rows of k[b] and v[b]."""

    q: torch.Tensor  # (B, Sq, H, D), packed (Tq, H, D)
    k: torch.Tensor  # (B, S_max, Hkv, D)
    v: torch.Tensor  # like k
    cache_seqlens: torch.Tensor  # (B,) int32
    cu_seqlens_q: torch.Tensor | None  # (B + 1,) int32: packed
    table: torch.Tensor | None  # (buckets, H)
    max_seqlen_q: SymInt  # read where packed
    window_left: int
    window_right: int
    softmax_scale: float
    bidirectional: bool  # of the table
    max_distance: int
    softcap: float  # 0: none

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def starts(self) -> tuple[int, ...]:
        return _starts(self)


def _starts(args: Args | CacheArgs) -> tuple[int, ...]:
    if args.table is None:
        return ()
    return bucket_starts(args.table.shape[0], args.bidirectional, args.max_distance)


class Outputs(NamedTuple):
    out: torch.Tensor  # like q
    lse: torch.Tensor  # (B, H, Sq), packed (H, Tq), float32


class Saved(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor
    forward: Args


class BackwardArgs(NamedTuple):
    dout: torch.Tensor  # like q
    dlse: torch.Tensor | None  # like lse
    out: torch.Tensor
    lse: torch.Tensor
    forward: Args
    table_gradient: bool
    joined: bool  # q, k and v have one shape, and dq, dk and dv come as one tensor


class Gradients(NamedTuple):
    dq: torch.Tensor  # like q; joined: (..., 3, H, D), of q, k and v
    dk: torch.Tensor  # like k; joined: empty
    dv: torch.Tensor  # like v; joined: empty
    dtable: torch.Tensor  # (buckets, H) float32; empty without table_gradient


def empty_forward(args: Args | CacheArgs) -> Outputs:
    q = args.q
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return Outputs(out=out, lse=q.new_empty(rows, dtype=torch.float32))


def empty_backward(args: BackwardArgs) -> Gradients:
    q, k, v, table = args.forward.q, args.forward.k, args.forward.v, args.forward.table
    if args.joined:
        dq, dk, dv = q.new_empty(*q.shape[:-2], 3, *q.shape[-2:]), q.new_empty(0), q.new_empty(0)
    else:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return Gradients(
        dq=dq,
        dk=dk,
        dv=dv,
        dtable=table.new_empty(table.shape, dtype=torch.float32) if args.table_gradient else q.new_empty(0),
    )


def _save(args: Args, outputs) -> Saved:
    out, lse = outputs
    return Saved(out, lse, args)


def _backward(saved: Saved, needs: Args, backend, dout, dlse):
    if dout is None:  # only lse was used
        dout = torch.zeros_like(saved.out)
    joined = backend != "cpu" and side_by_side(*saved.forward[:3])
    args = BackwardArgs(dout, dlse, saved.out, saved.lse, saved.forward, needs.table, joined)
    dq, dk, dv, dtable = _registry.call("attention_bwd", args, backend)
    if joined:
        dq, dk, dv = dq.unbind(-3)
    # Autograd casts dtable to table's dtype.
    return {"q": dq, "k": dk, "v": dv, "table": dtable if needs.table else None}


_registry.page(
    __name__,
    "attention",
    auto={"cpu": ("cpu", "sdpa", "reference"), "cuda": ("triton", "cuda", "sdpa", "reference")},
    prefer=PREFER,
    autocast={"cuda": "low", "cpu": "low"},
)
_registry.define("attention_fwd", Args, empty_forward)
_registry.define("attention_bwd", BackwardArgs, empty_backward)
_registry.define("attention_cache", CacheArgs, empty_forward)
_registry.differentiable("attention_fwd", _save, _backward)


# ---- public


def _run_reference(args: Args | CacheArgs, relative_bias: RelativeBias | None):
    if not torch.compiler.is_compiling():
        (check_cached if isinstance(args, CacheArgs) else check_cu_seqlens)(args)
    options = dict(zip(args._fields, args))
    for name in ("table", "bidirectional", "max_distance"):  # as relative_bias
        del options[name]
    window = options.pop("window_left"), options.pop("window_right")
    return attention_reference(**options, window_size=window, relative_bias=relative_bias)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_mask: torch.Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    dropout_p: float = 0.0,
    rng: torch.Tensor | None = None,
    site: int = 0,
    softcap: float = 0.0,
    cache_seqlens: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale·q kᵀ + bias) v. `causal` is aligned bottom-right where Sq != Sk, as in flash-attn (SDPA: top-left).

    Args:
        q: (B, Sq, H, D), or packed (Tq, H, D) with cu_seqlens_q; floating point.
        k, v: (B, Sk, Hkv, D), or (Tk, Hkv, D), in q's dtype (autocast casts all three); Hkv divides H, query head h
            uses head h div (H/Hkv).
        causal: query i sees keys up to i + Sk - Sq.
        window_size: (left, right): query i sees keys from i + Sk - Sq - left to i + Sk - Sq + right; -1: no limit.
        softmax_scale: default 1/sqrt(D).
        cu_seqlens_q, cu_seqlens_k: int32 (sequences + 1,): where each sequence starts in the packed tensors, then the
            total. The total may be repeated (empty sequences), to keep the shape fixed. Keys default to the queries.
            The values are checked on the CPU only: reading them from a device would stall. There a row of no sequence
            has NaN in out and lse, and NaN or 0 in its gradients; if cu_seqlens fall or leave the tensors, every row
            has. If a sequence exceeds max_seqlen, its out is NaN in "reference", dtable in "triton".
        max_seqlen_q, max_seqlen_k: upper bounds of the sequences' lengths; required with cu_seqlens.
        key_mask: (B, Sk) bool, True for a real token, for padded input; padding on either side. The values in a masked
            row of k and v have no effect, even NaN.
        relative_bias: RelativeBias, added to the scaled scores; positions are aligned as `causal` is.
        dropout_p: probability of dropping a softmax weight, in steps of 1/256: 0 or at least 1/256.
        rng: int64 (2,), (seed, step), on q's device; None draws from torch's generator. See fastlm.ops._random.
        site: number of this call site; it makes the dropouts of one step differ.
        softcap: c > 0 turns scaled scores into c·tanh(score/c), before bias and mask, as in flash-attn; Gemma 2 has 50.
            0: none. Not on "sdpa"; on "cuda" not with relative_bias.
        cache_seqlens: int32 (B,): k and v are preallocated caches (B, S_max, Hkv, D), and the keys of sequence b are
            the first cache_seqlens[b] rows of k[b] and v[b]; the queries' own keys are already among them. What the
            other rows hold has no effect. Queries are aligned to the last keys: Sk above is cache_seqlens[b]. q may be
            packed (with cu_seqlens_q of B sequences); k and v have no cu_seqlens. For inference: no dropout, no
            key_mask, and no input that needs a gradient. Values are checked on the CPU only; on a device, one outside
            [0, S_max] makes its sequence's results NaN. Nothing synchronises, and a CUDA graph may capture the call.
        return_lse: return (out, lse); a gradient through lse is included.
        backend: "auto", "reference", "cpu", "triton" or "cuda" (D up to 256), "sdpa", "flash_attn" (where installed).

    Returns out, like q; with `return_lse` also lse, the logarithm of the softmax's denominator, (B, H, Sq) or packed
    (H, Tq), float32 (float64 for float64 input). A query with no keys returns 0 and lse -inf, and has zero gradients.
    Raises ValueError for a wrong shape, dtype, device or value, and for a named backend that cannot run.
    """
    packed, cached = cu_seqlens_q is not None, cache_seqlens is not None
    if packed and cu_seqlens_k is None and not cached:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    check_inputs(q, k, v, window_size, *lengths, key_mask, relative_bias, dropout_p, rng, site, softcap, cache_seqlens)

    q_dtype = q.dtype
    q, k, v = autocast("attention", q, k, v)
    _checks.same_dtype("q", q_dtype, q.dtype, k=k, v=v)
    biased = relative_bias is not None
    backend = _registry.choose(
        "attention",
        backend,
        q,
        packed=packed,
        cached=cached,
        dropout=dropout_p > 0.0,
        softcap=softcap > 0.0,
        bias=biased,
        key_mask=key_mask is not None,
        return_lse=return_lse,
        masked=cached or key_mask is not None or max(window_size) >= 0 or (causal and q.shape[-3] != k.shape[-3]),
        gradient=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        bias_gradient=biased and relative_bias.table.requires_grad and torch.is_grad_enabled(),
    )
    both = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": cu_seqlens_q,
        "table": relative_bias.table if biased else None,
        "max_seqlen_q": max_seqlen_q or 0,
        # 2^31 is longer than any sequence; the kernels' sums of it and an index do not overflow.
        "window_left": min(window_size[0], 2**31),
        "window_right": 0 if causal else min(window_size[1], 2**31),
        "softmax_scale": 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale,
        "bidirectional": bool(relative_bias.bidirectional) if biased else True,
        "max_distance": relative_bias.max_distance if biased else 0,
        "softcap": softcap,
    }
    args: Args | CacheArgs
    if cached:
        args = CacheArgs(cache_seqlens=cache_seqlens, **both)
    else:
        args = Args(
            cu_seqlens_k=cu_seqlens_k,
            key_mask=key_mask,
            rng=_random.draw_rng(rng, dropout_p, q.device),
            max_seqlen_k=max_seqlen_k or 0,
            dropout_p=dropout_p,
            site=site,
            **both,
        )
    if backend in ("sdpa", "flash_attn"):
        return _registry.column("attention", backend).attention(args)
    if backend == "reference":
        out, lse = _run_reference(args, relative_bias)
    else:
        out, lse = _registry.call("attention_cache" if cached else "attention_fwd", args, backend)
    return (out, lse) if return_lse else out
