"""A token for each row, from logits: filters, and a draw that depends on seed, row and position alone.

With p the softmax of the logits over the temperature:
    top_k    p = 0 where p is below the k-th largest
    top_p    p = 0 below the last token, from the largest on, before which the others sum to less than top_p
    min_p    p = 0 where p is below min_p times the largest
    u        48 bits of Philox(counter = (position, 0, row low, row high), key(seed, text)), as a fraction of 2^48
    token    the first, by id, at which the sum of p exceeds u times the sum of all

Sources: top_p: Holtzman et al. 2019 (arXiv:1904.09751); min_p: Nguyen et al. 2024 (arXiv:2407.01082).
"""

from __future__ import annotations

import numpy as np
import torch

from fastlm import philox
from fastlm.generate.settings import Settings


def uniforms(seed: int, rows: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
    """(B, count) float64 in [0, 1): what is drawn for the rows at the positions from `first` on.

    rows, first: (B,) int64, the numbers of the rows, and positions from 0 on
    """
    position = first[:, None] + torch.arange(count, device=first.device)
    low, high = rows[:, None] & 0xFFFFFFFF, (rows[:, None] >> 32) & 0xFFFFFFFF
    r0, r1, _, _ = philox.philox4x32(position, 0, low, high, *philox.key(seed, philox.TEXT_DOMAIN))
    return ((r0 << 16) | (r1 >> 16)).double() * 2.0**-48


def penalise(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """scores (B, V) with the repetition penalty for the tokens `seen` (B, V), bool."""
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def chances(scores: torch.Tensor, settings: Settings) -> torch.Tensor:
    """(B, V) float32: what each token's chance is proportional to, 0 for those that the filters leave out.

    scores: logits (B, V), float32, -inf for a token that is out of the question
    """
    best = scores.max(-1, keepdim=True).values
    scores = (scores - best) / settings.temperature
    if 0 < settings.top_k < scores.shape[-1]:
        least = scores.topk(settings.top_k).values[:, -1:]
        scores = torch.where(scores < least, -torch.inf, scores)
    p = scores.softmax(-1)
    if settings.top_p < 1.0:
        falling = _falling(p)
        before = falling.cumsum(-1, dtype=torch.float64) - falling
        kept = (before < settings.top_p).sum(-1, keepdim=True).clamp(min=1)  # none, where p is NaN
        p = torch.where(p < falling.gather(-1, kept - 1), 0.0, p)
    if settings.min_p > 0.0:
        p = torch.where(p < settings.min_p * p.max(-1, keepdim=True).values, 0.0, p)
    return p


def draw(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """(B,) int64: a token of each row by its chances p (B, V), at u (B,) of their sum; V - 1 where p has a NaN."""
    sums = p.cumsum(-1, dtype=torch.float64)
    at = torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)
    return at.squeeze(-1).clamp(max=p.shape[-1] - 1)


def _falling(p: torch.Tensor) -> torch.Tensor:
    """Each row from its largest value to its smallest."""
    if p.device.type == "cpu":  # 1.6 ms for 8 rows of 50,257; torch's sort, with indices, takes 160
        return torch.from_numpy(np.sort(p.numpy(), -1)).flip(-1)
    return p.sort(-1, descending=True).values
