"""The product of a transposed bfloat16 matrix on a CPU, csrc/cpu/transpose.cpp.

oneDNN multiplies by rows of its first operand. It transposes another one inside, which takes as long as the product:
1024 x 512 x 2048 on one core with AMX runs at 580 GFLOP/s, on a transposed copy at 1,180. The copy takes 0.4 ns an
element, which the product wins back from some 250 columns on.
"""

from __future__ import annotations

import torch

from fastlm import _native

COLUMNS = 384  # of a product for which the copy is made


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
