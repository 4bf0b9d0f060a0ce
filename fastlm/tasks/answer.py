"""Answers to questions as spans of a text, SQuAD's task (Devlin et al. 2018, sections 4.2 and 4.3).

A long text has several windows (fastlm/data/labelled/windows.py), each an example. The loss of a window is the mean of
the cross-entropies of the answer's first and last token, which are [CLS] where the answer is not in it. The prediction
for a question is the span with the greatest start + end score of all its windows. It is "" where [CLS] scores more than
data.null_threshold above that span, in the window in which it scores least: no window has an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from fastlm.data.labelled import Examples, Ragged, Records, hold_out
from fastlm.data.labelled.squad import Question, questions_of, stream_rows
from fastlm.data.labelled.windows import encode_questions
from fastlm.models import BertForQuestionAnswering
from fastlm.ops import IGNORE_INDEX
from fastlm.settings import Table, key
from fastlm.tasks._labelled import LabelledData, LabelledTask, LabelledTrain, rows_of, without
from fastlm.tasks._spans import Prediction, best_spans, combine
from fastlm.tasks._squad import best_threshold, squad_figures, squad_scores
from fastlm.tasks._task import Micro


@dataclass(frozen=True)
class AnswerData(LabelledData):
    stride: int = key(128, "tokens of the text from one window to the next; at most half of a window's", least=1)
    max_question: int = key(64, "tokens of a question; longer ones are cut", least=1)
    max_answer: int = key(30, "tokens of a predicted answer, at most", least=1)
    best: int = key(20, "spans of a window that are looked at", least=1)
    null_threshold: float = key(0.0, "by how much [CLS] scores above the best span where there is no answer")

    def __post_init__(self):
        super().__post_init__()
        for name in ("text", "label"):
            if getattr(self, name):
                raise ValueError(
                    f"data.{name}: expected none for task answer, whose columns are id, question, context and answers, "
                    f"got {getattr(self, name)!r}"
                )


class Asked(NamedTuple):
    """The questions of a file, and the characters (tokens, 2) of the tokens of each one's context."""

    questions: list[Question]
    offsets: list[np.ndarray]


