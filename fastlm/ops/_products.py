"""Products of bfloat16 matrices on a CPU, in the forms that oneDNN is fast in.

It multiplies by rows of its first operand. A transposed one it transposes inside, which takes as long as the product:
1024 x 512 x 2048 on one core with AMX runs at 580 GFLOP/s, on a transposed copy (csrc/cpu/transpose.cpp) at 1,180. The
copy takes 0.4 ns an element, which the product wins back from some 250 columns on.

torch's addmm copies the bias to all rows of the result first, and oneDNN reads them again: 614 x 256 x 30522 takes
81 ms, without a bias 38. The op that torch.compile calls has oneDNN add the bias: 37 ms.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from fastlm import _native

COLUMNS = 256  # of a product for which a transposed copy is made


def transposed_mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """aᵀ b for a (n, m), b (n, k) -> (m, k), as torch.mm(a.t(), b, out=out)."""
    small = b.shape[1] < COLUMNS or a.stride(-1) != 1
    if small or a.dtype != torch.bfloat16 or not a.is_cpu or _native.missing_cpu() is not None:
        # Of rows with another distance torch would copy the transpose, ten times slower.
        return torch.mm(a.contiguous().t() if a.is_cpu else a.t(), b, out=out)
    copy = a.new_empty(a.shape[1], a.shape[0])
    _native.cpu().transpose16(
        x=a, y=copy, rows=a.shape[0], cols=a.shape[1], stride_x=a.stride(0), threads=_native.threads()
    )
    return torch.mm(copy, b, out=out)


def adds_bias(x: torch.Tensor) -> bool:
    """Whether `linear` has a bias added in the product, where F.linear would not."""
    return x.is_cpu and x.dtype == torch.bfloat16 and x.numel() > 0 and x.is_contiguous() and _has_onednn()


def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """F.linear, without a gradient; x, w and b of one dtype."""
    if b is not None and adds_bias(x):
        return torch.ops.mkldnn._linear_pointwise(x, w, b.contiguous(), "none", [], "")  # it ignores a stride of b
    return F.linear(x, w, b)


@functools.cache
def _has_onednn() -> bool:
    ops = torch.ops.mkldnn
    return (
        hasattr(ops, "_linear_pointwise") and torch.backends.mkldnn.is_available() and ops._is_mkldnn_bf16_supported()
    )
