"""Tagging: a label for each word, as entities in IOB2 or parts of speech (Devlin et al. 2018, 5.3).

A word may be several tokens. The first one bears its label and says its tag; the loss leaves the others out. A word
that is cut off, or that the tokenizer makes nothing of, is predicted as "O" and counted. Where no tag is "O", the
prediction for it is wrong.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch.nn.functional as F

from fastlm.data.labelled import Examples, Ragged, choose_columns
from fastlm.data.labelled.columns import TAGS, TOKENS
from fastlm.data.labelled.records import is_text
from fastlm.models import BertForTokenClassification
from fastlm.ops import IGNORE_INDEX
from fastlm.tasks._labelled import BARE, LabelledTask, named_labels, without
from fastlm.tasks._scores import confusion, entity_scores, single_label
from fastlm.tasks._task import Micro
from fastlm.tasks._texts import check_room
from fastlm.tasks.classify import by_class

_AT_ONCE = 4096
OUTSIDE = "O"


class Tag(LabelledTask):
    models = (BertForTokenClassification,)
    plain = "conll"

    @property
    def measures(self):
        if self.entities:
            return "f1", "precision", "recall", "f1_macro", "f1_weighted", "accuracy"
        return "accuracy", "f1_macro", "f1_weighted", "matthews"

    @property
    def entities(self) -> bool:
        """Whether the tags are of entities: "O", and others with B- or I-."""
        labels = self.dataset.labels
        return OUTSIDE in labels and all(name == OUTSIDE or name[:2] in ("B-", "I-", "E-", "S-") for name in labels)

    @property
    def output_shape(self):
        return (len(self.dataset.labels),)

    @classmethod
    def encode(cls, records, recipe, tokenizer, report, *, labels=None, known=(), names=None):
        data = recipe.data
        (words,), (tags,) = (
            choose_columns("data.text", data.text, TOKENS, records),
            choose_columns("data.label", data.label, TAGS, records),
        )
        kept, found, places = [], [], []
        for record in records:
            reason = _wrong(record.values.get(words), record.values.get(tags), words, tags)
            if reason is not None:
                report.reject(reason, record.place)
                continue
            kept.append(record.values[words])
            found.append([str(tag) for tag in record.values[tags]])
            places.append(record.place)
        labels = named_labels(found, places, tags, labels, known, (names or {}).get(tags))
        numbers = {name: number for number, name in enumerate(labels)}
        rows, firsts, cut, none = encode_words(kept, tokenizer, data.max_length)
        gold = Ragged.of([[numbers[tag] for tag in row] for row in found])
        borne = Ragged.of(firsts, np.int64)  # of each word its first token, or -1
        values = np.full(int(sum(map(len, rows))), IGNORE_INDEX, np.int64)
        ids = Ragged.of(rows)
        at = borne.values + np.repeat(ids.offsets[:-1], gold.lengths)
        values[at[borne.values >= 0]] = gold.values[borne.values >= 0]
        report.kept = len(places)
        return Examples(
            ids,
            {"labels": Ragged(values, ids.offsets), "tags": gold, "borne": borne},
            places=places,
            tokenizer=tokenizer,
            settings={"max_length": data.max_length},
            labels=labels,
            report=report,
            cut={"texts": int(sum(row > 0 for row in cut)), "labels": int(sum(cut)), BARE: none},
        )

    def head(self):
        return {"labels": self.dataset.labels}

    def make_rows(self, data, rows, rng, capacity=None):
        labels = data.fields["labels"]
        inputs = self.inputs(data, rows, capacity, labels=(labels, IGNORE_INDEX))
        predicted = int((data.fields["borne"].take(rows) >= 0).sum())
        inputs |= {"rng": rng, "reduction": "sum"}
        return Micro(inputs, self.counts(data, rows, predicted), outputs=predicted)

    def score(self, model, micro):
        labels = micro.inputs["labels"]
        logits = model(**without(micro, "labels"))[labels != IGNORE_INDEX].float()
        return F.cross_entropy(logits, labels[labels != IGNORE_INDEX], reduction="sum"), logits

    def _predicted(self, outputs: np.ndarray) -> np.ndarray:
        """(words,) the number of the tag of every word of the held-out examples; one more than all for no tag."""
        borne, names = self.validation.fields["borne"].values, self.dataset.labels
        tags = np.full(len(borne), names.index(OUTSIDE) if OUTSIDE in names else len(names))
        tags[borne >= 0] = outputs.argmax(1)
        return tags

    def _sentences(self, tags: np.ndarray) -> list[list[str]]:
        names, offsets = np.array(self.dataset.labels, object), self.validation.fields["tags"].offsets
        return [names[tags[start:stop]].tolist() for start, stop in pairwise(offsets)]

    def _entities(self, outputs: np.ndarray) -> tuple[dict, dict]:
        true = self._sentences(self.validation.fields["tags"].values)
        return entity_scores(true, self._sentences(self._predicted(outputs)))

    def _confusion(self, outputs: np.ndarray) -> np.ndarray:
        true = self.validation.fields["tags"].values
        return confusion(true.astype(np.int64), self._predicted(outputs), len(self.dataset.labels), none=True)

    def scores(self, outputs):
        words = single_label(self._confusion(outputs))
        return {**self._entities(outputs)[0], "accuracy": words["accuracy"]} if self.entities else words

    def details(self, outputs):
        whole, names = self._confusion(outputs), self.dataset.labels
        matrix = whole[:, : len(names)]
        if self.entities:
            classes = self._entities(outputs)[1]
        else:
            classes = by_class(names, np.diagonal(matrix), matrix.sum(0), whole.sum(1))
        return {"classes": classes, "confusion": {"labels": list(names), "counts": matrix.tolist()}}


def _wrong(words, tags, words_column: str, tags_column: str) -> str | None:
    """Why a row is none; None for a good one."""
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        return f'no list of words in column "{words_column}"'
    if not is_text("".join(words)):
        return f'not UTF-8 in column "{words_column}"'
    if not isinstance(tags, list) or any(
        tag is None or isinstance(tag, (list, dict)) or not is_text(str(tag)) for tag in tags
    ):
        return f'no list of tags in column "{tags_column}"'
    if len(words) != len(tags):
        return f'another number of tags in column "{tags_column}" than of words in column "{words_column}"'
    return None


def encode_words(sentences, tokenizer, longest: int) -> tuple[list[list[int]], list[list[int]], list[int], int]:
    """Sentences of words as [CLS] tokens [SEP], of at most `longest` tokens.

    (the ids of each, the place of each word's first token or -1, how many words of each were cut off, and how many
    words of all have no token)
    """
    check_room(longest, 1)
    rows, firsts, cut, none = [], [], [], 0
    for start in range(0, len(sentences), _AT_ONCE):
        for ids, first in tokenizer.encode_words(sentences[start : start + _AT_ONCE]):
            bare = sum(place < 0 for place in first)
            ids = ids[: longest - 2]
            places = [place + 1 if 0 <= place < len(ids) else -1 for place in first]
            rows.append([tokenizer.cls_id, *ids, tokenizer.sep_id])
            firsts.append(places)
            cut.append(sum(place < 0 for place in places) - bare)
            none += bare
    return rows, firsts, cut, none
