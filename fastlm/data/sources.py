"""Where text comes from: files and directories of plain text and JSON lines, read as a stream of documents.

| what                                   | documents                                                            |
|----------------------------------------|----------------------------------------------------------------------|
| `.jsonl`, `.ndjson`, `.json`           | the "text" field of each line                                        |
| `.txt`, `.md`, `.rst`, `.text`         | by `documents`: the file, each line, or each block between blank lines |
| a directory                            | every such file in it, recursively, in the order of their paths      |
| a table (`.csv`, `.parquet`, ...), named by itself | refused: which of its columns is text is not known |
| a file of another name, named by itself | as plain text                                                       |

Inside a directory, what is hidden is skipped in silence; links to directories, what `prepare` wrote and the directories
of runs are skipped with an entry in the `Report`. The order is a function of the arguments and the file names alone. A
record that cannot be used (malformed JSON, bytes that are not UTF-8, a binary file) is entered in the `Report` with its
reason and place, and reading goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".text"}
TABLE_SUFFIXES = {".csv", ".tsv", ".tab", ".psv", ".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".ods"}
DOCUMENTS = ("file", "line", "blank")
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"  # the two make a directory the output of `fastlm prepare`
RUN_FILES = "recipe.json", "metrics.jsonl"  # the two make a directory that of a training run

_PLACES = 5  # how many examples the report keeps of a reason


@dataclass
class Report:
    """What became of the records: how many were read and kept, and how many were set aside, why, and where first."""

    read: int = 0
    kept: int = 0
    bytes_read: int = 0
    set_aside: dict[str, dict] = field(default_factory=dict)

    def reject(self, reason: str, place: str) -> None:
        entry = self.set_aside.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < _PLACES:
            entry["first"].append(place)

    def reasons(self) -> str:
        """One line: `3 malformed JSON (first: a.jsonl:7), 1 binary file (first: b.txt)`."""
        lines = (f"{entry['count']} {reason} (first: {entry['first'][0]})" for reason, entry in self.set_aside.items())
        return ", ".join(lines) or "nothing set aside"

    def as_dict(self) -> dict:
        return {"read": self.read, "kept": self.kept, "set_aside": self.set_aside}


@dataclass(frozen=True)
class SourceFile:
    """A file to read; `name` is its place as reports give it, relative to the directory the user named."""

    name: str
    path: Path
    size: int  # bytes


def is_prepared(path) -> bool:
    """Whether `path` is a directory that `prepare` wrote: a manifest.json beside a tokenizer/."""
    return os.path.isfile(os.path.join(path, MANIFEST)) and os.path.isdir(os.path.join(path, TOKENIZER))


def _is_run(path) -> bool:
    return all(os.path.isfile(os.path.join(path, name)) for name in RUN_FILES)


def find_files(paths: Iterable, report: Report, *, outputs: Iterable = ()) -> list[SourceFile]:
    """The files that `paths` (files and directories) name, in the order given; a directory's in the order of its paths.

    outputs   directories that the caller writes: skipped inside a directory, whatever they hold by now

    What is skipped inside a directory has an entry in the report, unless it is hidden. ValueError for a missing path,
    an empty list, or a directory that `prepare`, a run or the caller writes.
    """
    outputs = {os.path.realpath(output) for output in outputs}
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files = []
    for given in paths:
        if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
            raise ValueError(f"data: expected the path of a file or a directory of text, got {given!r}")
        given = Path(given)
        if is_prepared(given):
            raise ValueError(f"data: {given} is prepared already; train on it as it is, or name the text it came from")
        if os.path.realpath(given) in outputs or _is_run(given):
            raise ValueError(
                f"data: expected text, got {given}, which is a run's directory or to be written; name the text files "
                "in it, or a directory of text alone"
            )
        if os.path.isdir(given):
            files += _walk(given, report, outputs)
        elif given.suffix.lower() in TABLE_SUFFIXES and os.path.isfile(given):
            raise ValueError(
                f"data: expected text, got {given}, which is a table; write its text column as JSON lines, "
                '{"text": "..."} on each line of a .jsonl file'
            )
        elif os.path.isfile(given):
            files.append(SourceFile(_label(given.name), given, given.stat().st_size))
        else:
            found = "is neither" if os.path.exists(given) else "does not exist"
            raise ValueError(f"data: expected a file or a directory of text, but {given} {found}")
    if not files:
        kinds = " ".join(sorted(TEXT_SUFFIXES | JSON_SUFFIXES))
        given = ", ".join(map(str, paths)) or "an empty list"
        raise ValueError(f"data: expected text ({kinds}), but found none in {given} ({report.reasons()})")
    return files


def _label(name: str) -> str:
    """A file's name as text: on Linux it is bytes, and may be no UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


