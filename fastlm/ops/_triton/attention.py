"""attention on Triton: kernels/attention.py, attention_fwd.py, attention_bwd.py."""

from __future__ import annotations

import os

import torch

from fastlm.kernels import attention as kernels
from fastlm.ops import _random
from fastlm.ops._attention_checks import check_cu_seqlens
from fastlm.ops._shapes import contiguous
from fastlm.ops.attention import Args, BackwardArgs, Gradients, Outputs, empty_backward, empty_forward

# Triton reads the variable when it defines a kernel, so when this module imports the kernels.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def limit(q, cached=False, **features) -> str | None:
    if cached:
        return "it has no kernel for cache_seqlens"
    if _INTERPRETED and q.dtype == torch.bfloat16:
        return (
            "Triton's interpreter holds bfloat16 as 16-bit integers, and its tl.dot multiplies these; "
            "use float32 or float16, or leave TRITON_INTERPRET unset"
        )
    return None if q.shape[-1] <= 256 else f"it takes head dimensions up to 256, not {q.shape[-1]}"


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a contiguous copy if Triton cannot tell that rows and heads start on 16 bytes.

    Triton can tell it of strides that 16 divides. For others it compiles another kernel, which loads two bytes at a
    time and is slower than the copy.
    """
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
    seen = x.stride(-1) == 1 and not any(n % 16 for n in (*strides, x.data_ptr()))
    return x if seen else x.contiguous()


def _options(args: Args) -> kernels.Options:
    check_cu_seqlens(args)
    dropout = _random.attention_dropout(args.dropout_p, args.rng, args.site)
    return kernels.Options(
        cu_seqlens_q=contiguous(args.cu_seqlens_q),
        cu_seqlens_k=contiguous(args.cu_seqlens_k),
        max_seqlen_q=args.max_seqlen_q,
        max_seqlen_k=args.max_seqlen_k,
        key_mask=contiguous(args.key_mask),
        table=contiguous(args.table),
        starts=args.starts,
        bidirectional=args.bidirectional,
        left=args.window_left,
        right=args.window_right,
        scale=args.softmax_scale,
        softcap=args.softcap,
        threshold=dropout.threshold,
        dropout_scale=dropout.scale,
        rng=dropout.rng,
        site=dropout.site,
    )


def attention_fwd(args: Args) -> Outputs:
    options, outputs = _options(args), empty_forward(args)
    kernels.attention_fwd(_aligned(args.q), _aligned(args.k), _aligned(args.v), outputs.out, outputs.lse, options)
    return outputs


def attention_bwd(args: BackwardArgs) -> Gradients:
    forward, gradients = args.forward, empty_backward(args)
    kernels.attention_bwd(
        _aligned(args.dout),
        contiguous(args.dlse),
        _aligned(forward.q),
        _aligned(forward.k),
        _aligned(forward.v),
        args.out.contiguous(),
        args.lse.contiguous(),
        *(gradients.dq.unbind(-3) if args.joined else gradients[:3]),
        gradients.dtable if args.table_gradient else None,
        _options(forward),
        parts=3 if args.joined else 1,
    )
    if args.table_gradient and forward.packed and forward.cu_seqlens_q.shape[0] > 1:
        # The kernel of dtable loops up to max_seqlen. On a device, where the values are not checked, a longer sequence
        # makes dtable NaN.
        too_long = forward.cu_seqlens_q.diff().amax() > forward.max_seqlen_q
        too_long |= forward.cu_seqlens_k.diff().amax() > forward.max_seqlen_k
        gradients.dtable.masked_fill_(too_long, torch.nan)
    return gradients
