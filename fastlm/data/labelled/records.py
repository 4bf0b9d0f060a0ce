"""Rows of labelled files, each a dictionary of its columns.

- `.csv`, `.tsv`: the first line names the columns; without (`header=False`) they are "1", "2", ...; in a .tsv file a
  line is a row, and quotes are characters of the text, as in GLUE's files
- `.jsonl`, `.ndjson`, `.json`: an object on each line, or one array of objects
- `.parquet`, `.arrow`, a directory by `datasets`: its rows; class numbers become the names that the file gives
- plain text, `plain="class"`: a file a class, {"text": a line, "label": the file's name}; or a directory a class,
  {"text": a file, "label": the directory's name}
- plain text, `plain="conll"`: {"tokens": [...], "tags": [...]}: on a line a token, a tab or spaces, and its tag; a
  blank line ends a row; lines before it that begin with "# " are comments, but for a token "#" in columns like the next
- plain text, `plain="line"`: {"text": a line}, or another name by `column`

Any of them may be compressed (`.gz`, `.zst`). The place of a row is its file and the number of its last line, or of its
row in a table. A row that cannot be read is entered in the report with its place, and reading goes on.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastlm.data._extras import require
from fastlm.data.sources import Report, SourceFile, find_files
from fastlm.data.sources.files import COMPRESSIONS, KIND_OF, SAVED_SPLITS
from fastlm.data.sources.streams import Damaged, open_bytes
from fastlm.data.sources.tables import open_parquet

PLAIN = ("class", "conll", "line")  # what a plain-text file holds
_NOT_UTF8 = "line that is not UTF-8"
_NO_TAG = "sentence with a line that is not a token, a tab and a tag"
_LONGEST = 64 << 20  # bytes of a field of a CSV file, and of a line
_BATCH_ROWS = 1024
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[")  # how a JSON file begins that is one array


@dataclass(frozen=True)
class Record:
    """A row: its place for messages, and its columns by name."""

    place: str
    values: dict[str, object]


@dataclass
class Records:
    """Rows, and the names of classes that a file gives for a column, in the order of their numbers."""

    rows: list[Record] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)


def read_records(paths: Iterable, report: Report, *, plain: str, header: bool = True, spool=None) -> Records:
    """The rows of all files that `paths` name (`fastlm.data.sources.find_files`), in order.

    plain   what plain-text files hold: "class", "conll" or "line"
    header  whether the first line of a CSV file names its columns
    spool   a directory for what comes from standard input
    ValueError for a missing path, or a file that is damaged as a whole.
    """
    records = Records()
    records.rows += stream_records(paths, report, records.names, plain=plain, header=header, spool=spool)
    return records


def stream_records(
    paths: Iterable,
    report: Report,
    names: dict[str, list[str]],
    *,
    plain: str,
    header: bool = True,
    spool=None,
    column: str = "text",
) -> Iterator[Record]:
    """`read_records`, one after another; `names` gets the names of classes.

    column: of a line of plain text, with plain="line"
    """
    if plain not in PLAIN:
        raise ValueError(f"plain: expected one of {', '.join(PLAIN)}, got {plain!r}")
    for given in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
        root = Path(given) if os.path.isdir(given) else None
        for file in find_files([given], report, spool=spool):
            try:
                with open_bytes(file) as stream:
                    if plain == "line" and file.kind == "text":
                        yield from _lines_of(stream, file, report, {}, column)
                    else:
                        yield from _read(file, stream, root, plain, header, report, names)
            except OSError as error:
                raise ValueError(f"data: {file.name} cannot be read: {error.strerror or error}") from error
            except Damaged as error:
                raise ValueError(f"data: {file.name} cannot be read: it is a {error}") from error


def saved_splits(path) -> dict[str, Path]:
    """{"train": ..., "validation": ...}: the directories of what `datasets.DatasetDict.save_to_disk` wrote; else {}."""
    path = Path(path)
    try:
        splits = json.loads((path / SAVED_SPLITS).read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: path / name for name in splits if (path / name).is_dir()}


def _read(file: SourceFile, stream, root: Path | None, plain: str, header: bool, report: Report, names: dict):
    if file.kind == "csv":
        return _csv(stream, file, header, report)
    if file.kind == "json":
        return _json(stream, file, report)
    if file.kind in ("parquet", "arrow"):
        return _table(stream, file, report, names)
    if plain == "conll":
        return _conll(stream, file, report)
    directory = root is not None and file.path.parent != root
    if not directory:
        return _lines_of(stream, file, report, {"label": _class_of(file)})
    return _whole(stream, file, report, {"label": file.path.parent.name})


def _class_of(file: SourceFile) -> str:
    """The file's name without the suffixes of its kind and compression: "1.5" of "1.5.txt.gz"."""
    name = file.name.split("/")[-1]
    for suffixes in (COMPRESSIONS, KIND_OF):
        if Path(name).suffix.lower() in suffixes:
            name = Path(name).stem
    return name


