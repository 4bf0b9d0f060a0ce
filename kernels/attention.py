"""attention in Triton: configurations and launchers. The maths: fastlm/ops/attention.py; the kernels: attention_fwd.py
and attention_bwd.py, with what they share in attention_tile.py.
"""

import math
from dataclasses import dataclass

import torch
import triton

from . import attention_bwd as bwd
from . import attention_fwd as fwd
from .device import architecture, multiprocessors
from .tuning import choose


@dataclass(frozen=True)
class Config:
    """Queries and keys of a block, warps, and stages of the loads in flight, of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By the head dimension, rounded up to a power of two; without spills, packed with dropout too.
#
# sm_90 and sm_100, 228 KB of shared memory. Of 64 and 128 the fastest of 30 to 40 on an H100 (LOG.md, 2026-11-26). Blocks
# of 64 rows, one group of four warps for wgmma: two or three of them a multiprocessor hide each other's exp2, and a
# thread's registers are half empty with eight warps. Only without dropout is a forward of 128 rows, in blocks of 32 keys,
# ahead, by 7%. d 256, not measured, has room for 64 rows, and in dkdv, which holds two tiles of gradients, for none of
# wgmma's: mma.sync.
_WGMMA = {
    "fwd": {64: Config(128, 32, 8, 3), 128: Config(64, 64, 4, 3), 256: Config(64, 32, 8, 2)},
    "dkdv": {64: Config(64, 64, 4, 3), 128: Config(32, 128, 8, 3), 256: Config(32, 32, 8, 1)},
    "dq": {64: Config(64, 64, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 2)},
}
_WGMMA_DROPOUT = {"fwd": {64: Config(64, 64, 4, 3)}, "dkdv": {64: Config(64, 64, 4, 2)}}
# sm_80, and sm_86, sm_89 and sm_120 with their 99 KB: mma.sync takes its operands from registers, so tiles are smaller.
# The largest that ptxas fits into 255 registers, with eight warps; with four most spill. Not measured.
_MMA = {
    "fwd": {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 2)},
    "dkdv": {64: Config(32, 128, 8, 2), 128: Config(32, 64, 8, 2), 256: Config(32, 32, 8, 1)},
    "dq": {64: Config(64, 32, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 1)},
}
# float32 goes through FMA, unrolled over the whole tile: small tiles, or the code is huge.
_FLOAT32 = {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 32, 8, 1)}


def config(kernel: str, block_d: int, itemsize: int, dropout: bool) -> Config:
    """kernel: "fwd", "dkdv", "dq" or "dtable"."""
    shape = block_d, itemsize, architecture(), int(dropout)
    return choose(f"attention_{kernel}", shape, lambda: _rule(kernel, *shape), lambda: _others(kernel, itemsize))


def _rule(kernel: str, block_d: int, itemsize: int, arch: int, dropout: int) -> Config:
    if kernel == "dtable":  # the larger the tile, the fewer diagonals of tiles are near: what 99 KB hold
        return Config(64, 64, 8, 1) if block_d * itemsize <= 256 else Config(32, 32, 8, 1)
    width = max(64, block_d)
    if itemsize == 4:
        return _FLOAT32[width]
    if arch // 10 not in (9, 10):
        return _MMA[kernel][width]
    return (dropout and _WGMMA_DROPOUT.get(kernel, {}).get(width)) or _WGMMA[kernel][width]


def _others(kernel: str, itemsize: int) -> list[Config]:
    sizes, stages = ((32, 64), (1, 2)) if itemsize == 4 else ((32, 64, 128), (1, 2, 3, 4))
    return [
        Config(m, n, warps, stage)
        for m in sizes for n in sizes for warps in (4, 8) for stage in stages
        if kernel != "dtable" or m == n
    ]  # fmt: skip


_NO_LIMIT = 2**30  # of a window: past any sequence, and its sums with an index stay in 32 bits


def _limit(before_or_after: int) -> int:
    """A side of the window as the kernels take it; -1: no limit."""
    return min(before_or_after, _NO_LIMIT) if before_or_after >= 0 else _NO_LIMIT


def _block_d(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


def _config(kernel: str, q: torch.Tensor, threshold: int) -> Config:
    return config(kernel, _block_d(q.shape[-1]), q.element_size(), threshold > 0)


def _precision(dtype: torch.dtype) -> str:
    """Of the products: float32's are float32, unless torch's own switch allows tf32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _strides(x):
    """(sequence, row, head); a packed tensor is one sequence. 0 where there is one alone: to compile for one number."""
    strides = [stride if size > 1 and x.numel() else 0 for size, stride in zip(x.shape[:-1], x.stride())]
    return (0, *strides) if x.dim() == 3 else tuple(strides)


