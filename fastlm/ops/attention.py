"""attention: softmax(scale·q kᵀ + bias) v without the matrix of scores, over padded or packed sequences.

For query i and key j of one sequence and head, with offset = Sk - Sq (bottom-right alignment):
    s_ij = scale q_i·k_j + table[bucket(j - i - offset)]      over the keys that query i sees
    lse_i = log Σ_j exp(s_ij),   p_ij = exp(s_ij - lse_i),   o_i = Σ_j z_ij p_ij v_j
z is dropout's: 0 or 256/(256-t) with t = round(256·dropout_p), 1 without (fastlm/ops/_random.py). lse is of all p.
Query i sees key j when the key is real (key_mask), of the same sequence (cu_seqlens), and
    i + offset - left <= j <= i + offset + right,   window_size = (left, right), -1: no limit; causal: right = 0.
A query that sees no key has o = 0, lse = -inf, and takes part in no gradient.

Backward, with dlse the gradient that reaches lse:
    delta_i = do_i·o_i - dlse_i,   ds_ij = p_ij (z_ij do_i·v_j - delta_i)
    dq = scale ds k,   dk = scale dsᵀ q,   dv = (z p)ᵀ do,   dtable[b] = Σ ds_ij over the (i, j) of bucket b
Saved: q, k, v, o and lse; p is computed again from them.

Sources: Dao et al. 2022 (arXiv:2205.14135), Dao 2023 (arXiv:2307.08691); Milakov, Gimelshein 2018 (arXiv:1805.02867);
the relative position bias: Raffel et al. 2020 (arXiv:1910.10683).
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastlm import _native
from fastlm.ops import _checks, _random, _registry
from fastlm.ops._autocast import autocast
from fastlm.ops._shapes import unit_stride


@dataclass(frozen=True)
class RelativeBias:
    """T5's bias: a learned number per head and bucket of relative positions, key minus query.

    table: (buckets, H), floating point; its gradient comes from inside the kernel.
    bidirectional: half of the buckets for keys after the query (encoder); else those share bucket 0 (decoder).
    max_distance: from there on every distance falls in the last bucket.
    """

    table: torch.Tensor
    bidirectional: bool = True
    max_distance: int = 128


def bucket_starts(buckets: int, bidirectional: bool, max_distance: int) -> tuple[int, ...]:
    """The smallest distance of each bucket of one direction: bucket(distance) counts the starts <= it, less one.

    The first half of the buckets holds one distance each, the rest grow as powers: with n buckets and e = n div 2,
    bucket e + k starts where log(distance/e) / log(max_distance/e) · (n - e) reaches k. In integers that is
    distance^(n-e) >= e^(n-e-k) · max_distance^k, so no rounding decides; the float32 logarithm of Transformers agrees.
    """
    return _bucket_starts(buckets // 2 if bidirectional else buckets, max_distance)


bucket_starts._dynamo_marked_constant = True  # torch.compile looks through functools.cache, and warns of it


@functools.cache
def _bucket_starts(n: int, max_distance: int) -> tuple[int, ...]:
    e = n // 2
    starts = list(range(e))
    distance = e
    for k in range(n - e):
        while distance ** (n - e) < e ** (n - e - k) * max_distance**k:
            distance += 1
        starts.append(distance)
    return tuple(starts)


def relative_buckets(relative: torch.Tensor, buckets: int, bidirectional: bool, max_distance: int) -> torch.Tensor:
    """The bucket of each relative position (key minus query), int64."""
    distance = relative.abs() if bidirectional else (-relative).clamp(min=0)
    starts = bucket_starts(buckets, bidirectional, max_distance)
    bucket = sum(((distance >= start).long() for start in starts[1:]), torch.zeros_like(distance))
    return bucket + (relative > 0) * (buckets // 2) if bidirectional else bucket


# ---- reference


def _padded_rows(cu_seqlens, max_seqlen):
    """(rows, real), each (sequences, max_seqlen): the row of a packed tensor at every position, and whether it is one.

    Positions past a sequence's end point at row 0.
    """
    position = torch.arange(max_seqlen, device=cu_seqlens.device)
    real = position < cu_seqlens.diff()[:, None]
    return torch.where(real, cu_seqlens[:-1, None] + position, 0).long(), real


def _gather(x, rows, real):
    """Packed (T, H, D) as padded (sequences, max_seqlen, H, D), zero where nothing is real."""
    if x.shape[0] == 0:
        return x.new_zeros(*rows.shape, *x.shape[1:])
    return torch.where(real[..., None, None], x[rows], 0)


def _visible(sq, sk, lengths_q, lengths_k, key_mask, window_size, device):
    """(mask, relative): which keys each query sees, bool, and key minus query; broadcastable to (B, Sq, Sk)."""
    offset = (sk if lengths_k is None else lengths_k) - (sq if lengths_q is None else lengths_q)
    if lengths_q is not None:
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


def _attend(q, k, v, mask, bias, keep, scale, dropout_p):
    """q (B, Sq, H, D), k, v (B, Sk, Hkv, D), mask (B or 1, 1, Sq, Sk), bias (B or 1, H, Sq, Sk) or None."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    empty = ~mask.any(-1, keepdim=True)
    # Rows without keys are given finite scores, then probability 0: no NaN arises, forward or backward.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~mask, -torch.inf)
    scores = torch.where(empty, 0.0, scores)
    lse = torch.where(empty, -torch.inf, scores.logsumexp(-1, keepdim=True)).squeeze(-1)
    p = torch.where(empty, 0.0, scores.softmax(-1))
    if keep is not None:
        p = torch.where(keep, p * _random.attention_scale(dropout_p), 0.0)
    return (p.to(v.dtype) @ v).transpose(1, 2), lse


