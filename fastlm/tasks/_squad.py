"""SQuAD's figures, exact match and F1, as its evaluation script of version 2.0 defines them (Rajpurkar et al. 2018).

A text is normalised: lower case, without ASCII punctuation, without the words a, an and the, white space as one space.
Exact match is 1 where the normalised texts are equal. F1 is that of the bags of their words; where either has none it
is 1 if both have none, else 0. Of several right answers the best counts; answers that normalise to nothing do not,
unless there are no others. The right answer of an unanswerable question is "".
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, right: str) -> float:
    return float(normalize(predicted) == normalize(right))


def f1(predicted: str, right: str) -> float:
    words, wanted = normalize(predicted).split(), normalize(right).split()
    if not words or not wanted:
        return float(words == wanted)
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted))


def right_answers(texts: Sequence[str]) -> list[str]:
    """What the answers of a question, by their texts, amount to: "" alone for none."""
    return [text for text in texts if normalize(text)] or [""]


def squad_scores(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """(exact match, F1) of each question, float64 (questions,).

    predicted   "" for unanswerable
    answers     texts of the right ones; none for an unanswerable question
    """
    pairs = [(text, right_answers(right)) for text, right in zip(predicted, answers, strict=True)]
    exact = [max(exact_match(text, one) for one in right) for text, right in pairs]
    return np.array(exact), np.array([max(f1(text, one) for one in right) for text, right in pairs])


def squad_figures(exact: np.ndarray, f1: np.ndarray, answerable: np.ndarray) -> dict[str, float]:
    """{"exact": ..., "f1": ...} in shares of 1, and of each kind where there are unanswerable questions too.

    answerable: bool (questions,)
    """
    figures = {"exact": float(exact.mean()), "f1": float(f1.mean())}
    for name, chosen in (("answerable", answerable), ("unanswerable", ~answerable)):
        if not answerable.all() and chosen.any():
            figures |= {f"{name}_exact": float(exact[chosen].mean()), f"{name}_f1": float(f1[chosen].mean())}
    return figures


def best_threshold(margin: np.ndarray, scores: np.ndarray, answerable: np.ndarray) -> tuple[float, float]:
    """(threshold, mean score) of the best threshold, the lowest of equals: "" is predicted where `margin` is above it.

    margin      (questions,) the score of "" less that of the best span; inf where there is no span
    scores      (questions,) of the best span, were it predicted for every question
    answerable  bool (questions,); "" scores 1 where this is False
    """
    order = np.argsort(margin, kind="stable")
    gains = np.where(answerable, scores, -1.0)[order]  # of predicting the span, not ""
    totals = np.concatenate([[0.0], np.cumsum(gains)]) + (~answerable).sum()
    sorted_margin = margin[order]
    last = np.append(sorted_margin[1:] > sorted_margin[:-1], True)  # equal margins are on one side of the threshold
    allowed = np.concatenate([[True], last])
    best = int(np.argmax(np.where(allowed, totals, -np.inf)))
    lowest = sorted_margin[0] - 1.0 if np.isfinite(margin).any() else 0.0
    return float(sorted_margin[best - 1] if best else lowest), float(totals[best] / max(1, len(margin)))
