"""Dropout that no norm or attention follows, with an optional ReLU before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm import ops


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout, with bits that can come from (seed, step), as in the ops.

    Without `rng` it runs torch's dropout. With `rng` it runs `fastlm.ops.dropout`: the mask is a pure function of
    (rng, site) and of the row and column of an element.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, *, site: int = 0) -> None:
        super().__init__(p, inplace)
        self.site = site

    def forward(self, input: torch.Tensor, rng: torch.Tensor | None = None, *, relu: bool = False) -> torch.Tensor:
        """input (..., cols), or with `relu` max(input, 0); rng int64 (2,), (seed, step), on its device, or None."""
        if rng is None or not self.training:
            return super().forward(F.relu(input) if relu else input)
        return ops.dropout(input, self.p, rng=rng, site=self.site, relu=relu)