def attention_reference(
    q, k, v, *, causal=False, window_size=(-1, -1), softmax_scale=None, cu_seqlens_q=None, cu_seqlens_k=None,
    max_seqlen_q=None, max_seqlen_k=None, key_mask=None, relative_bias=None, dropout_p=0.0, rng=None, site=0,
):  # fmt: skip
    """(out, lse) in plain differentiable torch: products in the inputs' dtype, softmax in at least float32.

    Arguments as of `attention`; packed input is padded first.
    """
    packed = cu_seqlens_q is not None
    lengths_q = lengths_k = None
    if packed:
        if cu_seqlens_k is None:
            cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q
        total, lengths_q, lengths_k = q.shape[0], cu_seqlens_q.diff(), cu_seqlens_k.diff()
        rows_q, real_q = _padded_rows(cu_seqlens_q, max_seqlen_q)
        rows_k, key_mask = _padded_rows(cu_seqlens_k, max_seqlen_k)
        q, k, v = _gather(q, rows_q, real_q), _gather(k, rows_k, key_mask), _gather(v, rows_k, key_mask)
    elif key_mask is not None:  # a product with 0 would let the NaN of a padded row through
        k, v = (torch.where(key_mask[..., None, None], x, 0) for x in (k, v))

    (batch, sq, heads, _), sk = q.shape, k.shape[1]
    window_size = (window_size[0], 0) if causal else window_size
    mask, relative = _visible(sq, sk, lengths_q, lengths_k, key_mask, window_size, q.device)
    bias = None
    if relative_bias is not None:
        table = relative_bias.table
        buckets = relative_buckets(relative, table.shape[0], relative_bias.bidirectional, relative_bias.max_distance)
        bias = table[buckets].movedim(-1, -3)
    keep = _random.keep_attention(batch, heads, sq, sk, dropout_p, rng, site) if dropout_p > 0.0 else None
    mask = mask[:, None] if mask.dim() == 3 else mask
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = _attend(q, k, v, mask, bias, keep, scale, dropout_p)
    if packed:
        token = torch.arange(total, device=q.device)
        sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), token, right=True)
        position = token - cu_seqlens_q[sequence]
        out, lse = out[sequence, position], lse.transpose(1, 2)[sequence, position].transpose(0, 1)
    return out, lse


