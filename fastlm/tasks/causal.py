"""Answers to prompts with GPT-2, with the loss on the answer alone.

    <bos> prompt join | answer <eos>            what is behind the bar is predicted, each token from all before it

The prompt with what joins it to the answer, and the answer, are tokenized apart, so that the prompt alone has the same
tokens. Of an example that is too long the beginning of the prompt is cut; then the end of the answer, and its <eos>.
Examples are packed back to back; no target crosses into another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fastlm.data.labelled import Examples, Ragged
from fastlm.models import GPT2
from fastlm.ops import IGNORE_INDEX
from fastlm.settings import Table, key
from fastlm.tasks._labelled import rows_of
from fastlm.tasks._task import Micro
from fastlm.tasks._written import WrittenData, WrittenTask, WrittenTrain
from fastlm.tasks.causal_lm import CausalLM


@dataclass(frozen=True)
class CausalData(WrittenData):
    join: str = key("\n", "text between prompt and answer")


class Causal(WrittenTask):
    models = (GPT2,)
    tables: ClassVar[dict[str, type[Table]]] = {"data": CausalData, "train": WrittenTrain}

    @classmethod
    def token_ids(cls, tokenizer):
        return CausalLM.token_ids(tokenizer)

    @classmethod
    def encode(cls, records, recipe, tokenizer, report, *, labels=None, known=(), names=None):
        data, rows = recipe.data, cls.columns(records, recipe, report)
        places, prompts, answers = (list(column) for column in zip(*rows)) if rows else ([], [], [])
        begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        ids, targets, cut_prompts, cut_answers = [], [], 0, 0
        pairs = zip(tokenizer.encode_batch([text + data.join for text in prompts]), tokenizer.encode_batch(answers))
        for prompt, answer in pairs:
            answer = [*answer, tokenizer.eos_id]
            longest = min(data.max_target, data.max_length)
            cut_answers += len(answer) > longest
            answer = answer[:longest]
            room = data.max_length - len(answer)  # the last token of the answer is no input, <bos> is one
            cut_prompts += len(prompt) > room
            prompt = [begin, *prompt[max(0, len(prompt) - room) :]]
            ids.append([*prompt, *answer[:-1]])
            targets.append([IGNORE_INDEX] * (len(prompt) - 1) + answer)
        return Examples(
            Ragged.of(ids),
            {"targets": Ragged.of(targets), "text": np.arange(len(rows))},
            places=places,
            tokenizer=tokenizer,
            settings={"max_length": data.max_length, "max_target": data.max_target, "join": data.join},
            report=report,
            cut={"prompts": cut_prompts, "answers": cut_answers},
            kept=answers,
        )

    def make_rows(self, data, rows, rng, capacity=None):
        inputs = self.inputs(data, rows, capacity, shift_labels=(data.fields["targets"], IGNORE_INDEX))
        predicted = int((data.fields["targets"].take(rows) != IGNORE_INDEX).sum())
        inputs |= {"rng": rng, "reduction": "sum"}
        return Micro(inputs, self.counts(data, rows, predicted), outputs=len(rows))

    def prompts(self, micro):
        ids, targets = micro.inputs["input_ids"].flatten(), micro.inputs["shift_labels"].flatten()
        found = []
        for row in rows_of(micro.inputs):
            first = int((targets[row] != IGNORE_INDEX).int().argmax())
            found.append(ids[row][: first + 1].tolist())
        return found
