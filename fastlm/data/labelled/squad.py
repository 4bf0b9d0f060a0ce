"""Questions about texts, in SQuAD's format (Rajpurkar et al. 2016, 2018) or as rows.

    {"version": "v2.0", "data": [{"title": ..., "paragraphs": [{"context": ..., "qas": [
        {"id": ..., "question": ..., "answers": [{"text": ..., "answer_start": 17}], "is_impossible": false}]}]}]}

Rows, one a question, are `{"id", "question", "context", "answers": {"text": [...], "answer_start": [...]}}`, as the
dataset `squad` has them, or with a list of answers as above. A question with no answer in the list, or marked
`is_impossible`, is unanswerable; one without `answers` has none that are known, and can only be predicted for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fastlm.data.labelled.records import Record, stream_records
from fastlm.data.sources import Report, SourceFile, find_files
from fastlm.data.sources.streams import Damaged, open_bytes

_SQUAD = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*"(data|version)"\s*:')  # how a SQuAD file begins


class Answer(NamedTuple):
    """A text of the context, and the character where it begins; None where it is not there."""

    text: str
    start: int | None


@dataclass(frozen=True)
class Question:
    """place: for messages. answers: None if they are not known, () of an unanswerable question."""

    place: str
    id: str
    text: str
    context: str
    answers: tuple[Answer, ...] | None


class Bad(ValueError):
    """Why a row is no question."""


def stream_rows(paths: Iterable, report: Report, *, spool=None) -> Iterator[Record]:
    """The rows of SQuAD files, and of others as `stream_records` reads them. ValueError for a file that is damaged.

    spool: a directory for what comes from standard input; "-" is JSON there, since plain text has no questions
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    paths = ["-.jsonl" if os.fspath(path) == "-" else path for path in paths]
    for file in find_files(paths, report, spool=spool):
        rows = _squad_file(file, report) if file.kind == "json" else None
        yield from stream_records([file.path], report, {}, plain="line") if rows is None else rows


def _squad_file(file: SourceFile, report: Report) -> Iterator[Record] | None:
    """The rows of a SQuAD file; None of another one."""
    try:
        with open_bytes(file) as stream:
            if not _SQUAD.match(stream.peek(4096)):
                return None
            return squad_rows(_parsed(stream.read(), file.name), file.name, report)
    except OSError as error:
        raise ValueError(f"data: {file.name} cannot be read: {error.strerror or error}") from error
    except Damaged as error:
        raise ValueError(f"data: {file.name} cannot be read: it is a {error}") from error


def squad_rows(content: dict, name: str, report: Report) -> Iterator[Record]:
    """A row for each question of the content of a SQuAD file `name`.

    The place is its path, as `dev.json: data[3].paragraphs[0].qas[2]`. What is no article, paragraph or question is
    entered in the report.
    """
    for place, article in _members(content, "data", f"{name}: ", report):
        for where, paragraph in _members(article, "paragraphs", f"{place}.", report):
            for at, row in _members(paragraph, "qas", f"{where}.", report):
                report.read += 1
                yield Record(at, {"context": paragraph.get("context"), **row})


def _members(parent: Mapping, key: str, place: str, report: Report) -> Iterator[tuple[str, Mapping]]:
    members = parent.get(key)
    if not isinstance(members, list):
        report.read += 1
        report.reject(f'no list under "{key}"', f"{place}{key}")
        return
    for number, member in enumerate(members):
        at = f"{place}{key}[{number}]"
        if isinstance(member, dict):
            yield at, member
        else:
            report.read += 1
            report.reject("no JSON object", at)


def questions_of(rows: Iterable[Record], report: Report, ids: set[str] | None = None) -> list[Question]:
    """The questions of rows; a row that is none is entered in the report with its reason and place.

    A question without an id has its place as one. ids: of questions before, to which those of these are added
    """
    questions, ids = [], set() if ids is None else ids
    for row in rows:
        try:
            question = _question(row.place, row.values)
            if question.id in ids:
                raise Bad("id of an earlier question")
        except Bad as error:
            report.reject(str(error), row.place)
            continue
        ids.add(question.id)
        questions.append(question)
    return questions


def _question(place: str, row: Mapping[str, object]) -> Question:
    text, context = row.get("question"), row.get("context")
    for name, value in (("question", text), ("context", context)):
        if not isinstance(value, str):
            raise Bad(f'no string under "{name}"')
        if not value.strip():
            raise Bad(f'empty text under "{name}"')
        _check_utf8(name, value)
    identity = row.get("id", place)
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise Bad('neither a string nor an integer under "id"')
    _check_utf8("id", str(identity))
    return Question(place, str(identity), text, context, _answers(row, context))


def _check_utf8(name: str, value: str) -> None:
    """JSON may have half of a surrogate pair, as of an emoji that was cut; no tokenizer and no file takes it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Bad(f'not UTF-8 under "{name}"') from None


def _answers(row: Mapping[str, object], context: str) -> tuple[Answer, ...] | None:
    impossible, given = row.get("is_impossible"), row.get("answers")
    if impossible is not None and not isinstance(impossible, bool):
        raise Bad('neither true nor false under "is_impossible"')
    if impossible:
        return ()
    if given is None:
        return None
    if isinstance(given, dict):  # columns, as the dataset has them
        texts, starts = given.get("text"), given.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise Bad('no two lists of one length under "answers"')
        given = [{"text": text, "answer_start": start} for text, start in zip(texts, starts)]
    if not isinstance(given, list):
        raise Bad('no list under "answers"')
    if not given and impossible is False:
        raise Bad("no answer, and not marked is_impossible")
    found = []
    for answer in given:
        text, start = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, dict) else (None, None)
        if not isinstance(text, str) or not text.strip():
            raise Bad('answer without a "text"')
        if isinstance(start, bool) or not isinstance(start, int):
            raise Bad('answer without an integer "answer_start"')
        there = start >= 0 and context.startswith(text, start)
        found.append(Answer(text, start if there else None))
    return tuple(found)


def _parsed(data: bytes, name: str) -> dict:
    """The content of a SQuAD file. ValueError where it is damaged, with the line."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {name} is not UTF-8: {error}") from error
    except ValueError as error:
        raise ValueError(f"data: {name} is not valid JSON: {error}") from error
