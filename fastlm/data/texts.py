"""The cleaned documents of a preparation, and their tokens: as a stream, or from part files.

Both forms have the same methods and give the same documents in the same order:

    texts()             what the tokenizer is trained on: neither duplicates nor held-out documents
    tokenizer(asked)    the `Tokenizer` that was asked for, trained where it has to be
    tokens(counts)      token ids of these documents, and held_out(counts) those of the text that is held out
    report, held_report, cleaned   complete when the tokens were read
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from fastlm.data.cleaning import CleaningReport, clean_documents
from fastlm.data.counts import Counts
from fastlm.data.duplicates import exact_digest
from fastlm.data.estimate import estimate
from fastlm.data.executors import Run
from fastlm.data.selection import TRAINED, choose, is_held_out
from fastlm.data.sources import TOKENIZER, Report, SourceFile, read_documents
from fastlm.data.stages import CleanedText, Reading, clean, make_missing, texts_of
from fastlm.data.token_parts import read_tokens, token_tasks, tokenise
from fastlm.data.tokenizer import Tokenizer, ToTrain
from fastlm.storage import atomic_directory

Progress = Callable[[str, int, int], None]


class Texts:
    """What both forms share.

    share            of the documents to hold out
    report           of the documents that are trained on, held_report of those of the validation text
    cleaned          by rule, of the former
    packed, total    bytes of the source whose rows are made, and of all
    """

    def __init__(
        self,
        files: list[SourceFile],
        held_files: list[SourceFile],
        reading: Reading,
        share: float,
        report: Report,
        held_report: Report,
        progress: Progress,
    ):
        self.files, self.held_files, self.reading, self.share = files, held_files, reading, share
        self.report, self.held_report, self.cleaned = report, held_report, CleaningReport()
        self.progress = progress
        self.packed, self.total = 0, sum(file.size for file in files)

    def __enter__(self) -> Texts:
        return self

    def __exit__(self, *_) -> None:
        pass


class Streamed(Texts):
    """Read and cleaned once for each pass. The held-out documents are in a temporary file meanwhile."""

    def __enter__(self) -> Streamed:
        validation = self._cleaned("held out", self.held_files, Report(), frozenset()) if self.held_files else ()
        self._validation = frozenset(map(exact_digest, validation))
        self._spool = tempfile.TemporaryFile("w+", encoding="utf-8")
        return self

    def __exit__(self, *_) -> None:
        self._spool.close()

    def tokenizer(self, asked: Tokenizer | ToTrain, purpose: str) -> Tokenizer:
        return asked.train(self.texts, purpose) if isinstance(asked, ToTrain) else asked

    def texts(self) -> Iterator[str]:
        texts = self._cleaned("tokenizer", self.files, Report(), self._validation)
        return (text for text in texts if not is_held_out(text, self.share))

    def tokens(self, counts: Counts) -> Iterator[np.ndarray]:
        return counts.encode(self._trained())

    def _trained(self) -> Iterator[str]:
        for text in self._cleaned("rows", self.files, self.report, self._validation):
            self.packed = self.report.bytes_read
            if is_held_out(text, self.share):
                self._spool.write(json.dumps(text) + "\n")
            else:
                yield text

    def held_out(self, counts: Counts) -> Iterator[np.ndarray]:
        if self.held_files:
            return counts.encode(self._cleaned("validation", self.held_files, self.held_report, frozenset()))
        self._spool.seek(0)
        return counts.encode(map(json.loads, self._spool))

    def _cleaned(self, stage: str, files: list[SourceFile], report: Report, validation: frozenset) -> Iterator[str]:
        total = sum(file.size for file in files)
        records = read_documents(files, self.reading.documents, report, fields=self.reading.fields)
        for text in clean_documents(records, report, self.reading.cleaning.min_chars, validation):
            self.progress(stage, report.bytes_read, total)
            yield text
        self.progress(stage, total, total)


class Staged(Texts):
    """Part files in `directory`, which tasks make by `run`; `start` makes those of cleaned text."""

    def start(self, directory: Path, run: Run, note: Callable[[str], None], describe: Callable) -> Staged:
        """Clean the text, and choose among the documents.

        note: called with the line of the estimate, which `describe` makes of an `Estimate`
        """
        self.directory, self.run = directory, run
        self.text = CleanedText(self.files, self.reading, directory, "rows-")
        self.validation = CleanedText(self.held_files, self.reading, directory, "validation-")
        if expected := estimate([*self.text.tasks, *self.validation.tasks]):
            note(describe(expected))
        make_missing(run, clean, [*self.text.tasks, *self.validation.tasks], partial(self.progress, "cleaning"))
        codes, held = choose(
            self.text.prints(),
            self.validation.prints(),
            share=self.share,
            threshold=self.reading.threshold,
            signatures=self.text.signatures(),
            validation_signatures=self.validation.signatures(),
        )
        self.codes, self.held_codes = self.text.chosen(codes), self.validation.chosen(held)
        self.text.enter(self.codes, self.report, self.cleaned)
        self.validation.enter(self.held_codes, self.held_report)
        return self

    def tokenizer(self, asked: Tokenizer | ToTrain, purpose: str) -> Tokenizer:
        """Kept with the parts, where every process finds it."""
        kept = self.directory / TOKENIZER
        if not kept.exists():
            trained = asked.train(self.texts, purpose, self.directory) if isinstance(asked, ToTrain) else asked
            with atomic_directory(kept) as unfinished:
                trained.save(unfinished)
        return Tokenizer.load(kept) if isinstance(asked, ToTrain) else asked

    def texts(self) -> Iterator[str]:
        done = 0
        for task, codes in zip(self.text.tasks, self.codes, strict=True):
            self.progress("tokenizer", done, self.total)
            yield from texts_of(task.path, codes, TRAINED)
            done += task.size
        self.progress("tokenizer", self.total, self.total)

    def tokens(self, counts: Counts) -> Iterator[np.ndarray]:
        self._tasks = token_tasks(self.text, self.codes, self.directory / TOKENIZER)
        self._held = token_tasks(self.validation, self.held_codes, self.directory / TOKENIZER)
        make_missing(self.run, tokenise, [*self._tasks, *self._held], partial(self.progress, "tokens"))
        for task in self._tasks:
            yield from read_tokens(task.path, counts)
            self.packed += task.size
            self.progress("rows", self.packed, self.total)

    def held_out(self, counts: Counts) -> Iterator[np.ndarray]:
        if self.held_files:
            paths: Iterable[Path] = (task.path for task in self._held)
        else:
            paths = (task.held_out for task in self._tasks if task.held_out.exists())
        for path in paths:
            yield from read_tokens(path, counts)