def _named_strides(**tensors):
    """stride_qb, stride_qm, stride_qh for q, and so on; k and v count rows by n."""
    names = {}
    for name, x in tensors.items():
        b, m, h = _strides(x)
        names |= {f"stride_{name}b": b, f"stride_{name}{'n' if name in 'kv' else 'm'}": m, f"stride_{name}h": h}
    return names


def _arguments(
    q, k, cu_seqlens_q, cu_seqlens_k, key_mask, rng, bias, starts, bidirectional, left, right, scale, threshold,
    dropout_scale, site,
):  # fmt: skip
    """What all kernels take. bias: expanded, or None."""
    packed = cu_seqlens_q is not None
    d = q.shape[-1]
    far = 1 if bias is None else starts[-1]
    return {
        "cu_q_ptr": cu_seqlens_q, "cu_k_ptr": cu_seqlens_k, "mask_ptr": key_mask, "bias_ptr": bias, "rng_ptr": rng,
        "sequences": cu_seqlens_q.numel() - 1 if packed else q.shape[0],
        "sq": q.shape[-3], "sk": k.shape[-3], "heads": q.shape[-2], "group": q.shape[-2] // k.shape[-2],
        "left": _limit(left), "right": _limit(right),
        "scale": scale, "far": far, "far_right": far if bidirectional else 0,
        "site": site, "threshold": threshold, "dropout_scale": dropout_scale,
        "PACKED": packed, "HAS_MASK": key_mask is not None, "DROPOUT": threshold > 0,
        "D": d, "BLOCK_D": _block_d(d), "PRECISION": _precision(q.dtype),
    }  # fmt: skip


def _expand(table, starts, bidirectional, dtype):
    """(heads, 2 starts[-1] + 1) float32: what the kernels add, by relative position; None without a table.

    In the unit of the scores of q's dtype: see attention_tile.py.
    """
    if table is None:
        return None
    heads, width = table.shape[1], 2 * starts[-1] + 1
    bias = table.new_empty(heads, width, dtype=torch.float32)
    bwd._expand_bias[(heads, triton.cdiv(width, 256))](
        table,
        bias,
        heads,
        starts[-1],
        1.0 if dtype == torch.float32 else math.log2(math.e),
        STARTS=starts,
        BIDIRECTIONAL=bidirectional,
        BLOCK=256,
    )
    return bias


def _batch(q):
    return 1 if q.dim() == 3 else q.shape[0]