# ---- the raw ops: packed where cu_seqlens_q is given, else max_seqlen is not read; causal is window_right = 0.


def _fake_fwd(
    q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, table, rng, max_seqlen_q, max_seqlen_k, window_left, window_right,
    softmax_scale, bidirectional, max_distance, dropout_p, site, backend,
):  # fmt: skip
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_empty(rows, dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _fake_bwd(
    dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, key_mask, table, rng, max_seqlen_q, max_seqlen_k,
    window_left, window_right, softmax_scale, bidirectional, max_distance, dropout_p, site, table_gradient, backend,
):  # fmt: skip
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv, table.new_empty(table.shape, dtype=torch.float32) if table_gradient else q.new_empty(0)


_SCHEMA = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_mask, Tensor? table, Tensor? rng, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, int window_left, int window_right, float softmax_scale, bool bidirectional, "
    "int max_distance, float dropout_p, int site"
)
_registry.define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_SCHEMA}, str backend) -> (Tensor out, Tensor lse)", _fake_fwd
)
_registry.define(
    f"attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SCHEMA}, "
    "bool table_gradient, str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dtable)",
    _fake_bwd,
)


def _setup_context(ctx, args, outputs):
    q, k, v, *tensors = args[:8]
    ctx.save_for_backward(q, k, v, *outputs, *tensors)
    ctx.rest = args[8:-1]
    ctx.backend = args[-1]


def _backward(ctx, dout, dlse):
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    table = tensors[3]
    if dout is None:  # only lse was used
        dout = torch.zeros_like(out)
    table_gradient = table is not None and table.requires_grad
    dq, dk, dv, dtable = _registry.call(
        "attention_bwd", dout, dlse, q, k, v, out, lse, *tensors, *ctx.rest, table_gradient, ctx.backend
    )
    return dq, dk, dv, None, None, None, dtable.to(table.dtype) if table_gradient else None, *(None,) * 11


_registry.differentiable("attention_fwd", _setup_context, _backward)


# ---- CPU C++: csrc/cpu/attention_fwd.cpp, attention_bwd.cpp


def _check_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    """On the CPU, where looking costs nothing: starts at 0, never falls, ends at the tokens' number."""
    if cu_seqlens_q is None or q.device.type != "cpu":
        return
    for name, x, cu, limit in (("_q", q, cu_seqlens_q, max_seqlen_q), ("_k", k, cu_seqlens_k, max_seqlen_k)):
        total, cu = x.shape[0], cu.tolist()
        lengths = [end - start for start, end in itertools.pairwise(cu)]
        if cu[0] != 0 or cu[-1] != total or min(lengths, default=0) < 0:
            raise ValueError(
                f"cu_seqlens{name}: expected to start at 0, never to fall, and to end at the number of tokens {total}, "
                f"got {cu}"
            )
        if max(lengths, default=0) > limit:
            raise ValueError(f"max_seqlen{name}: expected at least the longest sequence's {max(lengths)}, got {limit}")


def _strides(x):
    """(sequence, row, head); a packed tensor is one sequence."""
    return (0, *x.stride()[:2]) if x.dim() == 3 else x.stride()[:3]


