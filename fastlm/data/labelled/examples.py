"""Encoded examples in memory, and the split into those that are trained on and those that are held out.

Fine-tuning sets are small: a million texts of 30 tokens are 120 MB of token ids.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fastlm.data.order import Endless, perm
from fastlm.data.sources import Report
from fastlm.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: `values` (total,), and `offsets` (rows + 1,) int64, where each row starts."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence], dtype=np.int32) -> Ragged:
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        values = np.fromiter((value for row in rows for value in row), dtype, int(offsets[-1]))
        return cls(values, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int64"""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The values of `rows` (k,), one row behind the other."""
        starts, lengths = self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows]
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return self.values[np.repeat(starts, lengths) + within]


class Examples(Endless):
    """Encoded examples of a task. `ids` has what the model reads; the task knows the other fields.

    ids         Ragged, token ids, special tokens among them
    fields      by name, Ragged or an array with a row for each example: labels, token types and so on
    places      of each example, for messages
    labels      names of the classes, in the order of their numbers; () where the task has none
    report      what became of the rows that were read
    told        {"answers inside a token": how many, ...}: what else there is to say of the rows
    kept        what the task keeps of them for its figures; a field has the numbers in it. The same in a selection
    cut         {"texts": how many were cut to the longest length, "labels": how many labels were cut off, ...}
    rows, row_tokens, tokenizer, manifest, accepted     as of `Dataset`; row_tokens is the length of the longest example
    """

    set_aside: Mapping[str, str] = {}

    def __init__(
        self,
        ids: Ragged,
        fields: dict[str, Ragged | np.ndarray],
        *,
        places: Sequence[str],
        tokenizer: Tokenizer,
        settings: dict,
        labels: tuple[str, ...] = (),
        report: Report | None = None,
        cut: dict[str, int] | None = None,
        told: dict[str, int] | None = None,
        kept: object = None,
    ):
        self.ids, self.fields, self.places, self.tokenizer, self.labels = ids, fields, places, tokenizer, labels
        self.report, self.cut, self._settings = report or Report(), cut or {}, settings
        self.told, self.kept = told or {}, kept
        self.rows = self.documents = len(ids)
        self.row_tokens = int(ids.lengths.max()) if self.rows else 0
        self.accepted: dict[str, str] = {}
        self.manifest = {
            "settings": {**settings, "labels": list(labels)},
            "tokenizer": {"checksum": tokenizer.hash},
            "documents": self.documents,
            "checksum": self._checksum(),
        }

    def select(self, rows: np.ndarray) -> Examples:
        """The examples numbered `rows` (k,), in that order; the report and what was cut are of all."""

        def chosen(part):
            if not isinstance(part, Ragged):
                return part[rows]
            return Ragged(part.take(rows), np.concatenate([[0], np.cumsum(part.lengths[rows])]))

        return Examples(
            chosen(self.ids),
            {name: chosen(part) for name, part in self.fields.items()},
            places=[self.places[row] for row in rows.tolist()],
            tokenizer=self.tokenizer,
            settings=self._settings,
            labels=self.labels,
            report=self.report,
            cut=self.cut,
            told=self.told,
            kept=self.kept,
        )

    def texts(self) -> Iterator[bytes]:
        """The token ids of each example, as a key."""
        values, offsets = self.ids.values, self.ids.offsets.tolist()
        return (values[start:stop].tobytes() for start, stop in pairwise(offsets))

    def _checksum(self) -> str:
        """SHA-256 of the ids and of every field."""
        digest = hashlib.sha256()
        for name, part in [("ids", self.ids), *sorted(self.fields.items())]:
            arrays = (part.offsets, part.values) if isinstance(part, Ragged) else (part,)
            for array in arrays:
                digest.update(f"{name} {array.dtype} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int64: tokens of each example"""
        return self.ids.lengths


def hold_out(
    count: int, share: float, seed: int, groups: Sequence[Hashable] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the examples to train on, of those held out), ascending, int64: a function of the arguments.

    count    how many examples there are
    groups   the class of each: the same share of every class is held out. A class of fewer than 1/share examples is
             too small for that: the share is of all such classes together, and one example of each is trained on.
             None: all examples are of one class
    """
    members = defaultdict(list)
    for number in range(count):
        members[None if groups is None else groups[number]].append(number)
    parts, pooled, small = [], [], 0
    for name in sorted(members, key=repr):
        numbers = np.array(members[name])
        if len(members) > 1 and len(numbers) * share < 1:
            pooled.append(numbers[1:])
            small += len(numbers)
        else:
            parts.append((len(numbers), numbers))
    if pooled:
        parts.append((small, np.concatenate(pooled)))
    held, due = np.zeros(count, bool), 0.0
    for size, numbers in parts:
        due += share * size
        taken = max(0, min(math.floor(due + 0.5), len(numbers), size - 1))
        due = min(0.5, max(-0.5, due - taken))  # what a class cannot give is not due of the next one
        if taken:
            held[numbers[perm(np.arange(taken), len(numbers), 0, seed)]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