def _csv(stream, file: SourceFile, header: bool, report: Report) -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST))  # of the process; the default is 128 KiB
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    quoting = csv.QUOTE_NONE if file.delimiter == "\t" else csv.QUOTE_MINIMAL
    rows, columns = csv.reader(text, delimiter=file.delimiter, strict=True, quoting=quoting), None
    while True:
        first = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            report.read += 1
            if "unexpected end of data" in str(error):
                report.reject("malformed CSV (from a quote that is not closed to the end)", f"{file.name}:{first}")
            else:
                report.reject(f"malformed CSV ({error})", f"{file.name}:{rows.line_num}")
            continue
        if columns is None:
            columns = row if header else [str(number) for number in range(1, len(row) + 1)]
            if len(set(columns)) != len(columns):
                raise ValueError(
                    f"data: {file.name}:{rows.line_num}: expected a different name for every column, got "
                    f"{', '.join(columns[:8])}; name them in the first line, or set data.header=false"
                )
            if header:
                continue
        if not row:
            continue
        report.read += 1
        place = f"{file.name}:{rows.line_num}"
        if len(row) != len(columns):
            report.reject(f"row of other than {len(columns)} columns", place)
        elif not is_text("".join(row)):
            column = next(name for name, value in zip(columns, row) if not is_text(value))
            report.reject(f'not UTF-8 in column "{column}"', place)
        else:
            yield Record(place, dict(zip(columns, row)))


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: half of a surrogate pair, as of an emoji that was cut in JSON, is no character."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json(stream, file: SourceFile, report: Report) -> Iterator[Record]:
    if _ARRAY.match(stream.peek(4096)):
        try:
            rows = json.loads(stream.read())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"data: {file.name} is not valid JSON: {error}") from error
        lines = ((f"{file.name}:{number}", row) for number, row in enumerate(rows, 1))
    else:
        lines = _json_lines(stream, file, report)
    for place, row in lines:
        report.read += 1
        if isinstance(row, dict):
            yield Record(place, row)
        else:
            report.reject("JSON that is no object", place)


def _json_lines(stream, file: SourceFile, report: Report) -> Iterator[tuple[str, object]]:
    for place, line in _decoded(stream, file, report):
        if not line.strip():
            continue
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError):
            report.read += 1
            report.reject("malformed JSON", place)


def _decoded(stream, file: SourceFile, report: Report) -> Iterator[tuple[str, str]]:
    """(place, line) of each line that is UTF-8, without its end."""
    for place, line in _decoded_lines(stream, file):
        if line is None:
            report.read += 1
            report.reject(_NOT_UTF8, place)
        else:
            yield place, line


