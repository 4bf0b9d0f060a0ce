"""Dropout where no norm or attention comes next, with a ReLU before it or without."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastlm import ops


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout, which can take its bits from (seed, step) like every dropout inside the ops.

    Without `rng` it is torch's own. With it, the mask is a pure function of (rng, site) and of the element's row and
    column, `fastlm.ops.dropout`'s.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, *, site: int = 0) -> None:
        super().__init__(p, inplace)
        self.site = site

    def forward(self, input: torch.Tensor, rng: torch.Tensor | None = None, *, relu: bool = False) -> torch.Tensor:
        """input (..., cols), or with `relu` max(input, 0); rng int64 (2,), (seed, step), on its device, or None."""
        if rng is None or not self.training:
            return super().forward(F.relu(input) if relu else input)
        return ops.dropout(input, self.p, rng=rng, site=self.site, relu=relu)
