"""Figures of predictions against scikit-learn's, SciPy's and seqeval's."""

import random
import warnings

import numpy as np
import pytest

from fastlm.tasks import _scores

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_single_labels_are_scikit_learns(classes):
    metrics = pytest.importorskip("sklearn.metrics")
    for size in (1, 5, 200):
        true, said = DRAW.integers(0, classes, size), DRAW.integers(0, max(1, classes - 1), size)
        scores = _scores.single_label(_scores.confusion(true, said, classes))
        assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(true, said))
        for average in ("macro", "weighted"):
            expected = metrics.f1_score(true, said, average=average, zero_division=0)
            assert scores[f"f1_{average}"] == pytest.approx(expected), (size, average)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one label alone
            assert scores["matthews"] == pytest.approx(metrics.matthews_corrcoef(true, said))


def test_examples_without_a_prediction_are_wrong():
    metrics = pytest.importorskip("sklearn.metrics")
    true, said = DRAW.integers(0, 3, 60), DRAW.integers(0, 4, 60)  # 3: none
    scores = _scores.single_label(_scores.confusion(true, said, 3, none=True))
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(true, said))
    assert scores["matthews"] == pytest.approx(metrics.matthews_corrcoef(true, said))
    for average in ("macro", "weighted"):
        expected = metrics.f1_score(true, said, average=average, labels=[0, 1, 2], zero_division=0)
        assert scores[f"f1_{average}"] == pytest.approx(expected), average


def test_several_labels_are_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    true, said = DRAW.random((50, 6)) < 0.3, DRAW.random((50, 6)) < 0.4
    true[:, 5] = said[:, 5] = False  # a label that does not occur
    scores = _scores.several_labels(true, said)
    for average in ("micro", "macro", "weighted"):
        assert scores[f"f1_{average}"] == pytest.approx(metrics.f1_score(true, said, average=average, zero_division=0))
    assert scores["exact"] == pytest.approx(metrics.accuracy_score(true, said))


def test_numbers_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    true = DRAW.integers(0, 6, 80).astype(float)
    said = true + DRAW.normal(size=80).round(1)
    scores = _scores.numbers(true, said)
    assert scores["pearson"] == pytest.approx(stats.pearsonr(true, said)[0])
    assert scores["spearman"] == pytest.approx(stats.spearmanr(true, said)[0])
    assert scores["rmse"] == pytest.approx(np.sqrt(np.mean((true - said) ** 2)))
    assert scores["mae"] == pytest.approx(np.mean(np.abs(true - said)))
    assert _scores.numbers(true, np.ones(80))["pearson"] == 0.0


def test_entities():
    tags = ["B-x", "I-x", "O", "I-y", "I-y", "B-y", "I-x", "B-x", "B-x"]
    assert _scores.entities(tags) == [
        ("x", 0, 2),
        ("y", 3, 5),
        ("y", 5, 6),
        ("x", 6, 7),
        ("x", 7, 8),
        ("x", 8, 9),
    ]
    assert _scores.entities([]) == _scores.entities(["O"]) == []


def test_entity_scores_are_seqevals_default_ones():
    seqeval = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed: entity F1 is not compared")
    draw, names = random.Random(0), ["O", "O", "B-a", "I-a", "B-b", "I-b", "B-c", "I-c"]
    for size in (1, 3, 40):
        lengths = [draw.randint(1, 12) for _ in range(size)]
        true, said = ([[draw.choice(names) for _ in range(n)] for n in lengths] for _ in range(2))
        said = [[t if draw.random() < 0.6 else s for t, s in zip(*pair)] for pair in zip(true, said)]
        figures, by_type = _scores.entity_scores(true, said)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert figures["f1"] == pytest.approx(seqeval.f1_score(true, said, zero_division=0))
            assert figures["precision"] == pytest.approx(seqeval.precision_score(true, said, zero_division=0))
            assert figures["recall"] == pytest.approx(seqeval.recall_score(true, said, zero_division=0))
            for average in ("macro", "weighted"):
                expected = seqeval.f1_score(true, said, average=average, zero_division=0)
                assert figures[f"f1_{average}"] == pytest.approx(expected), average
            report = seqeval.classification_report(true, said, output_dict=True, zero_division=0)
        for kind, each in by_type.items():
            assert each["f1"] == pytest.approx(report[kind]["f1-score"])
            assert each["support"] == report[kind]["support"]
