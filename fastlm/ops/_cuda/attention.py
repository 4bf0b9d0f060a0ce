"""attention on CUDA: csrc/cuda/attention_fwd.cu, attention_bwd.cu."""

from __future__ import annotations

import torch

from fastlm import _native
from fastlm.ops import _random
from fastlm.ops._shapes import as_float, contiguous, sequence_strides, unit_stride
from fastlm.ops.attention import Args, BackwardArgs, Gradients, Outputs, empty_backward, empty_forward

_NO_LIMIT = 2**30  # of a window: longer than any sequence, and its sums with an index fit 32 bits


def limit(q, softcap=False, bias=False, cached=False, **features) -> str | None:
    if cached:
        return "it has no kernel for cache_seqlens"
    if softcap and bias:
        return "its kernels take softcap or relative_bias, not both"
    return None if q.shape[-1] <= 256 else f"its kernels take head dimensions up to 256, not {q.shape[-1]}"


def _rows(x: torch.Tensor) -> tuple:
    """x and its strides of sequence, row and head."""
    x = unit_stride(x)
    return x, *sequence_strides(x)


def _bias(args: Args, place: _native.Place) -> torch.Tensor | None:
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


def _shared(args: Args, place: _native.Place) -> dict:
    """The keyword arguments that forward and backward share."""
    q, k, far = args.q, args.k, args.starts[-1] if args.starts else 0
    return {
        "q": _rows(q),
        "k": _rows(k),
        "v": _rows(args.v),
        "cu_q": contiguous(args.cu_seqlens_q),
        "cu_k": contiguous(args.cu_seqlens_k),
        "key_mask": contiguous(args.key_mask),
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
        "dropout": _random.attention_dropout(args.dropout_p, args.rng, args.site),
    }


def attention_fwd(args: Args) -> Outputs:
    outputs = empty_forward(args)
    if outputs.out.numel() == 0:
        return outputs
    place = _native.cuda_place(args.q)
    _native.cuda().attention_fwd(
        **_shared(args, place),
        out=outputs.out,
        lse=outputs.lse,
        dtype=_native.DTYPE_CODES[args.q.dtype],
        place=place,
    )
    return outputs


def attention_bwd(args: BackwardArgs) -> Gradients:
    forward, gradients = args.forward, empty_backward(args)
    q = forward.q
    if q.numel() == 0:  # no query, so all gradients are 0
        return Gradients(*(x.zero_() for x in gradients))
    module, dtype, place = _native.cuda(), _native.DTYPE_CODES[q.dtype], _native.cuda_place(q)
    shared, lse = _shared(forward, place), args.lse.contiguous()
    dq, dk, dv = gradients.dq.unbind(-3) if args.joined else gradients[:3]
    sequence = partial = None
    if forward.packed and forward.dropout_p > 0.0:
        sequence = q.new_empty(q.shape[0], dtype=torch.int32)
    if args.table_gradient:
        tiles, width = module.attention_tiles(**shared, dtype=dtype), shared["far"] + shared["far_right"] + 1
        partial = q.new_empty(tiles, q.shape[-2], width, dtype=torch.float32)
    module.attention_bwd(
        **shared,
        dout=_rows(args.dout),
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