def _arguments_cpu(
    q, k, v, lse, cu_seqlens_q, cu_seqlens_k, key_mask, table, rng, max_seqlen_q, max_seqlen_k, window_left,
    window_right, softmax_scale, bidirectional, max_distance, dropout_p, site,
):  # fmt: skip
    """The C++ struct, and the tensors it points to."""
    _check_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    packed = cu_seqlens_q is not None
    if packed:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    starts = None
    if table is not None:
        starts = torch.tensor(bucket_starts(table.shape[0], bidirectional, max_distance), dtype=torch.int32)
        table = table.float().contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    at = _native.address
    arguments = _native.cpu().Attention(
        at(q), at(k), at(v), _strides(q), _strides(k), _strides(v), at(cu_seqlens_q), at(cu_seqlens_k), at(key_mask),
        at(table), at(starts), 0 if starts is None else starts.numel(), bidirectional,
        cu_seqlens_q.numel() - 1 if packed else q.shape[0], q.shape[-2], k.shape[-2], q.shape[-1],
        0 if packed else q.shape[1], 0 if packed else k.shape[1], window_left, window_right, softmax_scale,
        _random.attention_threshold(dropout_p), _random.attention_scale(dropout_p), at(rng), site,
        0 if packed else lse.stride(0), lse.stride(-2),
    )  # fmt: skip
    return arguments, (cu_seqlens_q, cu_seqlens_k, key_mask, table, starts)


@_registry.implement("attention_fwd", "cpu")
def _fwd_cpu(q, k, v, *rest):
    out, lse = _fake_fwd(q, k, v, *rest, "cpu")
    q, k, v = (unit_stride(x) for x in (q, k, v))
    arguments, _alive = _arguments_cpu(q, k, v, lse, *rest)
    at = _native.address
    _native.cpu().attention_fwd(arguments, at(out), at(lse), _native.DTYPE_CODES[q.dtype], _native.threads())
    return out, lse


@_registry.implement("attention_bwd", "cpu")
def _bwd_cpu(dout, dlse, q, k, v, out, lse, *rest):
    dq, dk, dv, dtable = _fake_bwd(dout, dlse, q, k, v, out, lse, *rest, "cpu")
    *rest, table_gradient = rest
    dout, q, k, v = (unit_stride(x) for x in (dout, q, k, v))
    out, lse, dlse = out.contiguous(), lse.contiguous(), None if dlse is None else dlse.contiguous()
    arguments, _alive = _arguments_cpu(q, k, v, lse, *rest)
    cu_seqlens_q, heads = rest[0], q.shape[-2]
    partial = dtable_partial = None
    if k.shape[-2] < heads:
        partial = q.new_empty(2, *k.shape[:-2], heads, k.shape[-1], dtype=torch.float32)
    if table_gradient:
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
        dtable_partial = q.new_empty(batch, *dtable.shape, dtype=torch.float32)
    at = _native.address
    _native.cpu().attention_bwd(
        arguments, at(out), at(dout), _strides(dout), at(lse), at(dlse), at(dq), at(dk), at(dv), at(partial),
        at(dtable) if table_gradient else 0, at(dtable_partial), _native.DTYPE_CODES[q.dtype], _native.threads(),
    )  # fmt: skip
    return dq, dk, dv, dtable


# ---- Triton: kernels/attention.py, attention_fwd.py, attention_bwd.py


def _aligned(x):
    """x, or a contiguous copy where Triton would not see that its rows and heads begin on 16 bytes.

    It sees it of strides that 16 divides. Else a load takes two bytes: slower than the copy, and a kernel of its own.
    """
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
    seen = x.stride(-1) == 1 and not any(n % 16 for n in (*strides, x.data_ptr()))
    return x if seen else x.contiguous()


def _arguments_triton(
    q, k, cu_seqlens_q, cu_seqlens_k, key_mask, table, rng, max_seqlen_q, max_seqlen_k, window_left, window_right,
    softmax_scale, bidirectional, max_distance, dropout_p, site,
):  # fmt: skip
    """The launchers' keyword arguments, but for max_seqlen."""
    _check_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    starts = () if table is None else bucket_starts(table.shape[0], bidirectional, max_distance)
    cu_seqlens_q, cu_seqlens_k, key_mask, table = (
        None if x is None else x.contiguous() for x in (cu_seqlens_q, cu_seqlens_k, key_mask, table)
    )
    return {
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "key_mask": key_mask, "table": table,
        "starts": starts, "bidirectional": bidirectional, "left": window_left, "right": window_right,
        "scale": softmax_scale, "threshold": _random.attention_threshold(dropout_p),
        "dropout_scale": _random.attention_scale(dropout_p), "rng": rng, "site": site,
    }  # fmt: skip


