"""attention in Triton: configurations and launchers. The maths: fastlm/ops/attention.py.

The kernels: attention_fwd.py, attention_bwd.py, attention_bias.py and attention_cache.py. They share attention_plan.py
and attention_tile.py.
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import attention_bias as bias_kernels
from . import attention_bwd as bwd
from . import attention_cache as cache_kernels
from . import attention_fwd as fwd
from .attention_plan import Features, Rows
from .device import architecture, multiprocessors, stages
from .tuning import choose


@dataclass(frozen=True)
class Config:
    """One kernel's block of queries and keys, its warps, and the stages of its loads in flight.

    descriptors: `_fwd` loads k and v by tensor descriptors (TMA) where every query sees every key, if `_describable`.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


# By the head dimension, rounded up to a power of two. None spills, packed input with dropout included.
#
# sm_90 and sm_100 have 228 KB of shared memory. d 64 and 128: the fastest of 30 to 40 on an H100 (LOG.md, 2026-11-26).
# Blocks have 64 rows, one group of four warps for wgmma. Two or three such blocks on a multiprocessor hide each other's
# exp2; with eight warps half of a thread's registers would be empty. A forward of 128 rows in blocks of 32 keys is
# faster only without dropout, by 7%. d 256 is not measured: it has room for 64 rows, but dkdv, which holds two tiles of
# gradients, has no room for wgmma's tiles and uses mma.sync.
_WGMMA = {
    "fwd": {64: Config(128, 32, 8, 3), 128: Config(64, 64, 4, 3), 256: Config(64, 32, 8, 2)},
    "dkdv": {64: Config(64, 64, 4, 3), 128: Config(32, 128, 8, 3), 256: Config(32, 32, 8, 1)},
    "dq": {64: Config(64, 64, 4, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 2)},
}
_WGMMA_DROPOUT = {"fwd": {64: Config(64, 64, 4, 3)}, "dkdv": {64: Config(64, 64, 4, 2)}}
# sm_80, and sm_86, sm_89 and sm_120 with 99 KB: mma.sync takes its operands from registers, so tiles are smaller. These
# are the largest that ptxas fits into 255 registers, with eight warps; with four most spill. Not measured.
_MMA = {
    "fwd": {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 2)},
    "dkdv": {64: Config(32, 128, 8, 2), 128: Config(32, 64, 8, 2), 256: Config(32, 32, 8, 1)},
    "dq": {64: Config(64, 32, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 1)},
}
# float32 uses FMA, unrolled over the whole tile: larger tiles would make the code huge.
_FLOAT32 = {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 32, 8, 1)}

# Forward on sm_90 without dropout, by descriptors: the blocks for which the model of kernels predicts at least 5% less
# time than for _WGMMA's (LOG.md, 2026-11-30). No GPU has run them, so the rule has none of them; `fastlm tune` does.
_DESCRIBED = {
    128: ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2)),
    256: ((64, 32, 8, 2), (64, 32, 8, 3), (64, 64, 8, 2)),
}


def config(kernel: str, block_d: int, itemsize: int, dropout: bool) -> Config:
    """kernel: "fwd", "dkdv", "dq", "dtable" or "cache"."""
    shape = block_d, itemsize, architecture(), int(dropout)
    return choose(f"attention_{kernel}", shape, lambda: _rule(kernel, *shape), lambda: _others(kernel, *shape))


