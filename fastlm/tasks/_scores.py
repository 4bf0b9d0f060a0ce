"""Figures of predictions beside labels, in NumPy. Tests compare them with scikit-learn's, seqeval's and SciPy's.

With n_c the predicted, m_c the true and k_c the correct examples of class c:
    precision_c = k_c / n_c,   recall_c = k_c / m_c,   F1_c = 2 k_c / (n_c + m_c),   0 where the divisor is 0
    macro: the mean over the classes that occur, predicted or true, and of several labels over all of them
    weighted: the mean weighted with m_c
    micro: F1 of the sums
    Matthews (Gorodkin 2004): (s k - Σ n_c m_c) / sqrt((s² - Σ n_c²) (s² - Σ m_c²)), s examples, k correct
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np


def confusion(true: np.ndarray, predicted: np.ndarray, classes: int, none: bool = False) -> np.ndarray:
    """(classes, classes) int64: how often class i was predicted as class j.

    none: whether there is a column more, of the examples for which the prediction is `classes`, none of them
    """
    columns = classes + none
    return np.bincount(true * columns + predicted, minlength=classes * columns).reshape(classes, columns)


def f1_scores(correct: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """f1_micro, f1_macro and f1_weighted of the counts k_c, n_c and m_c, (classes,) each."""
    each = class_scores(correct, predicted, true)["f1"]
    occurs = predicted + true > 0
    return {
        "f1_macro": float(each[occurs].mean()) if occurs.any() else 0.0,
        "f1_weighted": float((each * true).sum() / max(1, true.sum())),
        "f1_micro": float(_ratio(2 * correct.sum(), predicted.sum() + true.sum())),
    }


def class_scores(correct: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> dict[str, np.ndarray]:
    """{"precision", "recall", "f1"}, (classes,) each."""
    return {
        "precision": _ratio(correct, predicted),
        "recall": _ratio(correct, true),
        "f1": _ratio(2 * correct, predicted + true),
    }


def _ratio(above, below):
    return np.divide(above, below, out=np.zeros(np.shape(below)), where=np.asarray(below) > 0)


def single_label(matrix: np.ndarray) -> dict[str, float]:
    """accuracy, f1_macro, f1_weighted and matthews of a confusion matrix, which may have a column of no class."""
    correct, predicted, true = np.diagonal(matrix), matrix.sum(0)[: len(matrix)], matrix.sum(1)
    scores = f1_scores(correct, predicted, true)
    del scores["f1_micro"]  # it is the accuracy
    return {"accuracy": float(_ratio(correct.sum(), matrix.sum())), **scores, "matthews": matthews(matrix)}


def matthews(matrix: np.ndarray) -> float:
    matrix = matrix.astype(float)
    predicted, true, total = matrix.sum(0), matrix.sum(1), matrix.sum()
    spread = (total**2 - (predicted**2).sum()) * (total**2 - (true**2).sum())
    return float((total * np.trace(matrix) - predicted[: len(true)] @ true) / math.sqrt(spread)) if spread > 0 else 0.0


def several_labels(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """f1_micro, f1_macro, f1_weighted, and exact, the share of examples with all labels right; (k, classes) bool."""
    counts = (true & predicted).sum(0), predicted.sum(0), true.sum(0)
    macro = float(class_scores(*counts)["f1"].mean())  # over all labels, as scikit-learn's of several labels
    return {**f1_scores(*counts), "f1_macro": macro, "exact": float((true == predicted).all(1).mean())}


def numbers(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """pearson, spearman (of mean ranks), rmse and mae; correlations are 0 where one side is constant."""
    true, predicted = true.astype(float), predicted.astype(float)
    return {
        "pearson": _pearson(true, predicted),
        "spearman": _pearson(_ranks(true), _ranks(predicted)),
        "rmse": float(np.sqrt(np.square(true - predicted).mean())),
        "mae": float(np.abs(true - predicted).mean()),
    }


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    spread = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 0; equal values have the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def entities(tags: Iterable[str]) -> list[tuple[str, int, int]]:
    """(type, first, one past the last) of each entity of a sequence of tags: "B-person", "I-person", "O".

    The definition of conlleval (Tjong Kim Sang and Buchholz 2000) and of seqeval's default mode: an entity begins at
    B-x and S-x, at a tag of another type than the one before, and after E-x and S-x; it goes on over tags of its type.
    """
    found, type_before, prefix_before, start = [], "", "O", 0
    for at, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        kind = "" if prefix == "O" else kind or "_"
        begins = bool(kind) and (prefix in ("B", "S") or kind != type_before or prefix_before in ("E", "S"))
        if type_before and (begins or not kind):
            found.append((type_before, start, at))
        if begins:
            start = at
        type_before, prefix_before = kind, prefix
    return found


def entity_scores(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> tuple[dict, dict]:
    """({"f1", "precision", "recall", "f1_macro", "f1_weighted"}, the same by type) of entities, by their exact spans.

    f1, precision and recall are of all entities together (micro).
    """
    counts = defaultdict(lambda: np.zeros(3, np.int64))  # correct, predicted, true
    for ours, theirs in zip(true, predicted, strict=True):
        there, said = set(entities(ours)), set(entities(theirs))
        for index, spans in enumerate((there & said, said, there)):
            for kind, _, _ in spans:
                counts[kind][index] += 1
    kinds = sorted(counts)
    correct, said, there = np.array([counts[kind] for kind in kinds]).reshape(-1, 3).T
    each, total = class_scores(correct, said, there), f1_scores(correct, said, there)
    by_type = {
        kind: {**{name: float(values[i]) for name, values in each.items()}, "support": int(there[i])}
        for i, kind in enumerate(kinds)
    }
    figures = {
        "f1": total["f1_micro"],
        "precision": float(_ratio(correct.sum(), said.sum())),
        "recall": float(_ratio(correct.sum(), there.sum())),
        "f1_macro": total["f1_macro"],
        "f1_weighted": total["f1_weighted"],
    }
    return figures, by_type
