"""attention on a CPU: csrc/cpu/attention_fwd.cpp, attention_bwd.cpp."""

from __future__ import annotations

import torch

from fastlm import _native
from fastlm.ops import _random
from fastlm.ops._attention_checks import check_cu_seqlens
from fastlm.ops._shapes import as_float, contiguous, sequence_strides, unit_stride
from fastlm.ops.attention import Args, BackwardArgs, Gradients, Outputs, empty_backward, empty_forward


def limit(q, cached=False, **features) -> str | None:
    return "it has no kernel for cache_seqlens" if cached else None


def _shared(args: Args, lse: torch.Tensor) -> dict:
    """The keyword arguments that forward and backward share."""
    check_cu_seqlens(args)
    q, k, v, starts = unit_stride(args.q), unit_stride(args.k), unit_stride(args.v), args.starts
    return {
        "q": q,
        "k": k,
        "v": v,
        "q_stride": sequence_strides(q),
        "k_stride": sequence_strides(k),
        "v_stride": sequence_strides(v),
        "cu_q": contiguous(args.cu_seqlens_q),
        "cu_k": contiguous(args.cu_seqlens_k),
        "key_mask": contiguous(args.key_mask),
        "table": as_float(args.table),
        "starts": torch.tensor(starts, dtype=torch.int32) if starts else None,
        "one_way": len(starts),
        "bidirectional": args.bidirectional,
        "batch": args.cu_seqlens_q.numel() - 1 if args.packed else q.shape[0],
        "heads": q.shape[-2],
        "kv_heads": k.shape[-2],
        "d": q.shape[-1],
        "sq": 0 if args.packed else q.shape[1],
        "sk": 0 if args.packed else k.shape[1],
        "left": args.window_left,
        "right": args.window_right,
        "scale": args.softmax_scale,
        "softcap": args.softcap,
        "dropout": _random.attention_dropout(args.dropout_p, args.rng, args.site),
        "lse_sequence": 0 if args.packed else lse.stride(0),
        "lse_head": lse.stride(-2),
    }


def attention_fwd(args: Args) -> Outputs:
    outputs = empty_forward(args)
    _native.cpu().attention_fwd(
        **_shared(args, outputs.lse),
        out=outputs.out,
        lse=outputs.lse,
        dtype=_native.DTYPE_CODES[args.q.dtype],
        threads=_native.threads(),
    )
    return outputs


def attention_bwd(args: BackwardArgs) -> Gradients:
    gradients, dout, lse = empty_backward(args), unit_stride(args.dout), args.lse.contiguous()
    shared = _shared(args.forward, lse)
    q, k = shared["q"], shared["k"]
    partial = dtable = dtable_partial = None
    if k.shape[-2] < q.shape[-2]:
        partial = q.new_empty(2, *k.shape[:-2], q.shape[-2], k.shape[-1], dtype=torch.float32)
    if args.table_gradient:
        dtable = gradients.dtable
        dtable_partial = q.new_empty(shared["batch"], *dtable.shape, dtype=torch.float32)
    _native.cpu().attention_bwd(
        **shared,
        out=args.out.contiguous(),
        dout=dout,
        dout_stride=sequence_strides(dout),
        lse=lse,
        dlse=contiguous(args.dlse),
        dq=gradients.dq,
        dk=gradients.dk,
        dv=gradients.dv,
        partial=partial,
        dtable=dtable,
        dtable_partial=dtable_partial,
        dtype=_native.DTYPE_CODES[q.dtype],
        threads=_native.threads(),
    )
    return gradients