@_registry.implement("attention_fwd", "triton")
def _fwd_triton(q, k, v, *rest):
    from fastlm.kernels import attention as kernels

    arguments = _arguments_triton(q, k, *rest)
    out, lse = _fake_fwd(q, k, v, *rest, "triton")
    kernels.attention_fwd(*(_aligned(x) for x in (q, k, v)), out, lse, **arguments)
    return out, lse


@_registry.implement("attention_bwd", "triton")
def _bwd_triton(dout, dlse, q, k, v, out, lse, *rest):
    from fastlm.kernels import attention as kernels

    *options, table_gradient = rest
    arguments = _arguments_triton(q, k, *options)
    dq, dk, dv, dtable = _fake_bwd(dout, dlse, q, k, v, out, lse, *rest, "triton")
    dout, q, k, v = (_aligned(x) for x in (dout, q, k, v))
    dlse = None if dlse is None else dlse.contiguous()
    kernels.attention_bwd(
        dout, dlse, q, k, v, out.contiguous(), lse.contiguous(), dq, dk, dv, dtable if table_gradient else None,
        max_seqlen_q=options[5], max_seqlen_k=options[6], **arguments,
    )  # fmt: skip
    return dq, dk, dv, dtable


# ---- CUDA C++: csrc/cuda/attention_fwd.cu, attention_bwd.cu

_NO_LIMIT = 2**30  # of a window: past any sequence, and its sums with an index stay in 32 bits


@_registry.limit("attention", "cuda")
def _cuda_limit(q, **features):
    d = q.shape[-1]
    return None if d <= 256 else f"its kernels take head dimensions up to 256, not {d}"


def _arguments_cuda(
    q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, table, rng, max_seqlen_q, max_seqlen_k, window_left, window_right,
    softmax_scale, bidirectional, max_distance, dropout_p, site,
):  # fmt: skip
    """The C++ struct, the tensors it points to, and starts."""
    packed = cu_seqlens_q is not None
    cu_seqlens_q, cu_seqlens_k, key_mask = (
        None if x is None else x.contiguous() for x in (cu_seqlens_q, cu_seqlens_k, key_mask)
    )
    at, module = _native.address, _native.cuda()
    heads, bias, far, starts = q.shape[-2], None, 0, ()
    if table is not None:
        starts = bucket_starts(table.shape[0], bidirectional, max_distance)
        far, table = starts[-1], table.float().contiguous()
        bias = table.new_empty(heads, 2 * far + 1)
        module.attention_bias(
            at(table), at(bias), starts, heads, bidirectional, _native.DTYPE_CODES[q.dtype], *_native.cuda_place(q)
        )
    arguments = module.Attention(
        at(q), at(k), at(v), _strides(q), _strides(k), _strides(v), at(cu_seqlens_q), at(cu_seqlens_k), at(key_mask),
        at(bias), cu_seqlens_q.numel() - 1 if packed else q.shape[0], heads, heads // k.shape[-2], q.shape[-1],
        q.shape[-3], k.shape[-3], *(x if x < _NO_LIMIT else -1 for x in (window_left, window_right)), far,
        far if bidirectional else 0, softmax_scale, _random.attention_threshold(dropout_p),
        _random.attention_scale(dropout_p), at(rng), site,
    )  # fmt: skip
    return arguments, (cu_seqlens_q, cu_seqlens_k, key_mask, table, bias), starts


