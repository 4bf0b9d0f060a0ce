"""attention on CUDA: csrc/cuda/attention_*.cu; of long sequences on sm_90, csrc/cuda/sm90/attention_*.cu."""

from __future__ import annotations

import math

import torch

from fastlm import _native
from fastlm.ops import _random, _registry
from fastlm.ops._attention_checks import check_cached
from fastlm.ops._shapes import as_float, contiguous, sequence_strides, unit_stride
from fastlm.ops.attention import Args, BackwardArgs, CacheArgs, Gradients, Outputs, empty_backward, empty_forward

_NO_LIMIT = 2**30  # of a window: longer than any sequence, and its sums with an index fit 32 bits


def limit(q, softcap=False, bias=False, cached=False, **features) -> str | None:
    if softcap and bias and not cached:
        return "its kernels take softcap or relative_bias, not both"
    return None if q.shape[-1] <= 256 else f"its kernels take head dimensions up to 256, not {q.shape[-1]}"


def _rows(x: torch.Tensor) -> tuple:
    """x and its strides of sequence, row and head."""
    x = unit_stride(x)
    return x, *sequence_strides(x)


def _bias(args: Args | CacheArgs, place: _native.Place) -> torch.Tensor | None:
    """(heads, 2 far + 1): the table by relative position, far = starts[-1]; None without a table."""
    if args.table is None:
        return None
    table, heads = as_float(args.table), args.q.shape[-2]
    bias = table.new_empty(heads, 2 * args.starts[-1] + 1)
    _native.cuda().attention_bias(
        table=table,
        bias=bias,
        starts=args.starts,
        heads=heads,
        bidirectional=args.bidirectional,
        dtype=_native.DTYPE_CODES[args.q.dtype],
        place=place,
    )
    return bias


def _every(args: Args | CacheArgs, place: _native.Place) -> dict:
    """The keyword arguments that all of the kernels share."""
    q, k, far = args.q, args.k, args.starts[-1] if args.starts else 0
    return {
        "q": _rows(q),
        "k": _rows(k),
        "v": _rows(args.v),
        "cu_q": contiguous(args.cu_seqlens_q),
        "bias": _bias(args, place),
        "sequences": args.cu_seqlens_q.numel() - 1 if args.packed else q.shape[0],
        "heads": q.shape[-2],
        "group": q.shape[-2] // k.shape[-2],
        "d": q.shape[-1],
        "sq": q.shape[-3],
        "sk": k.shape[-3],
        "left": args.window_left if args.window_left < _NO_LIMIT else -1,
        "right": args.window_right if args.window_right < _NO_LIMIT else -1,
        "far": far,
        "far_right": far if args.bidirectional else 0,
        "scale": args.softmax_scale,
        "softcap": args.softcap,
    }


def _shared(args: Args, place: _native.Place) -> dict:
    """The keyword arguments that forward and backward share."""
    return {
        **_every(args, place),
        "cu_k": contiguous(args.cu_seqlens_k),
        "key_mask": contiguous(args.key_mask),
        "dropout": _random.attention_dropout(args.dropout_p, args.rng, args.site),
    }


def _takes_sm90(args: Args) -> bool:
    """Whether the kernels of csrc/cuda/sm90 run. Forward and backward have the same answer."""
    q, keys = args.q, args.k.shape[-3]
    longest = args.max_seqlen_q if args.packed else q.shape[-3]
    return _registry.kernel("attention", "cuda", q, keys=keys, longest=longest) == "sm90"


