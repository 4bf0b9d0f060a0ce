"""Regression: a number for each text or pair of texts, by the square of the error (as STS-B in Devlin et al. 2018)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from fastlm.data.labelled import choose_columns, text_of
from fastlm.data.labelled.columns import LABELS, TEXTS
from fastlm.models import BertForSequenceClassification
from fastlm.tasks._labelled import LabelledTask, without
from fastlm.tasks._scores import numbers
from fastlm.tasks.classify import check_texts, text_examples, text_micro


class Regress(LabelledTask):
    models = (BertForSequenceClassification,)
    measures = "pearson", "spearman", "rmse", "mae"
    output_shape = (1,)

    @classmethod
    def encode(cls, records, recipe, tokenizer, report, *, labels=None, known=(), names=None):
        texts = choose_columns("data.text", recipe.data.text, TEXTS, records)
        check_texts(texts)
        (column, *more) = choose_columns("data.label", recipe.data.label, LABELS, records)
        if more:
            raise ValueError(f"data.label: expected one column of numbers, got {recipe.data.label}")
        kept, values, places = [], [], []
        for record in records:
            text, value = text_of(record, texts), _number(record.values.get(column))
            if isinstance(text, str) or value is None:
                report.reject(text if isinstance(text, str) else f'no number in column "{column}"', record.place)
                continue
            kept.append(text)
            values.append(value)
            places.append(record.place)
        if labels is None and len(set(values)) == 1:
            raise ValueError(
                f'data.label: expected different numbers in column "{column}", found {values[0]:g} in all '
                f"{len(values)} rows; a model has nothing to learn from them"
            )
        return text_examples(kept, np.array(values, np.float32), places, recipe, tokenizer, report, (column,))

    def head(self):
        return {"labels": self.dataset.labels, "problem_type": "regression"}

    def make_rows(self, data, rows, rng, capacity=None):
        labels = torch.from_numpy(data.fields["labels"][rows])
        return text_micro(self, data, rows, rng, labels, len(rows), None)  # padding's loss would count

    def score(self, model, micro):
        values = model(**without(micro, "labels")).float()
        return F.mse_loss(values[:, 0], micro.inputs["labels"], reduction="sum"), values

    def scores(self, outputs):
        return numbers(self.validation.fields["labels"], outputs[:, 0])

    def details(self, outputs):
        true = self.validation.fields["labels"]
        return {"scatter": {"true": true.tolist(), "predicted": outputs[:, 0].astype(float).tolist()}}


def _number(value) -> float | None:
    if isinstance(value, str) and "_" in value:
        return None  # float takes "1_0" for 10
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
