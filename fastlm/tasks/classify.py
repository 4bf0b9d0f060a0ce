"""Classification of texts and pairs of texts, into one class each or with several labels (Devlin et al. 2018, 4.1).

One class: cross-entropy over the classes. Several labels: a binary cross-entropy for each label, which is predicted
where its probability is at least a half. Rows have several labels where a label is a list, where there are several
label columns of 0 and 1, or with data.label_separator.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from fastlm.data.labelled import Examples, choose_columns, hold_out, text_of
from fastlm.data.labelled.columns import LABELS, TEXTS
from fastlm.data.labelled.records import is_text
from fastlm.models import BertForSequenceClassification
from fastlm.ops import IGNORE_INDEX
from fastlm.settings import Table, key
from fastlm.tasks._labelled import LabelledData, LabelledTask, LabelledTrain, named_labels, without
from fastlm.tasks._scores import class_scores, confusion, several_labels, single_label
from fastlm.tasks._task import Micro
from fastlm.tasks._texts import encode_texts

_YES, _NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no", "")


@dataclass(frozen=True)
class ClassifyData(LabelledData):
    label_separator: str = key("", "what stands between several labels in their column, as ; or |")


class Classify(LabelledTask):
    models = (BertForSequenceClassification,)
    tables: ClassVar[dict[str, type[Table]]] = {"data": ClassifyData, "train": LabelledTrain}

    @property
    def measures(self):
        if self.several:
            return "f1_micro", "f1_macro", "f1_weighted", "exact"
        return "accuracy", "f1_macro", "f1_weighted", "matthews"

    @property
    def several(self) -> bool:
        """Whether an example has several labels."""
        return self.dataset.fields["labels"].ndim == 2

    @property
    def output_shape(self):
        return (len(self.dataset.labels),)

    @classmethod
    def encode(cls, records, recipe, tokenizer, report, *, labels=None, known=(), names=None, several=None):
        """several: whether the training examples have several labels each; None: these are they, and decide it."""
        data, rows = recipe.data, records
        texts, columns = choose_columns("data.text", data.text, TEXTS, rows), None
        check_texts(texts)
        columns = choose_columns("data.label", data.label, LABELS, rows)
        kept, found, places = [], [], []
        for record in rows:
            text, label = text_of(record, texts), _labels_of(record, columns, data.label_separator)
            if isinstance(text, str) or isinstance(label, str):
                report.reject(text if isinstance(text, str) else label, record.place)
                continue
            if several is False and len(label) != 1:
                report.reject(f'not one label in column "{columns[0]}", as training examples have', record.place)
                continue
            kept.append(text)
            found.append(label)
            places.append(record.place)
        if several is None:
            several = len(columns) > 1 or bool(data.label_separator) or any(isinstance(label, list) for label in found)
        given = columns if len(columns) > 1 else (names or {}).get(columns[0])
        found = [list(label) for label in found]
        labels = named_labels(found, places, columns[0], labels, known, given)
        numbers = {name: number for number, name in enumerate(labels)}
        if several:
            values = np.zeros((len(found), len(labels)), np.float32)
            for row, label in enumerate(found):
                values[row, [numbers[name] for name in label]] = 1.0
        else:
            values = np.array([numbers[name] for (name,) in found], np.int64)
        return text_examples(kept, values, places, recipe, tokenizer, report, labels)

    @classmethod
    def as_trained(cls, examples):
        return {**super().as_trained(examples), "several": examples.fields["labels"].ndim == 2}

    @classmethod
    def split(cls, examples, share, seed):
        """Stratified by the class, or by the rarest of several labels; there are too many sets of them for that."""
        groups = examples.fields["labels"]
        if groups.ndim == 2:
            there, counts = groups > 0, groups.sum(0)
            groups = np.where(there.any(1), np.where(there, counts, np.inf).argmin(1), -1)
        return hold_out(examples.rows, share, seed, groups.tolist())

    def head(self):
        problem = "multi_label_classification" if self.several else "single_label_classification"
        return {"labels": self.dataset.labels, "problem_type": problem}

    def make_rows(self, data, rows, rng, capacity=None):
        labels = torch.from_numpy(data.fields["labels"][rows])
        if self.several:
            capacity = None  # the loss of a sequence of padding would count
        return text_micro(self, data, rows, rng, labels, labels.numel(), capacity)

    def score(self, model, micro):
        logits, labels = model(**without(micro, "labels")).float(), micro.inputs["labels"]
        if self.several:
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum"), logits
        return F.cross_entropy(logits, labels, reduction="sum"), logits

    def scores(self, outputs):
        labels = self.validation.fields["labels"]
        if self.several:
            return several_labels(labels > 0, outputs >= 0)
        return single_label(self._confusion(outputs))

    def _confusion(self, outputs: np.ndarray) -> np.ndarray:
        return confusion(self.validation.fields["labels"], outputs.argmax(1), outputs.shape[1])

    def details(self, outputs):
        names = self.dataset.labels
        if self.several:
            true, said = self.validation.fields["labels"] > 0, outputs >= 0
            return {"classes": by_class(names, (true & said).sum(0), said.sum(0), true.sum(0))}
        matrix = self._confusion(outputs)
        return {
            "classes": by_class(names, np.diagonal(matrix), matrix.sum(0), matrix.sum(1)),
            "confusion": {"labels": list(names), "counts": matrix.tolist()},
        }


def by_class(names, correct: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> dict[str, dict]:
    """{class: {"precision", "recall", "f1", "support"}}"""
    each = class_scores(correct, predicted, true)
    return {
        name: {**{what: float(values[i]) for what, values in each.items()}, "support": int(true[i])}
        for i, name in enumerate(names)
    }


def _labels_of(record, columns: tuple[str, ...], separator: str) -> str | list[str] | tuple[str]:
    """(label,), or a list where there are several; a string is the reason for which there is none."""
    values = [record.values.get(column) for column in columns]
    if len(columns) > 1:
        words = [str(value).strip().lower() for value in values]
        for column, word in zip(columns, words):
            if word not in (*_YES, *_NO):
                return f'neither 0 nor 1 in column "{column}"'
        return [column for column, word in zip(columns, words) if word in _YES]
    (value,), (column,) = values, columns
    if isinstance(value, str) and separator:
        value = [part.strip() for part in value.split(separator) if part.strip()]
    if isinstance(value, list):
        names = [_name(one) for one in value]
        return f'no label in column "{column}"' if None in names else list(Counter(names))
    name = _name(value)
    return f'no label in column "{column}"' if name is None else (name,)


def _name(value) -> str | None:
    """A label as a string; None where it is none."""
    if isinstance(value, (bool, int)):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    return value.strip() or None if isinstance(value, str) and is_text(value) else None


def check_texts(texts: tuple[str, ...]) -> None:
    if len(texts) > 2:
        raise ValueError(f"data.text: expected one column, or two of a pair, got {', '.join(texts)}")


def text_examples(texts, values, places, recipe, tokenizer, report, labels) -> Examples:
    """Examples of texts or pairs, with `values` (rows, ...) as their labels."""
    encoded = encode_texts(texts, tokenizer, recipe.data.max_length)
    fields = {"labels": values, **({} if encoded.types is None else {"token_type_ids": encoded.types})}
    report.kept = len(places)
    return Examples(
        encoded.ids,
        fields,
        places=places,
        tokenizer=tokenizer,
        settings={"max_length": recipe.data.max_length},
        labels=labels,
        report=report,
        cut={"texts": encoded.cut},
        told={"texts without a token": encoded.bare},
    )


def text_micro(task: LabelledTask, data: Examples, rows, rng, labels: torch.Tensor, predicted: int, capacity) -> Micro:
    """A forward of BertForSequenceClassification; `labels` has a row for each of `rows`."""
    types = data.fields.get("token_type_ids")
    inputs = task.inputs(data, rows, capacity, **({} if types is None else {"token_type_ids": (types, 0)}))
    if capacity is not None:
        labels = F.pad(labels, (0, capacity.pieces), value=IGNORE_INDEX)
    inputs |= {"labels": labels, "rng": rng, "reduction": "sum"}
    return Micro(inputs, task.counts(data, rows, predicted), outputs=len(rows))
