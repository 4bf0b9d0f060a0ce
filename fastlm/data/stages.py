"""The stages of a large preparation, each in parts that any number of processes make.

    tasks -> clean(task) -> part files -> choose -> tokenise(task) -> token files -> rows, in the order of the documents

A task of cleaning is some consecutive `Part`s of the source files; one of tokenising is the text of such a part. Its
result is a function of them and the settings alone. A file is renamed into place when it is whole, so that a
preparation that was killed continues with the missing ones. Which documents are duplicates depends on the others: it is
decided between the two stages, from hashes (`fastlm.data.selection`), for any number of processes alike.

The files of a part of cleaned text:

    .jsonl             the documents that passed, a JSON string a line; written last
    .events            the same documents and the others in the order of the source, a JSON list a line: ["text", place,
                       characters], ["reject", place, reason], and last ["end", counts, cleaning report or null]
    .prints.npy        (documents, 3) uint64, `fastlm.data.selection.fingerprint` of each
    .0000.signatures   and so on, where near duplicates are wanted: `fastlm.data.duplicates.Signatures`
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice, takewhile
from pathlib import Path

import numpy as np

from fastlm.data.cleaning import Cleaner, Cleaning, CleaningReport, tidied
from fastlm.data.duplicates import signature
from fastlm.data.executors import Run
from fastlm.data.kept import KEPT
from fastlm.data.selection import REASONS, fingerprint
from fastlm.data.sources import FIELDS, Part, Report, SourceFile, read_documents, split
from fastlm.storage import atomic_file

VERSION = 1  # of the part files and of what lies in them; those of another version are not continued
PART_BYTES = (
    16 << 20
)  # of the source in a task: about 10 s of cleaning, and the text that is cleaned again after a kill
SMALL = 64 << 20  # bytes of a corpus that is cleaned while it is packed, without part files
_UTF8 = {"encoding": "utf-8", "errors": "surrogatepass"}
_SIGNED_CHARS = 4 << 20  # of text whose signatures are in one file, and in memory until then: 8 bytes a word


@dataclass(frozen=True)
class Reading:
    """How documents are read and cleaned; `threshold` is the similarity of near duplicates, 0 where all stay."""

    documents: str
    fields: tuple[str, ...]
    cleaning: Cleaning
    threshold: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether nothing but length is asked for, which needs no `Cleaner`."""
        return self.cleaning == Cleaning(min_chars=self.cleaning.min_chars)

    def settings(self) -> dict[str, object]:
        """What is not the default, by the recipe's names: entries of a manifest."""
        default = Cleaning(min_chars=self.cleaning.min_chars).as_dict()
        rules = {name: value for name, value in self.cleaning.as_dict().items() if value != default[name]}
        fields = {} if self.fields == FIELDS else {"field": list(self.fields)}
        near = {"near_duplicates": self.threshold} if self.threshold else {}
        return {**fields, **rules, **near}


@dataclass(frozen=True)
class Task:
    """Parts of the source that one process reads, and the file `path` that it writes.

    size    bytes of the source; packed: of these, in compressed files and Parquet files
    """

    index: int
    parts: tuple[Part, ...]
    size: int
    packed: int
    path: Path
    reading: Reading

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def events(self) -> Path:
        return self.path.with_suffix(".events")

    @property
    def prints(self) -> Path:
        return self.path.with_suffix(".prints.npy")

    def signatures(self, number: int) -> Path:
        return self.path.with_suffix(f".{number:04d}.signatures")


class _Events(Report):
    """A report that also writes its rejections into a file of events, between the texts."""

    def __init__(self, write: Callable[[list], object]):
        super().__init__()
        self._write = write

    def reject(self, reason: str, place: str) -> None:
        self._write(["reject", place, reason])


@contextmanager
def part_file(path: Path, mode: str = "w"):
    """The file `path`, open for writing; it is there when the block has ended."""
    how = {} if "b" in mode else _UTF8
    with atomic_file(path, what="a part", kept=KEPT) as unfinished, open(unfinished, mode, **how) as file:
        yield file


def clean(task: Task) -> Task:
    """Write the files of a part of cleaned text."""
    with part_file(task.path) as texts, part_file(task.events) as events:

        def write(event: list) -> None:
            events.write(json.dumps(event) + "\n")

        report = _Events(write)
        records = read_documents(task.parts, task.reading.documents, report, fields=task.reading.fields)
        cleaner = None if task.reading.plain else Cleaner(task.reading.cleaning)
        if cleaner is None:
            found = tidied(records, report, task.reading.cleaning.min_chars)
        else:
            found = _passed(records, report, cleaner, task.index)
        prints, unsigned, chars, signed = bytearray(), [], 0, 0

        def sign() -> None:
            signature(unsigned).save(task.signatures(signed))
            unsigned.clear()

        for place, text in found:
            write(["text", place, len(text)])
            texts.write(text_line(text))
            prints += fingerprint(text)
            if task.reading.threshold:
                unsigned.append(text)
                chars += len(text)
                if chars >= _SIGNED_CHARS:
                    sign()
                    chars, signed = 0, signed + 1
        if unsigned:
            sign()
        counts = {"read": report.read, "bytes_read": report.bytes_read}
        write(["end", counts, None if cleaner is None else cleaner.report.as_dict()])
        with part_file(task.prints, "wb") as file:
            np.save(file, np.frombuffer(prints, np.uint64).reshape(-1, 3))
    return task