class Answer(LabelledTask):
    """An example is a window; its field "question" is the number of its question in `Examples.kept`, an `Asked`."""

    models = (BertForQuestionAnswering,)
    tables: ClassVar[dict[str, type[Table]]] = {"data": AnswerData, "train": LabelledTrain}
    measures = ("f1", "exact")

    @property
    def output_shape(self):
        return (1 + self.recipe.data.best, 3)

    @classmethod
    def read(cls, paths, recipe, report):
        return Records(list(stream_rows(paths, report)))

    @classmethod
    def encode(cls, records, recipe, tokenizer, report, *, labels=None, known=(), names=None):
        data = recipe.data
        questions = questions_of(records, report)
        for question in questions:
            if question.answers is None:
                report.reject("question without answers", question.place)
        questions = [question for question in questions if question.answers is not None]
        windows = encode_questions(
            questions,
            tokenizer,
            max_length=data.max_length,
            stride=data.stride,
            max_question=data.max_question,
        )
        report.kept = len(questions)
        cut = {"questions": windows.counts.pop("questions cut", 0)}
        columns = ("question", "context", "start", "end")
        fields = {name: np.array(getattr(windows, name), np.int64) for name in columns}
        return Examples(
            Ragged.of(windows.ids),
            {**fields, "token_type_ids": Ragged.of(windows.types, np.int8)},
            places=[questions[number].place for number in windows.question],
            tokenizer=tokenizer,
            settings={name: getattr(data, name) for name in ("max_length", "stride", "max_question")},
            report=report,
            cut=cut,
            told=windows.counts,
            kept=Asked(questions, windows.offsets),
        )

    @classmethod
    def split(cls, examples, share, seed):
        """All questions about a text are on one side."""
        contexts = [question.context for question in examples.kept.questions]
        numbers = {context: number for number, context in enumerate(dict.fromkeys(contexts))}
        _, held = hold_out(len(numbers), share, seed)
        text = np.array([numbers[context] for context in contexts])[examples.fields["question"]]
        rows = np.isin(text, held)
        return np.flatnonzero(~rows), np.flatnonzero(rows)

    @classmethod
    def learnable(cls, examples):
        """Those whose answer is known to be where its answer_start says, or not there at all."""
        rows = np.flatnonzero(examples.fields["start"] != IGNORE_INDEX)
        if not len(rows):
            told = ", ".join(f"{count:,} {what}" for what, count in examples.told.items())
            raise ValueError(f"data: expected answers that begin at their answer_start, found none ({told})")
        return examples if len(rows) == examples.rows else examples.select(rows)

    def head(self):
        return {"labels": ("LABEL_0", "LABEL_1")}  # the start and the end; Transformers names them so

    @property
    def threshold(self) -> float | None:
        """data.null_threshold; None, for there always being an answer, where no training example is without one."""
        data = self.dataset  # `kept` has the questions that are held out too
        unanswerable = any(not data.kept.questions[number].answers for number in np.unique(data.fields["question"]))
        return self.recipe.data.null_threshold if unanswerable else None

    def make_rows(self, data, rows, rng, capacity=None):
        inputs = self.inputs(data, rows, capacity, token_type_ids=(data.fields["token_type_ids"], 0))
        for name, field in (("start_positions", "start"), ("end_positions", "end")):
            wanted = torch.from_numpy(data.fields[field][rows])
            inputs[name] = wanted if capacity is None else F.pad(wanted, (0, capacity.pieces), value=IGNORE_INDEX)
        labelled = int((data.fields["start"][rows] != IGNORE_INDEX).sum())
        inputs |= {"rng": rng, "reduction": "sum"}
        return Micro(inputs, self.counts(data, rows, labelled), outputs=len(rows))

    def score(self, model, micro):
        wanted = ("start_positions", "end_positions")
        start, end = (x.flatten().float() for x in model(**without(micro, *wanted)))
        labels = torch.stack([micro.inputs[name] for name in wanted], 1)
        loss = start.new_zeros(())
        for row, label in zip(rows_of(micro.inputs), labels):
            losses = (F.cross_entropy(x[row][None], at[None], reduction="sum") for x, at in zip((start, end), label))
            loss = loss + sum(losses) / 2
        return loss, window_scores(start, end, micro.inputs, self.recipe.data)

    def scores(self, outputs):
        asked, predictions = self._predictions(outputs)
        right = [[answer.text for answer in question.answers] for question in asked]
        answerable, threshold = np.array([bool(texts) for texts in right]), self.threshold
        exact, overlap = squad_scores([one.text(threshold) for one in predictions], right)
        figures = squad_figures(exact, overlap, answerable)
        if threshold is not None:
            _, always = squad_scores([one.text(None) for one in predictions], right)
            margins = np.array([one.margin for one in predictions])
            figures["best_threshold"], figures["best_f1"] = best_threshold(margins, always, answerable)
        return figures

    def _predictions(self, outputs: np.ndarray) -> tuple[list[Question], list[Prediction]]:
        """The held-out questions, and what is predicted for them."""
        fields, kept = self.validation.fields, self.validation.kept
        found = predictions(outputs, fields["question"], fields["context"], kept)
        return [kept.questions[number] for number in found], list(found.values())

    def details(self, outputs):
        return {"questions": len(self._predictions(outputs)[0]), "null_threshold": self.threshold}


def window_scores(start: torch.Tensor, end: torch.Tensor, inputs: dict, data: AnswerData) -> torch.Tensor:
    """(windows, 1 + data.best, 3) float32: the score of [CLS] twice, then `best_spans` of the context's tokens.

    start, end: the logits for the flattened token ids of `inputs`, where token type 1 is the context and its [SEP]
    """
    types, found = inputs["token_type_ids"].flatten(), []
    for row in rows_of(inputs):
        first = row.start + int((types[row] == 0).sum())
        context = slice(first, row.stop - 1)
        spans = best_spans(start[context], end[context], data.best, data.max_answer)
        null = (start[row.start] + end[row.start]).float()
        found.append(torch.cat([torch.stack([null, *spans.new_zeros(2)])[None], spans]))
    return torch.stack(found)


def predictions(outputs: np.ndarray, question: np.ndarray, context: np.ndarray, asked: Asked) -> dict[int, Prediction]:
    """By the number of each question, from `window_scores` of all of its windows, which follow each other.

    question, context: (windows,) as of `Windows`
    """
    found = {}
    for rows in np.split(np.arange(len(question)), np.flatnonzero(np.diff(question)) + 1):
        of, count = int(question[rows[0]]), outputs.shape[1] - 1
        text, offsets = asked.questions[of].context, asked.offsets[of]
        found[of] = combine(outputs[rows, 1:], outputs[rows, 0, 0].tolist(), context[rows], offsets, text, count)
    return found