@_registry.implement("attention_fwd", "cuda")
def _fwd_cuda(q, k, v, *rest):
    out, lse = _fake_fwd(q, k, v, *rest, "cuda")
    if out.numel() == 0:
        return out, lse
    q, k, v = (unit_stride(x) for x in (q, k, v))
    arguments, _alive, _ = _arguments_cuda(q, k, v, *rest)
    at = _native.address
    _native.cuda().attention_fwd(arguments, at(out), at(lse), _native.DTYPE_CODES[q.dtype], *_native.cuda_place(q))
    return out, lse


@_registry.implement("attention_bwd", "cuda")
def _bwd_cuda(dout, dlse, q, k, v, out, lse, *rest):
    dq, dk, dv, dtable = gradients = _fake_bwd(dout, dlse, q, k, v, out, lse, *rest, "cuda")
    if q.numel() == 0:  # nothing that a gradient could come from
        return tuple(x.zero_() for x in gradients)
    *rest, table_gradient = rest
    bidirectional = rest[10]
    dout, q, k, v = (unit_stride(x) for x in (dout, q, k, v))
    out, lse, dlse = out.contiguous(), lse.contiguous(), None if dlse is None else dlse.contiguous()
    arguments, _alive, starts = _arguments_cuda(q, k, v, *rest)
    at, module, code, place = _native.address, _native.cuda(), _native.DTYPE_CODES[q.dtype], _native.cuda_place(q)
    delta, sequence, partial = torch.empty_like(lse), None, None
    if rest[0] is not None and rest[-2] > 0.0:
        sequence = q.new_empty(q.shape[0], dtype=torch.int32)
    tiles = module.attention_tiles(arguments, code)
    if table_gradient:
        width = (2 if bidirectional else 1) * starts[-1] + 1
        partial = q.new_empty(tiles, q.shape[-2], width, dtype=torch.float32)
    module.attention_bwd(
        arguments, at(dout), _strides(dout), at(out), at(lse), at(dlse), at(delta), at(sequence), at(dq), at(dk),
        at(dv), at(partial), code, *place,
    )  # fmt: skip
    if table_gradient:
        module.attention_dtable(at(partial), at(dtable), tiles, starts, q.shape[-2], bidirectional, *place)
    return gradients


_registry.offer("attention", "cpu")


@_registry.limit("attention", "triton")
def _triton_limit(q, **features):
    return None if q.shape[-1] <= 256 else f"it takes head dimensions up to 256, not {q.shape[-1]}"


# ---- torch's fused kernel
#
# On the CPU `auto` gives it what the C++ kernel does not take, float16 and float64, for where both apply it is not the
# faster one. Its time over the C++ kernel's, one thread, medians of interleaved rounds, AVX-512 and AVX2, S = 128 to
# 2048, d = 32 to 128: square float32 0.8 to 1.1 forward and 0.9 to 1.2 with backward; causal or half padded 1.3 to 1.7
# and 1.4 to 1.8; bfloat16 0.9 to 1.5 and 3 to 8. It is ahead only at S = 32, forward, 0.7 to 0.9.


def _attention_sdpa(q, k, v, window_size, softmax_scale, key_mask, relative_bias):
    """out, through F.scaled_dot_product_attention. Padded input."""
    arguments = {"scale": softmax_scale, "enable_gqa": q.shape[2] != k.shape[2]}
    empty = None
    if window_size == (-1, 0) and q.shape[1] == k.shape[1] and key_mask is None and relative_bias is None:
        arguments["is_causal"] = True
    elif window_size != (-1, -1) or key_mask is not None or relative_bias is not None:
        mask, relative = _visible(q.shape[1], k.shape[1], None, None, key_mask, window_size, q.device)
        # A row without keys may be NaN: it is given every key, then overwritten.
        empty = ~mask.any(-1, keepdim=True)
        mask, empty = (x[:, None] if x.dim() == 3 else x for x in (mask | empty, empty))
        if relative_bias is not None:
            table = relative_bias.table.to(q.dtype)
            buckets = relative_buckets(
                relative, table.shape[0], relative_bias.bidirectional, relative_bias.max_distance
            )
            mask = torch.where(mask, table[buckets].movedim(-1, -3), -torch.inf)
        arguments["attn_mask"] = mask
    if key_mask is not None:  # its kernels multiply what is masked by 0, and 0·NaN is NaN
        k, v = (torch.where(key_mask[..., None, None], x, 0) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, **arguments)
    return (out if empty is None else out.masked_fill(empty, 0.0)).transpose(1, 2)


