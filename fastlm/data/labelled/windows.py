"""Questions and their contexts as sequences of a model's length.

    [CLS] question [SEP] tokens i ... j of the context [SEP]

A context that is longer than the room for it has several windows, `stride` tokens apart, but at most half of that room:
they overlap. The last one ends with the context. A window is labelled with the first and last token of the answer where
all of it is inside, and otherwise with [CLS] twice, which says that the answer is not here. The tokens of an answer are
those that share a character with it: where it begins or ends inside a token, as "1990" in "1990s", they are more than
the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fastlm.data.labelled.squad import Answer, Question
from fastlm.data.sources import Report
from fastlm.data.tokenizer import Tokenizer


@dataclass
class Windows:
    """Lists with an entry for each window, and `offsets` with one for each question.

    ids, types      (n,) int64: token ids, and 0 for the question, 1 for the context
    question        number of its question
    first           column of the window's first token of the context
    context         which token of the context that is
    start, end      columns of the answer's first and last token; 0 without one; -100 where the answer is not known
    offsets         (tokens of the context, 2) int64: first character of each, and the one after its last
    counts          {"questions cut": ..., "answers inside a token": ..., "answers longer than a window": ...,
                    "answers in no window": shorter ones, "answers not at their answer_start": ...}
    """

    ids: list[np.ndarray] = field(default_factory=list)
    types: list[np.ndarray] = field(default_factory=list)
    question: list[int] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    offsets: list[np.ndarray] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def encode_questions(
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    stride: int,
    max_question: int,
    report: Report | None = None,
) -> Windows:
    """The windows of the questions, in order.

    max_length    tokens of a window, at most
    stride        tokens of the context from one window to the next; at most half of the room for it
    max_question  tokens of a question; more are cut
    report        where a question is entered that leaves no room for its context, which has no windows

    ValueError where a question and three special tokens leave no room for the context, without a report.
    """
    windows = Windows()
    texts = tokenizer.encode_batch([question.text for question in questions])
    contexts = tokenizer.encode_offsets([question.context for question in questions])
    for number, (question, text, (ids, offsets)) in enumerate(zip(questions, texts, contexts, strict=True)):
        windows.offsets.append(offsets)
        whole, text = len(text), text[:max_question]
        room = max_length - 3 - len(text)
        if room < 1 and report is not None:
            report.reject("question that leaves no room for its context", question.place)
            continue
        if room < 1:
            raise ValueError(
                f"data.max_length: expected room for a question, three special tokens and a context, got {max_length} "
                f"for the {len(text)} tokens of the question in {question.place}; set it higher, or data.max_question "
                "lower"
            )
        if len(text) < whole:
            windows.count("questions cut")
        span, found = _span(question, offsets, windows), False
        head = np.array([tokenizer.cls_id, *text, tokenizer.sep_id])
        for at in _starts(len(ids), room, min(stride, max(1, room // 2))):
            part = ids[at : at + room]
            windows.ids.append(np.concatenate([head, part, [tokenizer.sep_id]]))
            windows.types.append(np.repeat([0, 1], [len(head), len(part) + 1]))
            windows.question.append(number)
            windows.first.append(len(head))
            windows.context.append(at)
            start, end = _label(span, at, len(part), len(head))
            windows.start.append(start)
            windows.end.append(end)
            found |= start > 0
        if span is not None and span[0] >= 0 and not found:
            windows.count("answers longer than a window" if span[1] - span[0] >= room else "answers in no window")
    return windows


def _starts(tokens: int, room: int, stride: int) -> range:
    """Where the windows of a context of so many tokens begin; at least one."""
    return range(0, max(1, tokens - room + stride), stride)


def _span(question: Question, offsets: np.ndarray, windows: Windows) -> tuple[int, int] | None:
    """The first and last token of the context in the first answer; (-1, -1) without one; None if that is not known."""
    if question.answers is None:
        return None
    if not question.answers:
        return -1, -1
    answer = next((answer for answer in question.answers if answer.start is not None), None)
    if answer is None:
        windows.count("answers not at their answer_start")
        return None
    span = tokens_of(answer, offsets)
    if span is None:  # the tokenizer leaves nothing of it
        windows.count("answers without a token")
        return None
    if offsets[span[0], 0] != answer.start or offsets[span[1], 1] != answer.start + len(answer.text):
        windows.count("answers inside a token")
    return span


def tokens_of(answer: Answer, offsets: np.ndarray) -> tuple[int, int] | None:
    """The first and last token that share a character with the answer; None where none does."""
    inside = np.flatnonzero((offsets[:, 0] < answer.start + len(answer.text)) & (offsets[:, 1] > answer.start))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def _label(span: tuple[int, int] | None, at: int, tokens: int, first: int) -> tuple[int, int]:
    if span is None:
        return -100, -100
    if at <= span[0] and span[1] < at + tokens and span[0] >= 0:
        return first + span[0] - at, first + span[1] - at
    return 0, 0