def _mapped(x: torch.Tensor) -> torch.Tensor:
    """x, or a contiguous copy if TMA cannot read it: its address and strides must be multiples of 16 bytes, none 0."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
    aligned = all(n and n * x.element_size() % 16 == 0 for n in strides) and x.data_ptr() % 16 == 0
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _all_mapped(args: Args) -> Args:
    return args._replace(q=_mapped(args.q), k=_mapped(args.k), v=_mapped(args.v))


def _of_one_head(args: Args) -> Args:
    """For forward: k and v that are expanded from one head, as that head, which all queries share. The same bits."""
    k, v = args.k, args.v
    if k.shape[-2] == 1 or k.stride(-2) or v.stride(-2):
        return args
    return args._replace(k=k[..., :1, :], v=v[..., :1, :])


def attention_fwd(args: Args) -> Outputs:
    outputs = empty_forward(args)
    if outputs.out.numel() == 0:
        return outputs
    place, forward = _native.cuda_place(args.q), _native.cuda().attention_fwd
    if _takes_sm90(args):
        forward = _native.cuda().attention_fwd_sm90
        args = _all_mapped(_of_one_head(args))
    forward(
        **_shared(args, place),
        out=outputs.out,
        lse=outputs.lse,
        dtype=_native.DTYPE_CODES[args.q.dtype],
        place=place,
    )
    return outputs


def attention_cache(args: CacheArgs) -> Outputs:
    check_cached(args)
    outputs, q, k = empty_forward(args), args.q, args.k
    if args.packed:  # for rows of no sequence, and where cu_seqlens are wrong
        for x in outputs:
            x.fill_(math.nan)
    if outputs.out.numel() == 0:
        return outputs
    module, place = _native.cuda(), _native.cuda_place(q)
    longest = min(args.max_seqlen_q, q.shape[0]) if args.packed else q.shape[1]
    splits = module.attention_cache_splits(
        sequences=k.shape[0],
        kv_heads=k.shape[2],
        rows=longest * (q.shape[-2] // k.shape[2]),
        sk=k.shape[1],
        place=place,
    )
    parts = maxima = sums = None
    if splits > 1:
        rows = q.numel() // q.shape[-1]
        parts = q.new_empty(splits, rows, q.shape[-1], dtype=torch.float32)
        both = q.new_empty(2, splits, rows, dtype=torch.float32)
        maxima, sums = (both.fill_(math.nan) if args.packed else both).unbind(0)
    module.attention_cache(
        **_every(args, place),
        lengths=args.cache_seqlens.contiguous(),
        longest=longest,
        splits=splits,
        out=outputs.out,
        lse=outputs.lse,
        parts=parts,
        maxima=maxima,
        sums=sums,
        dtype=_native.DTYPE_CODES[q.dtype],
        place=place,
    )
    return outputs


def attention_bwd(args: BackwardArgs) -> Gradients:
    forward, gradients = args.forward, empty_backward(args)
    q = forward.q
    if q.numel() == 0:  # no query, so all gradients are 0
        return Gradients(*(x.zero_() for x in gradients))
    module, dtype, place = _native.cuda(), _native.DTYPE_CODES[q.dtype], _native.cuda_place(q)
    backward, dout = module.attention_bwd, args.dout
    if _takes_sm90(forward):
        backward, forward, dout = module.attention_bwd_sm90, _all_mapped(forward), _mapped(dout)
    shared, lse = _shared(forward, place), args.lse.contiguous()
    dq, dk, dv = gradients.dq.unbind(-3) if args.joined else gradients[:3]
    sequence = partial = None
    if forward.packed and forward.dropout_p > 0.0:
        sequence = q.new_empty(q.shape[0], dtype=torch.int32)
    if args.table_gradient:
        tiles, width = module.attention_tiles(**shared, dtype=dtype), shared["far"] + shared["far_right"] + 1
        partial = q.new_empty(tiles, q.shape[-2], width, dtype=torch.float32)
    backward(
        **shared,
        dout=_rows(dout),
        out=args.out.contiguous(),
        lse=lse,
        dlse=contiguous(args.dlse),
        delta=torch.empty_like(lse),
        sequence=sequence,
        dq=dq,
        dk=dk,
        dv=dv,
        parts=3 if args.joined else 1,
        partial=partial,
        dtype=dtype,
        place=place,
    )
    if args.table_gradient:
        module.attention_dtable(
            partial=partial,
            dtable=gradients.dtable,
            tiles=tiles,
            starts=forward.starts,
            heads=q.shape[-2],
            bidirectional=forward.bidirectional,
            place=place,
        )
    return gradients
