"""The feed-forward block, with the first bias and the GELU in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm import ops
from fastlm.nn.dropout import Dropout
from fastlm.nn.linear import Linear, linear
from fastlm.ops import _checks


class MLP(torch.nn.Module):
    """linear2(drop(act(linear1(x)))), or gated: linear2(drop(act(a) * b)) with (a, b) the halves of linear1(x).

    Args:
        in_features, hidden_features, out_features: widths; out_features defaults to in_features.
        gated: GEGLU, ReGLU, SwiGLU (Shazeer 2020, arXiv:2002.05202): linear1 has 2·hidden_features rows, the activated
            half first.
        activation: "gelu", "relu" or "silu".
        approximate: "none" (erf) or "tanh", as torch.nn.GELU; read for "gelu" alone.
        bias: whether both linears have one; in a gated block linear1 never has, as in T5.
        dropout: dropout probability of linear2's input; site: the number of that dropout call site.

    If `fastlm.ops.gelu` can add the bias of linear1, the GEMM runs without it.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        gated: bool = False,
        activation: str = "gelu",
        approximate: str = "none",
        bias: bool = True,
        dropout: float = 0.0,
        site: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        _checks.one_of("activation", activation, ("gelu", "relu", "silu"))
        factory = {"device": device, "dtype": dtype}
        self.gated, self.activation, self.approximate = gated, activation, approximate
        rows = 2 * hidden_features if gated else hidden_features
        self.linear1 = Linear(in_features, rows, bias=bias and not gated, **factory)
        self.linear2 = Linear(hidden_features, out_features or in_features, bias=bias, **factory)
        self.dropout = Dropout(dropout, site=site)

    def forward(
        self, x: torch.Tensor, rng: torch.Tensor | None = None, *, keep: bool = False, constant_bias: bool = False
    ):
        """x (..., in_features) -> (..., out_features). rng: of the dropout; see `fastlm.nn.Dropout`.

        keep: returns (y, x), where the x is for the residual; constant_bias: of linear2. See `fastlm.nn.linear.linear`.
        """
        if self.activation == "gelu":  # which adds the bias
            h = linear(x, self.linear1.weight, keep=keep)
        else:
            h = self.linear1(x, keep=keep)
        h, x = h if keep else (h, x)
        y = self.linear2(self._activated(h, rng), constant_bias=constant_bias)
        return (y, x) if keep else y

    def _activated(self, h, rng):
        h, gate = h.chunk(2, dim=-1) if self.gated else (h, None)
        if self.activation == "relu" and gate is None:
            return self.dropout(h, rng, relu=True)
        if self.activation == "gelu":
            h = ops.gelu(h, self.linear1.bias, gate=gate, approximate=self.approximate)
        elif self.activation == "silu":
            h = ops.silu(h, gate=gate)
        else:
            h = F.relu(h) * gate
        return self.dropout(h, rng)

    def extra_repr(self) -> str:
        return f"gated={self.gated}, activation={self.activation!r}, approximate={self.approximate!r}"