@_registry.limit("attention", "sdpa")
def _sdpa_limit(q, *, packed=False, dropout=False, return_lse=False, bias_gradient=False):
    if packed:
        return "it takes padded input, not cu_seqlens"
    if dropout:
        return "torch draws other dropout bits than fastlm's rng and site say"
    if return_lse:
        return "it returns no lse"
    if bias_gradient:
        return "it has no fused gradient for the table of relative_bias"
    return None


# ---- public


def _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_mask):
    if key_mask is not None:
        raise ValueError("key_mask: packed input has no padding to mask; leave it out, or leave out cu_seqlens_q")
    for name, x, cu, limit in (("_q", q, cu_seqlens_q, max_seqlen_q), ("_k", k, cu_seqlens_k, max_seqlen_k)):
        _checks.is_tensor(f"cu_seqlens{name}", cu, device=q.device, dtypes=(torch.int32,), shape=(None,))
        if cu.shape[0] == 0 or cu.shape[0] != cu_seqlens_q.shape[0]:
            raise ValueError(
                f"cu_seqlens{name}: expected one more entry than there are sequences, as many for keys as for queries, "
                f"got shape {tuple(cu.shape)}"
            )
        if cu.shape[0] == 1 and x.shape[0] > 0:  # of what the values may be, all that can be told on a device
            raise ValueError(f"cu_seqlens{name}: expected a sequence for {x.shape[0]} tokens, got one entry")
        if not isinstance(limit, (int, torch.SymInt)) or limit < 0:
            raise ValueError(
                f"max_seqlen{name}: expected with cu_seqlens{name}, an integer no sequence is longer than "
                f"(reading it from the device would stall), got {limit!r}"
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
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale·q kᵀ + bias) v. `causal` is aligned bottom-right where Sq != Sk, as in flash-attn (SDPA: top-left).

    Args:
        q: (B, Sq, H, D), or packed (Tq, H, D) with cu_seqlens_q; floating point.
        k, v: (B, Sk, Hkv, D), or (Tk, Hkv, D), in q's dtype; Hkv divides H, query head h uses head h div (H/Hkv).
        causal: query i sees keys up to i + Sk - Sq.
        window_size: (left, right): query i sees keys from i + Sk - Sq - left to i + Sk - Sq + right; -1: no limit.
        softmax_scale: default 1/sqrt(D).
        cu_seqlens_q, cu_seqlens_k: int32 (sequences + 1,): where each sequence starts in the packed tensors, then the
            total; may repeat the total at the end (empty sequences), so that the shape stays. Keys default to queries.
            The values are checked on the CPU alone: looking at a device's would stall.
        max_seqlen_q, max_seqlen_k: required with them: no sequence is longer.
        key_mask: (B, Sk) bool, True for a real token, for padded input; padding on either side. What stands in a
            masked row of k and v, NaN too, has no influence.
        relative_bias: RelativeBias, added to the scaled scores; positions are aligned as `causal` is.
        dropout_p: probability of dropping a softmax weight, in steps of 1/256: 0 or at least 1/256.
        rng: int64 (2,), (seed, step), on q's device; None draws from torch's generator. See fastlm.ops._random.
        site: number of this call site, so that two dropouts of one step differ.
        return_lse: return (out, lse); gradients through lse are added.
        backend: "auto", "reference", "cpu", "triton" and "cuda" (D up to 256), "sdpa".

    Returns out, like q; with `return_lse` also lse, the logarithm of the softmax's denominator, (B, H, Sq) or packed
    (H, Tq), float32 (float64 for float64 input). A query with no keys returns 0 and lse -inf, and has zero gradients.
    Raises ValueError for a wrong shape, dtype, device or value, and for a named backend that cannot run.
    """
    packed = cu_seqlens_q is not None
    _checks.is_float("q", q)
    if q.dim() != (3 if packed else 4):
        want = "(T, H, D) with cu_seqlens_q" if packed else "(B, S, H, D), or (T, H, D) with cu_seqlens_q"
        raise ValueError(f"q: expected shape {want}, got {tuple(q.shape)}")
    heads, d = q.shape[-2:]
    if heads == 0 or d == 0:
        raise ValueError(f"q: expected at least one head and one dimension, got shape {tuple(q.shape)}")
    shape_k = (None, None, d) if packed else (q.shape[0], None, None, d)
    _checks.is_tensor("k", k, device=q.device, dtypes=(q.dtype,), shape=shape_k)
    _checks.is_tensor("v", v, device=q.device, dtypes=(q.dtype,), shape=tuple(k.shape))
    if k.shape[-2] == 0 or heads % k.shape[-2]:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {k.shape[-2]}")
    if len(window_size) != 2 or min(window_size) < -1:
        raise ValueError(f"window_size: expected (left, right), each -1 (no limit) or more, got {window_size}")
    if packed:
        if cu_seqlens_k is None:
            cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q
        _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, key_mask)
    elif cu_seqlens_k is not None or max_seqlen_q is not None or max_seqlen_k is not None:
        raise ValueError("cu_seqlens_q: expected with cu_seqlens_k, max_seqlen_q or max_seqlen_k, got None")
    if key_mask is not None:
        _checks.is_tensor("key_mask", key_mask, device=q.device, dtypes=(torch.bool,), shape=tuple(k.shape[:2]))
    if relative_bias is not None:
        _check_relative_bias(relative_bias, q)
    _checks.probability("dropout_p", dropout_p)
    _random.attention_threshold(dropout_p)
    _checks.is_rng(rng, site, q.device)

    q, k, v = autocast("attention", q, k, v)
    # 2^31 is beyond any sequence, and far from where the kernels' sums of it and an index would overflow.
    window_size = (min(window_size[0], 2**31), 0 if causal else min(window_size[1], 2**31))
    softmax_scale = 1.0 / math.sqrt(d) if softmax_scale is None else softmax_scale
    backend = _registry.choose(
        "attention", backend, q,
        packed=packed, dropout=dropout_p > 0.0, return_lse=return_lse,
        bias_gradient=relative_bias is not None and relative_bias.table.requires_grad and torch.is_grad_enabled(),
    )  # fmt: skip
    rng = _random.draw_rng(rng, dropout_p, q.device)
    if backend == "sdpa":
        return _attention_sdpa(q, k, v, window_size, softmax_scale, key_mask, relative_bias)
    if backend == "reference":
        if not torch.compiler.is_compiling():
            _check_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = attention_reference(
            q, k, v, window_size=window_size, softmax_scale=softmax_scale, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, key_mask=key_mask,
            relative_bias=relative_bias, dropout_p=dropout_p, rng=rng, site=site,
        )  # fmt: skip
    else:
        table, bidirectional, max_distance = None, True, 0
        if relative_bias is not None:
            table, bidirectional, max_distance = (
                relative_bias.table, relative_bias.bidirectional, relative_bias.max_distance,
            )  # fmt: skip
        out, lse = _registry.call(
            "attention_fwd", q, k, v, cu_seqlens_q, cu_seqlens_k, key_mask, table, rng, max_seqlen_q or 0,
            max_seqlen_k or 0, *window_size, softmax_scale, bidirectional, max_distance, dropout_p, site, backend,
        )  # fmt: skip
    return (out, lse) if return_lse else out
