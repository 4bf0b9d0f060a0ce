"""Tasks whose labels are texts: what T5 and GPT-2 learn to write. Some held-out texts are generated and measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from fastlm.data import Tokenizer
from fastlm.data.labelled import choose_columns, text_of
from fastlm.models._cache import whole_weights
from fastlm.settings import Table, key
from fastlm.tasks._labelled import LabelledData, LabelledTask, LabelledTrain
from fastlm.tasks._tables import split_names
from fastlm.tasks._task import Micro, perplexity
from fastlm.tasks._text_scores import check_measures, figures_of, text_scores

SOURCES = (("source",), ("prompt",), ("question",), ("input",), ("document",), ("article",), ("text",))
TARGETS = (("target",), ("answer",), ("output",), ("summary",), ("completion",), ("response",), ("label",))
_SHOWN = 8  # generated texts that metrics.json has


@dataclass(frozen=True)
class WrittenData(LabelledData):
    max_target: int = key(128, "tokens of a target with its end; longer ones are cut", least=2)


@dataclass(frozen=True)
class WrittenTrain(LabelledTrain):
    generate: int = key(64, "held-out texts that are generated and measured at each evaluation; 0: none", least=0)
    measures: str = key("rouge,bleu,chrf", "of the generated texts, by commas, beside the share of exact ones")


class WrittenTask(LabelledTask):
    """A subclass also defines `prompts`. `Examples.kept` has the targets; their field "text" is a number in it."""

    tables: ClassVar[dict[str, type[Table]]] = {"data": WrittenData, "train": WrittenTrain}
    plain = "line"

    @classmethod
    def tokenizer(cls, directory):
        tokenizer = Tokenizer.load(directory)
        tokenizer.check("causal")
        return tokenizer

    def __init__(self, recipe, dataset, device, validation=None):
        super().__init__(recipe, dataset, device, validation)
        self.names = split_names(recipe.train.measures)
        if self.written:
            check_measures("train.measures", self.names)

    @cached_property
    def written(self) -> int:
        """How many texts are generated at an evaluation."""
        return 0 if self.validation is None else min(self.recipe.train.generate, self.validation.rows)

    @property
    def measures(self):
        return "loss", "perplexity", *(figures_of(self.names) if self.written else ())

    @property
    def output_shape(self):
        return (self.recipe.data.max_target,)

    @classmethod
    def columns(cls, records, recipe, report) -> list[tuple[str, str, str]]:
        """(place, source, target) of the rows; one without both is entered in the report."""
        pair = []
        for setting, asked, defaults in (
            ("data.text", recipe.data.text, SOURCES),
            ("data.label", recipe.data.label, TARGETS),
        ):
            columns = choose_columns(setting, asked, defaults, records)
            if len(columns) > 1:
                raise ValueError(f"{setting}: expected one column, got {', '.join(columns)}")
            pair += columns
        if pair[0] == pair[1]:
            raise ValueError(f'data.label: expected another column than data.text, got "{pair[0]}" for both')
        rows = []
        for record in records:
            texts = text_of(record, pair)
            if isinstance(texts, str):
                report.reject(texts, record.place)
            else:
                rows.append((record.place, *texts))
        report.kept = len(rows)
        return rows

    def evaluation(self) -> Iterator[Micro]:
        left = self.written
        for micro in super().evaluation():
            yield replace(micro, outputs=min(left, micro.outputs))
            left -= min(left, micro.outputs)

    def score(self, model, micro):
        """Also (micro.outputs, max_target): ids that the model writes, then -1. No text where its logits are NaN."""
        loss = model(**micro.inputs)
        if not micro.outputs:
            return loss, None
        tokenizer, longest = self.dataset.tokenizer, self.recipe.data.max_target
        prompts, options = self.prompts(micro)[: micro.outputs], {"eos_token_id": tokenizer.eos_id}
        outputs = torch.full((micro.outputs, longest), -1.0, device=loss.device)
        # Generation leaves autocast: it computes in the dtype of the weights, also where the loss is bfloat16's.
        with whole_weights(model), contextlib.suppress(FloatingPointError):  # logits that are NaN write no text
            found = model.generate(prompts, max_new_tokens=longest, tokenizer=tokenizer, **options)
            for row, text in zip(outputs, found):
                row[: len(text.ids)] = torch.tensor(text.ids, dtype=outputs.dtype)
        return loss, outputs

    def prompts(self, micro: Micro) -> list[list[int]]:
        """What the model reads of each example before it writes."""
        raise NotImplementedError

    def evaluated(self, loss):
        return {"val_loss": loss, "val_perplexity": perplexity(loss)}

    def scores(self, outputs):
        if not len(outputs):
            return {}
        return text_scores(self._texts(outputs), self._wanted(len(outputs)), self.names)

    def _texts(self, outputs: np.ndarray) -> list[str]:
        return [self.dataset.tokenizer.decode(row[row >= 0].astype(np.int64)) for row in outputs]

    def _wanted(self, count: int) -> list[str]:
        return [self.validation.kept[number] for number in self.validation.fields["text"][:count]]

    def details(self, outputs):
        shown = outputs[:_SHOWN]
        pairs = zip(self._texts(shown), self._wanted(len(shown)))
        return {"generated": [{"generated": text, "wanted": right} for text, right in pairs]}
