"""attention in Triton against a cache (flash-decoding, Dao et al. 2023). The maths: fastlm/ops/attention.py.

A row of a tile is a query and one of the heads that share a key head, so that each key and value is loaded once for all
of them. A few queries leave most multiprocessors idle: `splits` programs then divide the keys of a tile, and
`_cache_sum` adds their parts in order. The grid depends on the cache's length alone, never on cache_seqlens.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .attention_plan import Axis, Rows, are_wrong, row_ptrs, window
from .attention_tile import accumulate, cap, exp, product, scaled
from .exponential import LN2

# Integers that must not cause another compilation.
PLAIN_NUMBERS = ("sequences", "sq", "sk", "longest", "heads", "group", "tiles", "splits", "left", "right", "far")
PLAIN_NUMBERS = (*PLAIN_NUMBERS, "far_right", "rows")


class Cache(NamedTuple):
    """What the kernel reads beside q, k and v. None: no packed queries, bias, softcap."""

    lengths_ptr: tl.tensor  # (sequences,) int32: the keys of each
    cu_q_ptr: tl.tensor  # (sequences + 1,) int32
    bias_ptr: tl.tensor  # (heads, 2 far + 1), in the unit of the scores
    scale: tl.tensor
    softcap: tl.tensor  # in the unit of the scores


class Parts(NamedTuple):
    """What the splits of a tile leave, for each row of out: Σ p v, the maximum score and Σ p. None without splits."""

    acc_ptr: tl.tensor  # (splits, rows, D) float32
    max_ptr: tl.tensor  # (splits, rows) float32
    sum_ptr: tl.tensor


@triton.jit
def _finish(m, total, acc, FLOAT32: tl.constexpr):
    """(lse, out) of rows (M,) and (M, D). A total of 0: no key."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = m + tl.log(total) if FLOAT32 else (m + tl.log2(total)) * LN2
    return tl.where(empty, float("-inf"), lse), acc * tl.where(empty, 0.0, 1.0 / total)[:, None]


