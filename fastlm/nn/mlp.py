"""The feed-forward block, with its first bias and its GELU in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm import ops


class MLP(torch.nn.Module):
    """linear2(gelu(linear1(x))), or gated: linear2(gelu(a) * b) with (a, b) the halves of linear1(x).

    Args:
        in_features, hidden_features, out_features: widths; out_features defaults to in_features.
        gated: GEGLU (Shazeer 2020, arXiv:2002.05202): linear1 has 2·hidden_features rows, the activated half first.
        approximate: "none" (erf) or "tanh", as torch.nn.GELU.
        bias: both linears have one; a gated block has none in linear1, as in T5.

    The GEMM of linear1 runs without its bias, which `fastlm.ops.gelu` adds as it reads the result.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        gated: bool = False,
        approximate: str = "none",
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.gated, self.approximate = gated, approximate
        rows = 2 * hidden_features if gated else hidden_features
        self.linear1 = torch.nn.Linear(in_features, rows, bias=bias and not gated, **factory)
        self.linear2 = torch.nn.Linear(hidden_features, out_features or in_features, bias=bias, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features)."""
        h = F.linear(x, self.linear1.weight)
        h, gate = h.chunk(2, dim=-1) if self.gated else (h, None)
        return self.linear2(ops.gelu(h, self.linear1.bias, gate=gate, approximate=self.approximate))

    def extra_repr(self) -> str:
        return f"gated={self.gated}, approximate={self.approximate!r}"