def _rule(kernel: str, block_d: int, itemsize: int, arch: int, dropout: int) -> Config:
    if kernel == "dtable":  # the largest that 99 KB hold: larger tiles leave fewer diagonals of tiles near
        return Config(64, 64, 8, 1) if block_d * itemsize <= 256 else Config(32, 32, 8, 1)
    width = max(64, block_d)
    if kernel == "cache":  # rows of a decode step; not measured
        block_n = min(64, 16384 // (width * itemsize))
        return Config(16, block_n, 4, stages(block_n * width * itemsize))
    if itemsize == 4:
        return _FLOAT32[width]
    if arch // 10 not in (9, 10):
        return _MMA[kernel][width]
    return (dropout and _WGMMA_DROPOUT.get(kernel, {}).get(width)) or _WGMMA[kernel][width]


def _others(kernel: str, block_d: int, itemsize: int, arch: int, dropout: int) -> list[Config]:
    sizes, depths = ((32, 64), (1, 2)) if itemsize == 4 else ((32, 64, 128), (1, 2, 3, 4))
    sizes_m = (16,) if kernel == "cache" else sizes
    every = [Config(*fields) for fields in itertools.product(sizes_m, sizes, (4, 8), depths)]
    if kernel == "fwd" and itemsize == 2 and arch // 10 == 9 and not dropout:
        every += [Config(*block, descriptors=True) for block in _DESCRIBED.get(block_d, ())]
    return [c for c in every if kernel != "dtable" or c.block_m == c.block_n]


_NO_LIMIT = 2**30  # of a window: past any sequence, and sums with an index stay in 32 bits


def _limit(before_or_after: int) -> int:
    """One side of the window for the kernels; -1: no limit."""
    return min(before_or_after, _NO_LIMIT) if before_or_after >= 0 else _NO_LIMIT


def _block_d(d: int) -> int:
    return max(16, triton.next_power_of_2(d))


def _config(kernel: str, q: torch.Tensor, threshold: int) -> Config:
    return config(kernel, _block_d(q.shape[-1]), q.element_size(), threshold > 0)


def _precision(dtype: torch.dtype) -> str:
    """Of the products: float32 stays float32, unless torch's switch allows tf32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _rows(x: torch.Tensor) -> Rows:
    """x for the kernels; a packed tensor is one sequence. Strides of size 1 are 0, to compile for one number."""
    strides = [stride if size > 1 and x.numel() else 0 for size, stride in zip(x.shape[:-1], x.stride())]
    return Rows(x, 0, *strides) if x.dim() == 3 else Rows(x, *strides)


def _describable(x: torch.Tensor) -> bool:
    """Whether TMA can load x: addresses of rows and heads that 16 bytes divide, and no stride of 0 over several."""
    steps = [stride * x.element_size() for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and all(step % 16 == 0 and 0 < step < 2**40 for step in steps)


def _descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """x as (b, heads, rows, D), packed as (1, heads, rows, D), in blocks of so many rows of one head."""
    # No load takes the stride of a dimension of one; TMA refuses some, so it has one of 16.
    strides = [stride if size > 1 else 16 for size, stride in zip((1, *x.shape)[-4:], (16, *x.stride())[-4:])]
    b, m, h, d = (1, *x.shape)[-4:]
    return TensorDescriptor(x, [b, h, m, d], [strides[0], strides[2], strides[1], 1], [1, 1, rows, _block_d(d)])


def _descriptors(c: Config, k: torch.Tensor, v: torch.Tensor) -> dict[str, TensorDescriptor]:
    """What `_fwd` loads k and v by, besides pointers; {} if the configuration, or TMA for one of them, has pointers."""
    if not (c.descriptors and _describable(k) and _describable(v)):
        return {}
    return {"k_desc": _descriptor(k, c.block_n), "v_desc": _descriptor(v, c.block_n)}


class Options(NamedTuple):
    """What both launchers take. The tensors are contiguous."""

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int  # no sequence is longer; read only by backward, if packed
    max_seqlen_k: int
    key_mask: torch.Tensor | None
    table: torch.Tensor | None  # (buckets, heads)
    starts: tuple[int, ...]  # the smallest distance of each of the table's buckets of one direction
    bidirectional: bool
    left: int  # the window, -1: no limit
    right: int
    scale: float
    softcap: float  # 0: none
    threshold: int  # of dropout; 0: none
    dropout_scale: float
    rng: torch.Tensor | None
    site: int

    def features(self, dtype: torch.dtype) -> Features:
        return Features(
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            self.key_mask,
            _expand(self.table, self.starts, self.bidirectional, dtype),
            self.rng if self.threshold else None,
            self.scale,
            self.dropout_scale,
            self.softcap * _unit(dtype) if self.softcap > 0.0 else None,
        )


def _numbers(q, k, options: Options):
    """The loose arguments of all kernels: integers that must not be specialised, and constants."""
    far, cu_seqlens = options.starts[-1] if options.starts else 1, options.cu_seqlens_q
    return {
        "sequences": cu_seqlens.numel() - 1 if cu_seqlens is not None else q.shape[0],
        "sq": q.shape[-3],
        "sk": k.shape[-3],
        "heads": q.shape[-2],
        "group": q.shape[-2] // k.shape[-2],
        "left": _limit(options.left),
        "right": _limit(options.right),
        "far": far,
        "far_right": far if options.bidirectional else 0,
        "site": options.site,
        "threshold": options.threshold,
        "D": q.shape[-1],
        "BLOCK_D": _block_d(q.shape[-1]),
        "PRECISION": _precision(q.dtype),
    }


def _blocks(c: Config):
    return {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "num_warps": c.num_warps, "num_stages": c.num_stages}


def _unit(dtype: torch.dtype) -> float:
    """Of the scores of q's dtype: see attention_tile.py."""
    return 1.0 if dtype == torch.float32 else math.log2(math.e)


def _expand(table: torch.Tensor | None, starts: tuple[int, ...], bidirectional: bool, dtype: torch.dtype):
    """(heads, 2 starts[-1] + 1) float32: what the kernels add, by relative position; None without a table.

    In the unit of the scores.
    """
    if table is None:
        return None
    heads, far, unit = table.shape[1], starts[-1], _unit(dtype)
    width = 2 * far + 1
    bias = table.new_empty(heads, width, dtype=torch.float32)
    bias_kernels._expand_bias[(heads, triton.cdiv(width, 256))](
        table, bias, heads, far, unit, STARTS=starts, BIDIRECTIONAL=bidirectional, BLOCK=256
    )
    return bias


def _batch(q):
    return 1 if q.dim() == 3 else q.shape[0]


def attention_fwd(q, k, v, out, lse, options: Options) -> None:
    """Fills out, like q, and lse (B, H, Sq) or (H, Tq), float32; both contiguous.

    q, k, v: any strides with a unit last one.
    """
    if q.numel() == 0:
        return
    c = _config("fwd", q, options.threshold)
    features, numbers = options.features(q.dtype), _numbers(q, k, options)
    tiles = triton.cdiv(q.shape[-3], c.block_m)
    rows, constants = tuple(map(_rows, (q, k, v))), {**_blocks(c), **_descriptors(c, k, v)}
    fwd._fwd[(tiles * q.shape[-2] * _batch(q),)](*rows, out, lse, features, tiles=tiles, **numbers, **constants)


class CacheOptions(NamedTuple):
    """What attention_cache takes beside the tensors; the names mean what they mean in Options."""

    cache_seqlens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    max_seqlen_q: int
    table: torch.Tensor | None
    starts: tuple[int, ...]
    bidirectional: bool
    left: int
    right: int
    scale: float
    softcap: float


_MOST_SPLITS = 128


def _splits(programs: int, sk: int, block_n: int, device: torch.device) -> int:
    """Programs that divide the keys of a tile: four programs a multiprocessor in all, two blocks of keys for each."""
    return max(1, min(4 * multiprocessors(device) // max(programs, 1), sk // (2 * block_n), _MOST_SPLITS))


def attention_cache(q, k, v, out, lse, options: CacheOptions) -> None:
    """Fills out and lse as attention_fwd does; k and v (B, S_max, Hkv, D): any strides with a unit last one."""
    packed = options.cu_seqlens_q is not None
    if packed:  # for rows of no sequence, and where cu_seqlens are wrong
        out.fill_(math.nan)
        lse.fill_(math.nan)
    if q.numel() == 0:
        return
    (sequences, sk, kv_heads, d), sq, heads = k.shape, q.shape[-3], q.shape[-2]
    group, block_d = heads // kv_heads, _block_d(d)
    longest = min(options.max_seqlen_q, sq) if packed else sq
    c = _config("cache", q, 0)
    block_m = c.block_m if longest * group <= c.block_m else max(32, c.block_m)
    tiles = triton.cdiv(longest * group, block_m)
    programs = sequences * kv_heads * tiles
    splits, rows = _splits(programs, sk, c.block_n, q.device), q.numel() // d
    parts = cache_kernels.Parts(None, None, None)
    if splits > 1:
        sums = q.new_empty(2, splits, rows, dtype=torch.float32)
        if packed:
            sums.fill_(math.nan)
        parts = cache_kernels.Parts(q.new_empty(splits, rows, d, dtype=torch.float32), *sums.unbind(0))
    far = options.starts[-1] if options.starts else 1
    cache = cache_kernels.Cache(
        options.cache_seqlens,
        options.cu_seqlens_q,
        _expand(options.table, options.starts, options.bidirectional, q.dtype),
        options.scale,
        options.softcap * _unit(q.dtype) if options.softcap > 0.0 else None,
    )
    cache_kernels._cache[(programs * splits,)](
        _rows(q),
        _rows(k),
        _rows(v),
        out,
        lse,
        parts,
        cache,
        sequences=sequences,
        sq=sq,
        sk=sk,
        longest=longest,
        heads=heads,
        group=group,
        tiles=tiles,
        splits=splits,
        left=_limit(options.left),
        right=_limit(options.right),
        far=far,
        far_right=far if options.bidirectional else 0,
        rows=rows,
        D=d,
        BLOCK_D=block_d,
        BLOCK_M=block_m,
        BLOCK_N=c.block_n,
        PRECISION=_precision(q.dtype),
        num_warps=c.num_warps,
        num_stages=c.num_stages,
    )
    if splits > 1:
        float32 = q.dtype == torch.float32
        cache_kernels._cache_sum[(rows,)](
            parts,
            out,
            lse,
            sq,
            heads,
            splits,
            rows,
            D=d,
            BLOCK_D=block_d,
            MOST=_MOST_SPLITS,
            FLOAT32=float32,
            num_warps=4,
        )


def attention_bwd(dout, dlse, q, k, v, out, lse, dq, dk, dv, dtable, options: Options, parts: int = 1) -> None:
    """Fills dq, dk, dv, and dtable (buckets, heads) float32 unless it is None.

    dq, dk, dv: contiguous, or with parts=3 those of one contiguous (..., 3, H, D).

    dout: any strides with a unit last one; dlse like lse, or None. The rest as in attention_fwd.
    """
    if q.numel() == 0:  # no gradient comes from anywhere
        for gradient in (dk, dv, dtable):
            if gradient is not None:
                gradient.zero_()
        return
    heads, sq, sk, batch = q.shape[-2], q.shape[-3], k.shape[-3], _batch(q)
    features, numbers = options.features(q.dtype), _numbers(q, k, options)
    threshold, packed = options.threshold, options.cu_seqlens_q is not None
    delta = torch.empty_like(lse)
    inputs = (*map(_rows, (q, k, v, dout)), lse, delta)
    sequence = torch.empty(sq, dtype=torch.int32, device=q.device) if packed and threshold else None
    c = _config("dq", q, threshold)
    tiles = triton.cdiv(sq, c.block_m)
    far = q.new_empty(heads, batch * tiles, 2, dtype=torch.float32) if dtable is not None else None
    # First: it leaves delta and sequence for the others.
    bwd._dq[(tiles * heads * batch,)](
        *inputs, out, dlse, sequence, dq, far, features, tiles=tiles, **numbers, **_blocks(c), PARTS=parts
    )
    if k.numel():
        c = _config("dkdv", q, threshold)
        tiles = triton.cdiv(sk, c.block_n)
        bwd._dkdv[(tiles * k.shape[-2] * batch,)](
            *inputs,
            dk,
            dv,
            sequence,
            features,
            tiles=tiles,
            WGMMA=architecture() // 10 == 9,
            PARTS=parts,
            **numbers,
            **_blocks(c),
        )
    if dtable is not None:
        longest = (options.max_seqlen_q, options.max_seqlen_k) if packed else (sq, sk)
        _launch_dtable(inputs, features, numbers, options, longest, far, dtable)


def _launch_dtable(inputs, features, numbers, options, longest, far, dtable):
    """dtable = the sum of `far`, by `_dq`, and of the tiles near the diagonal. longest: most queries, most keys."""
    q, (buckets, heads) = inputs[0].ptr, dtable.shape
    starts, bidirectional = options.starts, options.bidirectional
    c = _config("dtable", q, numbers["threshold"])
    # The relative positions that are near and can occur, and the diagonals of tiles that hold one of them.
    low, high = 1 - min(starts[-1], longest[1]), min(numbers["far_right"], longest[0]) - 1
    low, high = max(low, -numbers["left"]), min(high, numbers["right"])
    first_tile, last_tile = low // c.block_m, (high + c.block_m - 1) // c.block_m
    diagonals = max(1, last_tile - first_tile + 1)
    tiles = triton.cdiv(longest[0], c.block_m)
    items = tiles * numbers["sequences"]
    # At most four programs a multiprocessor: each ends with a pass over its tile for every bucket.
    programs = max(1, min(items, triton.cdiv(4 * multiprocessors(q.device), diagonals * heads)))
    partial = q.new_empty(programs, diagonals, heads, buckets, dtype=torch.float32)
    constants = {"STARTS": starts, "BIDIRECTIONAL": bidirectional, "BUCKETS": buckets, "BLOCK": c.block_m}
    constants |= {"num_warps": c.num_warps, "num_stages": c.num_stages}
    bias_kernels._dtable[(programs, diagonals, heads)](
        *inputs, partial, features, items=items, first_tile=first_tile, tiles=tiles, **numbers, **constants
    )
    left, right = len(starts) - 1, 2 * len(starts) - 1 if bidirectional else 0  # the buckets of far positions
    block_b, fars = triton.next_power_of_2(buckets), far.shape[1]
    bias_kernels._sum_dtable[(heads,)](
        partial, far, dtable, programs * diagonals, fars, heads, left, right, buckets, block_b, 32, num_warps=4
    )
