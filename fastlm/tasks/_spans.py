"""From the scores of tokens to answers: the best spans of a window, and of all windows of a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


def best_spans(start: torch.Tensor, end: torch.Tensor, count: int, longest: int) -> torch.Tensor:
    """(count, 3) float32: score, first and last token of the best spans, best first; -inf where there are no more.

    start, end   (n,) scores of a window's context tokens as first and last token; a span's is their sum
    longest      tokens of a span, at most
    """
    start, end = start.float(), end.float()
    if not len(start):  # the tokenizer makes nothing of the context
        return start.new_full((count, 3), -torch.inf)
    longest = min(longest, len(end))
    band = F.pad(end, (0, longest - 1), value=-torch.inf).unfold(0, longest, 1)  # [i, k] is the end at i + k
    best, places = (start[:, None] + band).flatten().topk(min(count, band.numel()))
    first = places // longest
    found = torch.stack([best, first.float(), (first + places % longest).float()], 1)
    return F.pad(found, (0, 0, 0, count - len(found)), value=-torch.inf)


@dataclass(frozen=True)
class Span:
    """Characters `start` to `stop` of the context, and the score."""

    score: float
    start: int
    stop: int
    text: str


@dataclass(frozen=True)
class Prediction:
    """spans: the best of a question, best first, none twice; null: the score of there being no answer."""

    spans: list[Span]
    null: float

    @property
    def margin(self) -> float:
        """By how much "no answer" scores above the best span."""
        return self.null - self.spans[0].score if self.spans else np.inf

    def text(self, threshold: float | None) -> str:
        """The best span's text; "" where the margin is above the threshold (None: never)."""
        if not self.spans or (threshold is not None and self.margin > threshold):
            return ""
        return self.spans[0].text

    def probabilities(self) -> tuple[list[float], float]:
        """(of the spans, of no answer): a softmax over these."""
        scores = np.array([*(span.score for span in self.spans), self.null], np.float64)
        chances = np.exp(scores - scores.max())
        chances /= chances.sum()
        return chances[:-1].tolist(), float(chances[-1])


def combine(
    found: np.ndarray, null: Sequence[float], context: Sequence[int], offsets: np.ndarray, text: str, count: int
) -> Prediction:
    """The prediction for a question.

    found     (windows, count, 3) as of `best_spans`
    null      of each window, the score of [CLS] as first and last token; the least counts: no window has an answer
    context   of each window, which token of the context its first one is
    offsets   (tokens, 2) of the context's characters `text`
    """
    best: dict[tuple[int, int], float] = {}
    for spans, at in zip(found, context):
        for score, first, last in spans[np.isfinite(spans[:, 0])].tolist():
            start, stop = trimmed(text, int(offsets[int(first) + at, 0]), int(offsets[int(last) + at, 1]))
            if start < stop:
                best[start, stop] = max(score, best.get((start, stop), -np.inf))
    ranked = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:count]
    return Prediction([Span(score, *span, text[slice(*span)]) for span, score in ranked], min(null))


def trimmed(text: str, start: int, stop: int) -> tuple[int, int]:
    """The characters from `start` to `stop` without white space at the ends, which a byte-level token begins with."""
    cut = text[start:stop]
    left = len(cut) - len(cut.lstrip())
    return start + left, start + max(left, len(cut.rstrip()))