@triton.jit
def _add_bias(scores, bias_ptr, head, key, diagonal, far, far_right):
    """scores plus the bias of rows' heads at key - diagonal: one load a row where all keys are far before them."""
    width = 2 * far + 1
    if tl.max(key, axis=0) - tl.min(diagonal, axis=0) <= -far:
        scores += tl.load(bias_ptr + head * width)[:, None]
    else:
        rel = tl.minimum(tl.maximum(key[None, :] - diagonal[:, None], -far), far_right)
        scores += tl.load(bias_ptr + (head * width + far)[:, None] + rel)
    return scores


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def _cache(
    q: Rows,
    k: Rows,
    v: Rows,
    out_ptr,
    lse_ptr,
    parts: Parts,
    cache: Cache,
    sequences,
    sq,
    sk,
    longest,
    heads,
    group,
    tiles,
    splits,
    left,
    right,
    far,
    far_right,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sq: rows of q in a batch entry, packed of all sequences; longest: at most so many are of one sequence.

    Wrong lengths cannot be refused on a device. A sequence whose cache_seqlens leave [0, sk] is NaN; where cu_seqlens
    are wrong, or a sequence is longer than `longest`, the launcher's NaN stay.
    """
    PACKED: tl.constexpr = cache.cu_q_ptr is not None
    SPLIT: tl.constexpr = parts.acc_ptr is not None
    FLOAT32: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
    pid = tl.program_id(0)
    split, tile = pid % splits, (pid // splits) % tiles
    kv_head, sequence = (pid // splits // tiles) % (heads // group), pid // splits // tiles // (heads // group)
    length = tl.load(cache.lengths_ptr + sequence)
    lost = (length < 0) | (length > sk)
    length = tl.where(lost, 0, length)
    b, start, queries = sequence.to(tl.int64), 0, sq
    if PACKED:
        b = b * 0
        start = tl.load(cache.cu_q_ptr + sequence)
        queries = tl.load(cache.cu_q_ptr + sequence + 1) - start
        wrong = are_wrong(Axis(cache.cu_q_ptr, sq), Axis(cache.cu_q_ptr, sq), sequences, BLOCK=512)
        queries = tl.where(wrong | (queries > longest), 0, queries)
    if tile * BLOCK_M < queries * group:
        row, col, n = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
        in_row, in_col = row < queries * group, col < D
        i, head = row // group, kv_head * group + row % group
        token = b * sq + start + i  # of out
        stored = in_row[:, None] & in_col[None, :]
        q_ptrs = q.ptr + b * q.stride_b + (start + i).to(tl.int64)[:, None] * q.stride_m
        q_tile = tl.load(q_ptrs + head.to(tl.int64)[:, None] * q.stride_h + col[None, :], mask=stored, other=0.0)
        q_tile, qk_scale, _ = scaled(q_tile, cache.scale, FLOAT32)
        zero = cache.scale * 0.0
        diagonal = i + length - queries
        lo, hi = window(diagonal, row * 0, row * 0 + length, left, right)
        first, last = tl.min(lo, axis=0), tl.max(tl.where(in_row, hi, 0), axis=0)
        first = first // BLOCK_N * BLOCK_N
        share = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), BLOCK_N), splits) * BLOCK_N
        first += split * share
        k_ptrs = row_ptrs(k, sequence.to(tl.int64), kv_head, n, col)
        v_ptrs = row_ptrs(v, sequence.to(tl.int64), kv_head, n, col)

        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for n0 in range(first, tl.minimum(first + share, last), BLOCK_N):
            key, at = n0 + n, tl.cast(n0, tl.int64)
            in_tile = (key < length)[:, None] & in_col[None, :]
            k_tile = tl.load(k_ptrs + at * k.stride_m, mask=in_tile, other=0.0)
            scores = product(q_tile, k_tile, PRECISION) * qk_scale
            if cache.softcap is not None:
                scores = cap(scores, cache.softcap, FLOAT32)
            if cache.bias_ptr is not None:
                scores = _add_bias(scores, cache.bias_ptr, head, key, diagonal, far, far_right)
            scores = tl.where((key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None]), scores, float("-inf"))
            m_new = tl.maximum(m, tl.max(scores, axis=1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key yet
            p, alpha = exp(scores - shift[:, None], FLOAT32), exp(m - shift, FLOAT32)
            total = total * alpha + tl.sum(p, axis=1)
            v_tile = tl.load(v_ptrs + at * v.stride_m, mask=in_tile, other=0.0)
            acc = accumulate(acc * alpha[:, None], p.to(v_tile.dtype), v_tile, zero, PRECISION)
            m = m_new

        total = tl.where(lost, float("nan"), total)
        if SPLIT:
            at = split.to(tl.int64) * rows + token * heads + head
            tl.store(parts.max_ptr + at, m, mask=in_row)
            tl.store(parts.sum_ptr + at, total, mask=in_row)
            tl.store(parts.acc_ptr + at[:, None] * D + col[None, :], acc, mask=stored)
        else:
            lse, acc = _finish(m, total, acc, FLOAT32)
            tl.store(lse_ptr + (b * heads + head) * sq + start + i, lse, mask=in_row)
            at = (token * heads + head)[:, None] * D + col[None, :]
            tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def _cache_sum(
    parts: Parts,
    out_ptr,
    lse_ptr,
    sq,
    heads,
    splits,
    rows,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOST: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    """One row of out from its parts, of which there are at most MOST. Parts without a key are not read."""
    row, s, col = tl.program_id(0).to(tl.int64), tl.arange(0, MOST), tl.arange(0, BLOCK_D)
    at = s[None, :].to(tl.int64) * rows + row
    maxima = tl.load(parts.max_ptr + at, mask=s[None, :] < splits, other=float("-inf"))
    sums = tl.load(parts.sum_ptr + at, mask=s[None, :] < splits, other=0.0)
    m = tl.max(maxima, axis=1)
    shift = tl.where(m == float("-inf"), 0.0, m)
    total = tl.sum(sums * exp(maxima - shift[:, None], FLOAT32), axis=1)
    acc = tl.zeros((1, BLOCK_D), tl.float32)
    for first in range(0, splits, 16):
        part = first + tl.arange(0, 16)
        place = part.to(tl.int64) * rows + row
        weight = exp(tl.load(parts.max_ptr + place, mask=part < splits, other=float("-inf")) - shift, FLOAT32)
        some = tl.load(parts.sum_ptr + place, mask=part < splits, other=0.0) > 0.0
        mask = some[:, None] & (col < D)[None, :]
        values = tl.load(parts.acc_ptr + place[:, None] * D + col[None, :], mask=mask, other=0.0)
        acc += tl.sum(tl.where(mask, values * weight[:, None], 0.0), axis=0)[None, :]
    lse, acc = _finish(m, total, acc, FLOAT32)
    token, head = row // heads, row % heads
    tl.store(lse_ptr + (token // sq * heads + head) * sq + token % sq + tl.zeros((1,), tl.int64), lse)
    tl.store(out_ptr + row * D + col[None, :], acc.to(out_ptr.dtype.element_ty), mask=(col < D)[None, :])
