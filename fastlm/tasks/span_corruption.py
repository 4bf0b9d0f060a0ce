"""Span corruption (Raffel et al. 2020, section 3.1.4): the decoder writes the spans that the encoder's text lacks.

`fastlm.data.spans` takes them out, on the host; what it takes is the same on any device. Both sides are packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastlm.data.layouts import Corruption, SpanRows
from fastlm.data.spans import corrupt, pad
from fastlm.models import T5, Counts
from fastlm.settings import Table, key
from fastlm.tasks._tables import DataTable, TrainTable
from fastlm.tasks._task import Micro, Task


@dataclass(frozen=True)
class SpanCorruptionData(DataTable):
    target_tokens: int = key(0, "the decoder's length of a row; 0: as long as one full piece needs it", least=0)
    noise_density: float = key(0.15, "share of the tokens that are taken out", above=0.0, below=1.0)
    mean_span: float = key(3.0, "their mean number in a span", least=1.0)


class SpanCorruption(Task):
    models = (T5,)
    tables: ClassVar[dict[str, type[Table]]] = {"data": SpanCorruptionData, "train": TrainTable}

    def __init__(self, recipe, dataset, device, validation=None):
        super().__init__(recipe, dataset, device, validation)
        self.rows = self.layout(recipe.data)

    @classmethod
    def layout(cls, data):
        return SpanRows(data.row_tokens, data.target_tokens, Corruption(data.noise_density, data.mean_span))

    @classmethod
    def token_ids(cls, tokenizer):
        return {"eos_token_id": tokenizer.eos_id, "decoder_start_token_id": tokenizer.pad_id}

    def make_micro(self, batch, seed, rng, evaluation=False):
        layout, tokenizer = self.rows, self.dataset.tokenizer
        rows = len(batch.input_ids) // layout.width
        pair = corrupt(batch, layout.corruption, tokenizer, seed)
        if self.device.type != "cpu":  # the same shapes every step
            pair = pad(
                pair,
                rows * layout.row_tokens,
                rows * layout.target_tokens,
                rows * (layout.max_pieces + 2),
                (layout.row_tokens, layout.target_tokens),
                tokenizer.pad_id,
            )
        lengths, targets = pair.lengths, pair.target_lengths
        predicted = int(targets.sum())
        return Micro(
            inputs={
                "input_ids": pair.input_ids,
                "cu_seqlens": pair.cu_seqlens,
                "max_seqlen": layout.row_tokens,
                "decoder_cu_seqlens": pair.decoder_cu_seqlens,
                "decoder_max_seqlen": layout.target_tokens,
                "rng": rng,
                "labels": pair.labels,
                "reduction": "sum",
            },
            counts=Counts(
                tokens=int(lengths.sum()),
                pairs=int((lengths**2).sum()),
                predicted=predicted,
                target_tokens=predicted,
                target_pairs=int((targets**2).sum()),
                cross_pairs=int((lengths * targets).sum()),
            ),
        )
