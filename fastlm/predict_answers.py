"""What a model that was fine-tuned by `fastlm finetune answer` answers, and SQuAD's file of predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from fastlm.data import Tokenizer
from fastlm.data.labelled import Ragged, Record
from fastlm.data.labelled.squad import Question, questions_of
from fastlm.data.labelled.windows import encode_questions
from fastlm.data.sources import Report
from fastlm.models import BertForQuestionAnswering
from fastlm.models._checkpoint import read_json
from fastlm.predict import batches, model_directory
from fastlm.run.directory import read_recipe
from fastlm.tasks._labelled import packed
from fastlm.tasks._spans import Prediction
from fastlm.tasks.answer import AnswerData, Asked, predictions, window_scores

QUESTIONS_AT_ONCE = 512
TOKENS_AT_ONCE = 4096
_SHOWN = 5  # spans of a question that are written


class AnswerPredictor:
    """A model that answers questions: `predictor.predict(records, report)` gives a dictionary for each.

    directory        as OUT/hf, or OUT, of a fine-tuning; or a BertForQuestionAnswering in Transformers' layout
    null_threshold   the answer is "" where [CLS] scores more than this above the best span; None: as metrics.json
                     beside the directory says, and without it there always is an answer
    longest          tokens of a question, at most; cut: how many questions were longer
    bare             0: a context without a token has no answer

    Windows are those of the run that left the directory, else the defaults of the task.
    """

    def __init__(self, directory, *, null_threshold: float | None = None, device="cpu", dtype=torch.float32):
        self.directory, self.device, self.dtype = model_directory(directory), device, dtype
        self.cut = self.bare = 0
        self.model = BertForQuestionAnswering.from_pretrained(self.directory).eval().to(device)
        self.tokenizer = Tokenizer.load(self.directory)
        run, figures = self.directory.absolute().parent, {}
        stored = (read_recipe(run) or {}).get("data", {}) if (run / "recipe.json").is_file() else {}
        known = {name: stored[name] for name in ("stride", "max_question", "max_answer", "best") if name in stored}
        length = self.model.config.max_position_embeddings
        self.data = replace(AnswerData(**known), max_length=min(stored.get("max_length") or length, length))
        self.longest = self.data.max_question
        if (run / "metrics.json").is_file():
            figures = read_json(run / "metrics.json")
        self.threshold = figures.get("null_threshold") if null_threshold is None else null_threshold

    def predict(
        self, records: Iterable[Record], report: Report, *, questions: int = QUESTIONS_AT_ONCE, tokens=TOKENS_AT_ONCE
    ) -> Iterator[dict]:
        """A dictionary for each record that is a question, in order; others are entered in the report.

        {"place", "id", "question", "answer", "start", "stop", "probability", "no_answer", "margin", "spans"}: start and
        stop are characters of the context, None without an answer; `no_answer` is the probability of that, `margin` its
        score less that of the best span.
        """
        records, ids = iter(records), set()
        while rows := list(islice(records, questions)):
            asked = questions_of(rows, report, ids)
            found = self._predictions(asked, report, tokens) if asked else {}
            report.kept += len(found)
            yield from (self._said(asked[number], one) for number, one in found.items())

    def _predictions(self, asked: list[Question], report: Report, tokens: int) -> dict[int, Prediction]:
        """By number of the question; one that leaves no room for its context is entered in the report."""
        data = self.data
        windows = encode_questions(
            asked,
            self.tokenizer,
            max_length=data.max_length,
            stride=data.stride,
            max_question=data.max_question,
            report=report,
        )
        self.cut += windows.counts.get("questions cut", 0)
        if not windows.ids:
            return {}
        columns = {"input_ids": (Ragged.of(windows.ids), 0), "token_type_ids": (Ragged.of(windows.types), 0)}
        outputs = np.empty((len(windows.ids), 1 + data.best, 3), np.float32)
        for chosen in batches(columns["input_ids"][0].lengths, tokens):
            outputs[chosen] = self._forward(packed(columns, chosen))
        return predictions(
            outputs, np.array(windows.question), np.array(windows.context), Asked(asked, windows.offsets)
        )

    @torch.inference_mode()
    def _forward(self, inputs: dict) -> np.ndarray:
        inputs = {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        kind = torch.device(self.device).type
        with torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32):
            start, end = self.model(**inputs)
        return window_scores(start, end, inputs, self.data).cpu().numpy()

    def _said(self, question: Question, found: Prediction) -> dict:
        chances, null = found.probabilities()
        spans = [
            {"text": span.text, "start": span.start, "stop": span.stop, "probability": round(chance, 6)}
            for span, chance in zip(found.spans[:_SHOWN], chances)
        ]
        text = found.text(self.threshold)
        best = spans[0] if text else {"start": None, "stop": None, "probability": round(null, 6)}
        return {
            "place": question.place,
            "id": question.id,
            "question": question.text,
            "answer": text,
            **{name: best[name] for name in ("start", "stop", "probability")},
            "no_answer": round(null, 6),
            "margin": round(found.margin, 6) if found.spans else None,
            "spans": spans,
        }