def attention_fwd(
    q, k, v, out, lse, *, cu_seqlens_q, cu_seqlens_k, key_mask, table, starts, bidirectional, left, right, scale,
    threshold, dropout_scale, rng, site,
):  # fmt: skip
    """Fills out, like q, and lse (B, H, Sq) or (H, Tq), float32; both contiguous.

    q, k, v: any strides with a unit last one; the rest contiguous. table (buckets, heads) or None, starts: the smallest
    distance of each of its buckets of one direction. left, right: the window, -1: no limit. threshold 0: no dropout.
    """
    if q.numel() == 0:
        return
    c = _config("fwd", q, threshold)
    bias = _expand(table, starts, bidirectional, q.dtype)
    arguments = _arguments(
        q, k, cu_seqlens_q, cu_seqlens_k, key_mask, rng, bias, starts, bidirectional, left, right, scale, threshold,
        dropout_scale, site,
    )  # fmt: skip
    tiles = triton.cdiv(q.shape[-3], c.block_m)
    fwd._fwd[(tiles * q.shape[-2] * _batch(q),)](
        q, k, v, out, lse, **_named_strides(q=q, k=k, v=v), **arguments, tiles=tiles, HAS_BIAS=bias is not None,
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip


def attention_bwd(
    dout, dlse, q, k, v, out, lse, dq, dk, dv, dtable, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    key_mask, table, starts, bidirectional, left, right, scale, threshold, dropout_scale, rng, site,
):  # fmt: skip
    """Fills dq, dk, dv, contiguous, and dtable (buckets, heads) float32 where it is not None.

    dout: any strides with a unit last one; dlse like lse, or None. No sequence is longer than max_seqlen_q, _k; padded:
    not read. The rest as of attention_fwd.
    """
    if q.numel() == 0:  # nothing that a gradient could come from
        for gradient in (dk, dv, dtable):
            if gradient is not None:
                gradient.zero_()
        return
    heads, d = q.shape[-2:]
    sq, sk, batch = q.shape[-3], k.shape[-3], _batch(q)
    block_d = _block_d(d)
    bias = _expand(table, starts, bidirectional, q.dtype)
    arguments = _arguments(
        q, k, cu_seqlens_q, cu_seqlens_k, key_mask, rng, bias, starts, bidirectional, left, right, scale, threshold,
        dropout_scale, site,
    )  # fmt: skip
    strides = _named_strides(q=q, k=k, v=v, do=dout)
    packed, dropout = arguments["PACKED"], arguments["DROPOUT"]
    delta = torch.empty_like(lse)
    sequence = torch.empty(sq, dtype=torch.int32, device=q.device) if packed and dropout else None

    block_m = 16 if q.dtype == torch.float32 else max(16, 4096 // block_d)
    tiles = triton.cdiv(sq, block_m)
    bwd._delta[(tiles * heads * batch,)](
        out, dout, dlse, delta, sequence, cu_seqlens_q, strides["stride_dob"], strides["stride_dom"],
        strides["stride_doh"], arguments["sequences"], sq, heads, tiles,
        HAS_DLSE=dlse is not None, SEQUENCE=sequence is not None, D=d, BLOCK_D=block_d, BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip

    if k.numel():
        c = _config("dkdv", q, threshold)
        tiles = triton.cdiv(sk, c.block_n)
        bwd._dkdv[(tiles * k.shape[-2] * batch,)](
            q, k, v, dout, lse, delta, dk, dv, sequence_ptr=sequence, **strides, **arguments, tiles=tiles,
            HAS_BIAS=bias is not None, BLOCK_M=c.block_m, BLOCK_N=c.block_n, num_warps=c.num_warps,
            num_stages=c.num_stages,
        )  # fmt: skip
    c = _config("dq", q, threshold)
    tiles = triton.cdiv(sq, c.block_m)
    far = q.new_empty(heads, batch * tiles, 2, dtype=torch.float32) if dtable is not None else None
    bwd._dq[(tiles * heads * batch,)](
        q, k, v, dout, lse, delta, dq, far, **strides, **arguments, tiles=tiles, HAS_BIAS=bias is not None,
        HAS_DTABLE=dtable is not None, BLOCK_M=c.block_m, BLOCK_N=c.block_n, num_warps=c.num_warps,
        num_stages=c.num_stages,
    )  # fmt: skip
    if dtable is None:
        return
    c = _config("dtable", q, threshold)
    longest_q, longest_k = (max_seqlen_q, max_seqlen_k) if packed else (sq, sk)
    far_right = arguments["far_right"]
    # The relative positions that are near and can occur, and the diagonals of tiles that hold one of them.
    low, high = 1 - min(starts[-1], longest_k), min(far_right, longest_q) - 1
    low, high = max(low, -arguments["left"]), min(high, arguments["right"])
    first_tile, last_tile = low // c.block_m, (high + c.block_m - 1) // c.block_m
    diagonals = max(1, last_tile - first_tile + 1)
    tiles = triton.cdiv(longest_q, c.block_m)
    items = tiles * arguments["sequences"]
    # Four programs a multiprocessor, as far as there is work: each ends with a pass over its tile for every bucket.
    programs = max(1, min(items, triton.cdiv(4 * multiprocessors(q.device), diagonals * heads)))
    buckets = dtable.shape[0]
    partial = q.new_empty(programs, diagonals, heads, buckets, dtype=torch.float32)
    bwd._dtable[(programs, diagonals, heads)](
        q, k, v, dout, lse, delta, partial, **strides, **arguments, items=items, first_tile=first_tile, tiles=tiles,
        STARTS=starts, BIDIRECTIONAL=bidirectional, BUCKETS=buckets, BLOCK=c.block_m, num_warps=c.num_warps,
        num_stages=c.num_stages,
    )  # fmt: skip
    bwd._sum_dtable[(heads,)](
        partial, far, dtable, programs * diagonals, far.shape[1], heads,
        len(starts) - 1, 2 * len(starts) - 1 if bidirectional else 0,
        BUCKETS=buckets, BLOCK_B=triton.next_power_of_2(buckets), BLOCK_P=32, num_warps=4,
    )  # fmt: skip
