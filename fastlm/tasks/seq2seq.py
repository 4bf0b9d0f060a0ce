"""From a source text to a target text with T5 (Raffel et al. 2020, section 2.4): translation, summaries, anything.

The encoder reads the source and </s>, the decoder predicts the target and </s>; the loss is on these. Both sides are
packed back to back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from fastlm.data.labelled import Examples, Ragged
from fastlm.models import T5, Counts
from fastlm.ops import IGNORE_INDEX
from fastlm.settings import Table, key
from fastlm.tasks._labelled import Capacity, packed, padded, rows_of
from fastlm.tasks._task import Micro
from fastlm.tasks._written import WrittenData, WrittenTask, WrittenTrain


@dataclass(frozen=True)
class Seq2SeqData(WrittenData):
    prefix: str = key("", "text before each source, as 'summarize: '")


class Seq2Seq(WrittenTask):
    models = (T5,)
    tables: ClassVar[dict[str, type[Table]]] = {"data": Seq2SeqData, "train": WrittenTrain}

    @classmethod
    def encode(cls, records, recipe, tokenizer, report, *, labels=None, known=(), names=None):
        data, rows = recipe.data, cls.columns(records, recipe, report)
        places, sources, targets = (list(column) for column in zip(*rows)) if rows else ([], [], [])
        given, cut_sources = with_end(
            tokenizer.encode_batch([data.prefix + text for text in sources]), tokenizer, data.max_length
        )
        wanted, cut_targets = with_end(tokenizer.encode_batch(targets), tokenizer, data.max_target)
        return Examples(
            Ragged.of(given),
            {"labels": Ragged.of(wanted), "text": np.arange(len(rows))},
            places=places,
            tokenizer=tokenizer,
            settings={"max_length": data.max_length, "max_target": data.max_target, "prefix": data.prefix},
            report=report,
            cut={"sources": cut_sources, "targets": cut_targets},
            kept=targets,
        )

    @cached_property
    def capacity(self) -> tuple[Capacity, Capacity] | None:
        """Of the encoder and the decoder, whose sequences are as many."""
        sides = [self.capacity_of(side.lengths) for side in (self.dataset.ids, self.dataset.fields["labels"])]
        if None in sides:
            return None
        pieces = max(side.pieces for side in sides)
        return tuple(side._replace(pieces=pieces) for side in sides)

    def make_rows(self, data, rows, rng, capacity=None):
        lengths, targets = data.lengths[rows], data.fields["labels"].lengths[rows]
        sides = []
        for number, (name, ragged, fill) in enumerate(
            (("input_ids", data.ids, data.tokenizer.pad_id or 0), ("labels", data.fields["labels"], IGNORE_INDEX))
        ):
            columns = {name: (ragged, fill)}
            if self.layout == "padded":
                sides.append(padded(columns, rows))
            else:
                sides.append(packed(columns, rows, None if capacity is None else capacity[number]))
                del sides[-1]["positions"]  # T5 has none
        encoder, decoder = sides
        decoder = {name if name == "labels" else f"decoder_{name}": value for name, value in decoder.items()}
        counts = Counts(
            tokens=int(lengths.sum()),
            pairs=int((lengths**2).sum()),
            predicted=int(targets.sum()),
            target_tokens=int(targets.sum()),
            target_pairs=int((targets**2).sum()),
            cross_pairs=int((lengths * targets).sum()),
        )
        return Micro({**encoder, **decoder, "rng": rng, "reduction": "sum"}, counts, outputs=len(rows))

    def prompts(self, micro):
        ids = micro.inputs["input_ids"].flatten()
        return [ids[row].tolist() for row in rows_of(micro.inputs)]


def with_end(rows: list[list[int]], tokenizer, longest: int) -> tuple[list[list[int]], int]:
    """The rows with </s>, cut to `longest` tokens with it, and how many were cut."""
    return [[*row[: longest - 1], tokenizer.eos_id] for row in rows], sum(len(row) >= longest for row in rows)