def _decoded_lines(stream, file: SourceFile) -> Iterator[tuple[str, str | None]]:
    """(place, line) of every line, without its end; None where it is not UTF-8."""
    for number, line in enumerate(iter(stream.readline, b""), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            text = None
        yield f"{file.name}:{number}", text


def _lines_of(stream, file: SourceFile, report: Report, more: dict, column: str = "text") -> Iterator[Record]:
    for place, line in _decoded(stream, file, report):
        if line.strip():
            report.read += 1
            yield Record(place, {column: line.strip(), **more})


def _whole(stream, file: SourceFile, report: Report, more: dict) -> Iterator[Record]:
    report.read += 1
    try:
        yield Record(file.name, {"text": stream.read().decode("utf-8-sig"), **more})
    except UnicodeDecodeError:
        report.reject("file that is not UTF-8", file.name)


def _conll(stream, file: SourceFile, report: Report) -> Iterator[Record]:
    """Of each line the first column is the token, the last one its tag; -DOCSTART- lines and "# " comments are none."""
    lines: list[tuple[str, str | None]] = []
    for place, line in _decoded_lines(stream, file):
        if line is None or line.strip():
            lines.append((place, line))
            continue
        yield from _sentence(lines, report)
        lines = []
    yield from _sentence(lines, report)


def _sentence(lines: list[tuple[str, str | None]], report: Report) -> Iterator[Record]:
    """The row of the lines between two blank ones, if they are one."""
    comments = 0
    while comments < len(lines) and (lines[comments][1] or "").startswith(("# ", "-DOCSTART-")):
        comments += 1
    rows = [_columns(line) for _, line in lines]
    if 0 < comments < len(lines) and _is_token(rows[comments - 1], lines[comments][1]):
        comments -= 1
    if comments == len(lines):
        return
    report.read += 1
    for (place, line), row in zip(lines[comments:], rows[comments:]):
        if line is None or len(row) < 2 or not row[0].strip():
            report.reject(_NOT_UTF8 if line is None else _NO_TAG, place)
            return
    rows = rows[comments:]
    yield Record(lines[-1][0], {"tokens": [row[0] for row in rows], "tags": [row[-1] for row in rows]})


def _columns(line: str | None) -> list[str]:
    if line is None:
        return []
    return line.rstrip().split("\t") if "\t" in line else line.split()


def _is_token(columns: list[str], following: str | None) -> bool:
    """Whether a line that begins with "# " is the token "#": in spaces, with as many columns as the line after it."""
    if columns[0] != "#" or columns[2:3] == ["="] or following is None or "\t" in following:
        return False
    return len(columns) == len(following.split())


def _table(stream, file: SourceFile, report: Report, names: dict[str, list[str]]) -> Iterator[Record]:
    if file.kind == "parquet":
        parquet = open_parquet(stream)
        schema, batches = parquet.schema_arrow, parquet.iter_batches(_BATCH_ROWS, use_threads=False)
    else:
        ipc, as_file = require("pyarrow.ipc"), stream.read(6) == b"ARROW1"
        stream.seek(0)
        try:
            reader = ipc.open_file(stream) if as_file else ipc.open_stream(stream)
        except (require("pyarrow").ArrowException, OSError):
            raise Damaged("malformed Arrow file") from None
        schema = reader.schema
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if as_file else reader
    classes = _class_names(schema)
    names.update({column: found for column, found in classes.items() if names.setdefault(column, found) == found})
    number = 0
    try:
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                report.read += 1
                yield Record(
                    f"{file.name}:{number}",
                    {k: _named(value, classes[k]) if k in classes else value for k, value in row.items()},
                )
    except (require("pyarrow").ArrowException, OSError) as error:
        raise Damaged(f"malformed {file.kind} file after row {number} ({error})") from None


def _class_names(schema) -> dict[str, list[str]]:
    """The names of the classes of each column that `datasets` wrote as a ClassLabel, or as a list of them."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    found = {}
    for column, feature in features.items():
        while isinstance(feature, dict) and "names" not in feature and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        if isinstance(feature, list) and len(feature) == 1:
            feature = feature[0]
        if isinstance(feature, dict) and isinstance(feature.get("names"), list):
            found[column] = feature["names"]
    return found


def _named(value, classes: list[str]):
    """Class numbers as names; -1, as in an unlabelled test split, is None."""
    if isinstance(value, list):
        return [_named(one, classes) for one in value]
    return classes[value] if isinstance(value, int) and 0 <= value < len(classes) else None