def _walk(root: Path, report: Report, outputs: set[str]) -> Iterator[SourceFile]:
    parent = os.path.dirname(os.path.abspath(root))

    def place(path) -> str:
        return _label(os.path.relpath(os.path.abspath(path), parent))

    def unreadable(error: OSError) -> None:
        report.reject(f"unreadable directory ({error.strerror})", place(error.filename))

    found = []
    for folder, folders, names in os.walk(root, onerror=unreadable):
        entered = []
        for name in sorted(name for name in folders if not name.startswith(".")):
            path = os.path.join(folder, name)
            if os.path.islink(path):
                report.reject("link to a directory", place(path))
            elif is_prepared(path):
                report.reject("prepared directory", place(path))
            elif _is_run(path):
                report.reject("directory of a run", place(path))
            elif os.path.realpath(path) in outputs:
                report.reject("directory that is written to", place(path))
            else:
                entered.append(name)
        folders[:] = entered
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    for path in sorted(found, key=lambda path: path.relative_to(root).parts):
        name = place(path)
        if path.suffix.lower() not in TEXT_SUFFIXES | JSON_SUFFIXES:
            report.reject(f"file of another kind ({_label(path.suffix.lower()) or 'no suffix'})", name)
        elif not path.is_file():
            report.reject("not a regular file", name)
        else:
            yield SourceFile(name, path, path.stat().st_size)


def read_documents(files: Iterable[SourceFile], documents: str, report: Report) -> Iterator[tuple[str, str]]:
    """(place, text) of every document; `place` is the file's name, with a line number where it holds several."""
    if documents not in DOCUMENTS:
        raise ValueError(f"documents: expected one of {', '.join(DOCUMENTS)}, got {documents!r}")
    for file in files:
        as_json = file.path.suffix.lower() in JSON_SUFFIXES
        try:
            with open(file.path, "rb") as stream:
                if b"\0" in stream.peek(4096)[:4096]:
                    report.reject("binary file", file.name)
                elif as_json:
                    yield from _json_lines(stream, file.name, report)
                elif documents == "file":
                    yield from _decode([(file.name, stream.read())], report)
                elif documents == "line":
                    yield from _decode(_lines(stream, file.name), report)
                else:
                    yield from _decode(_blocks(stream, file.name), report)
        except OSError as error:
            report.reject(f"unreadable file ({error.strerror})", file.name)


def _lines(stream, name: str) -> Iterator[tuple[str, bytes]]:
    """Lines that are not blank."""
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield f"{name}:{number}", line


def _blocks(stream, name: str) -> Iterator[tuple[str, bytes]]:
    """Runs of lines that are not blank; the place is that of the first."""
    block, start = [], 0
    for number, line in enumerate(stream, 1):
        if line.strip():
            start = start or number
            block.append(line)
        elif block:
            yield f"{name}:{start}", b"".join(block)
            block, start = [], 0
    if block:
        yield f"{name}:{start}", b"".join(block)


def _decode(records: Iterable[tuple[str, bytes]], report: Report) -> Iterator[tuple[str, str]]:
    for place, data in records:
        report.read += 1
        report.bytes_read += len(data)
        try:
            yield place, data.decode("utf-8-sig")
        except UnicodeDecodeError:
            report.reject("not UTF-8", place)


def _json_lines(stream, name: str, report: Report) -> Iterator[tuple[str, str]]:
    for place, line in _decode(_lines(stream, name), report):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            report.reject("malformed JSON", place)
            continue
        text = record.get("text") if isinstance(record, dict) else None
        if isinstance(text, str):
            yield place, text
        else:
            report.reject('no string under "text"', place)