def _passed(
    records: Iterable[tuple[str, str]], report: Report, cleaner: Cleaner, index: int
) -> Iterator[tuple[str, str]]:
    for number, (place, text) in enumerate(records):
        text, rule = cleaner(text, ordinal=(index, number), place=place)
        if rule is None:
            yield place, text
        else:
            report.reject(rule, place)


class CleanedText:
    """The cleaned text of `files`, as part files in `directory` whose names begin with `prefix`."""

    def __init__(self, files: Iterable[SourceFile], reading: Reading, directory: Path, prefix: str):
        self.reading = reading
        self.tasks = [
            Task(index, parts, size, packed, directory / f"{prefix}{index:06d}.jsonl", reading)
            for index, (parts, size, packed) in enumerate(_grouped(files, reading.documents))
        ]

    def prints(self) -> np.ndarray:
        """(documents, 3) uint64, as `fastlm.data.selection.choose` takes them."""
        return np.concatenate([np.empty((0, 3), np.uint64), *(np.load(task.prints) for task in self.tasks)])

    def signatures(self) -> list[Path]:
        """The files of signatures in the documents' order."""
        return [path for task in self.tasks for path in takewhile(Path.exists, map(task.signatures, count()))]

    def chosen(self, codes: np.ndarray) -> list[np.ndarray]:
        """`codes` (documents,) of `choose`, cut into those of each part."""
        parts, first = [], 0
        for task in self.tasks:
            last = first + len(np.load(task.prints))
            parts.append(codes[first:last])
            first = last
        return parts

    def enter(self, codes: list[np.ndarray], report: Report, cleaned: CleaningReport | None = None) -> None:
        """Enter what became of each document in `report`, and in `cleaned` by rule."""
        for task, of_part in zip(self.tasks, codes, strict=True):
            documents = -1
            with open(task.events, encoding="utf-8") as events:
                for number, (kind, *entries) in enumerate(map(json.loads, events)):
                    if kind == "reject":
                        place, reason = entries
                        report.reject(reason, place)
                    elif kind == "text":
                        place, characters = entries
                        documents += 1
                        reason = REASONS.get(int(of_part[documents]))
                        if reason is None:
                            report.kept += 1
                            continue
                        report.reject(reason, place)
                        if cleaned is not None:
                            ordinal, text = (task.index, number), partial(_nth_text, task.path, documents)
                            cleaned.take_kept(reason, characters, ordinal=ordinal, place=place, text=text)
                    else:
                        counts, rules = entries
                        report.merge(Report(**counts))
                        if cleaned is not None and rules is not None:
                            cleaned.merge(CleaningReport.from_dict(rules))


def text_line(text: str) -> str:
    """A line of a part of cleaned text. Escapes alone would be three times as long where letters are not Latin."""
    return json.dumps(text, ensure_ascii=False) + "\n"


def _nth_text(path: Path, number: int) -> str:
    with open(path, **_UTF8) as file:
        return json.loads(next(islice(file, number, None)))


def make_missing(run: Run, function: Callable, tasks: list, progress: Callable[[int, int], None]) -> None:
    """Run the tasks whose file is missing. progress: called with the sum of the sizes of those done, and of all."""
    total = sum(task.size for task in tasks)
    missing = [task for task in tasks if not task.path.exists()]
    done = total - sum(task.size for task in missing)
    for task in run(function, missing) if missing else ():
        done += task.size
        progress(done, total)


def texts_of(path: Path, codes: np.ndarray, code: int) -> Iterator[str]:
    """The documents of a part of cleaned text, in `path`, whose entry in `codes` is `code`."""
    with open(path, **_UTF8) as file:
        for found, line in zip(codes.tolist(), file, strict=True):
            if found == code:
                yield json.loads(line)


def _grouped(files: Iterable[SourceFile], documents: str) -> Iterator[tuple[tuple[Part, ...], int, int]]:
    """Parts one after another until they have PART_BYTES, with `Task.size` and `Task.packed`; a large file is split."""
    group, size, packed = [], 0, 0
    for file in files:
        file = replace(file, path=file.path.absolute())  # another machine's process has another directory
        parts = split(file, PART_BYTES, documents)
        for part in parts:
            group.append(part)
            size += file.size // len(parts)
            packed += file.size // len(parts) if file.compression or file.kind == "parquet" else 0
            if size >= PART_BYTES:
                yield tuple(group), size, packed
                group, size, packed = [], 0, 0
    if group:
        yield tuple(group), size, packed
