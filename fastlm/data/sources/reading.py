"""Documents from files, whole or in parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fastlm.data._checks import integer
from fastlm.data.sources import tables
from fastlm.data.sources.files import SourceFile
from fastlm.data.sources.report import Report
from fastlm.data.sources.streams import Damaged, open_bytes

DOCUMENTS = ("file", "line", "blank")
FIELDS = ("text",)
LONGEST_RECORD = 64 << 20  # bytes of a line, and of a block between blank lines: one is held in memory
LONGEST_FILE = 16 << 20  # bytes of a plain-text file that is one document; a longer one is several

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Part:
    """A piece of a file that can be read alone.

    start, stop  bytes of a text or JSONL file, row groups of a Parquet file; stop None: to the end
    line         the number of the first line, or of the first row, so that places are those of the whole file
    """

    file: SourceFile
    start: int = 0
    stop: int | None = None
    line: int = 1

    @property
    def name(self) -> str:
        return self.file.name


def read_documents(
    files: Iterable[SourceFile | Part], documents: str, report: Report, *, fields: Sequence[str] = FIELDS
) -> Iterator[tuple[str, str]]:
    """(place, text) of every document; `place` is the file's name, with a line or row number where it holds several.

    documents  what of a plain-text file is a document: "file", "line", or "blank" (between blank lines)
    fields     of a JSON line or a table: the first of these that is there is the text

    A plain-text file of more than 16 MiB is several documents, cut at a blank line where there is one, else at a line
    end. A line or block of more than 64 MiB is set aside.
    """
    _check(documents)
    fields = (fields,) if isinstance(fields, str) else tuple(fields)
    if not fields or not all(isinstance(name, str) and name for name in fields):
        raise ValueError(f"fields: expected names of fields, as ('text',), got {fields!r}")
    for given in files:
        part = given if isinstance(given, Part) else Part(given)
        try:
            yield from _read(part, documents, report, fields)
        except OSError as error:
            report.reject(f"unreadable file ({error.strerror or error})", part.name)
        except Damaged as error:
            report.reject(str(error), part.name)


def _check(documents: str) -> None:
    if documents not in DOCUMENTS:
        raise ValueError(f"documents: expected one of {', '.join(DOCUMENTS)}, got {documents!r}")


def _read(part: Part, documents: str, report: Report, fields: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    file = part.file
    with open_bytes(file) as stream:
        if file.kind == "parquet":
            yield from tables.read_parquet(stream, file.name, part.start, part.stop, part.line, report, fields)
        elif file.kind == "arrow":
            yield from tables.read_arrow(stream, file.name, report, fields)
        elif not part.start and _is_binary(stream):
            report.reject("binary file", file.name)
        elif file.kind == "csv":
            yield from tables.read_csv(stream, file.name, file.delimiter, report, fields, LONGEST_RECORD)
        else:
            if part.start:
                stream.seek(part.start)
            if file.kind == "json":
                yield from _json_lines(_lines(stream, part, report), report, fields)
            elif documents == "file":
                yield from _decode(_cuts(stream, part), report)
            else:
                records = (_lines if documents == "line" else _blocks)(stream, part, report)
                yield from _decode(records, report)


def _is_binary(stream) -> bool:
    return b"\0" in stream.peek(4096)[:4096]


def split(file: SourceFile, max_bytes: int, documents: str = "file") -> list[Part]:
    """Parts of about `max_bytes` each; reading them in order gives the documents, places and report of the file.

    A text file by lines or blocks and a JSONL file are cut at their ends, a plain-text file where it is cut into
    documents, a Parquet file between row groups. A compressed file, a CSV and an Arrow file are one part. The lines are
    counted for the places, which reads the file once. A file that cannot be read is one part.
    """
    _check(documents)
    max_bytes = integer("max_bytes", max_bytes, 1)
    if file.compression or file.kind in ("csv", "arrow") or (file.size <= max_bytes and file.kind != "parquet"):
        return [Part(file)]
    try:
        with open(file.path, "rb") as stream:
            if file.kind == "parquet":
                starts = _group_starts(tables.open_parquet(stream).metadata, max_bytes)
            elif _is_binary(stream):
                return [Part(file)]
            elif file.kind == "text" and documents == "file":
                starts = _cut_starts(stream, Part(file), max_bytes)
            else:
                starts = _line_starts(stream, max_bytes, blocks=file.kind == "text" and documents == "blank")
            starts = list(starts)
    except (OSError, Damaged):
        return [Part(file)]  # the report of reading it says why
    stops = [start for start, _ in starts[1:]] + [None]
    return [Part(file, start, stop, line) for (start, line), stop in zip(starts, stops, strict=True)] or [Part(file)]


def _group_starts(metadata, max_bytes: int) -> Iterator[tuple[int, int]]:
    size, row = max_bytes, 1
    for group in range(metadata.num_row_groups):
        if size >= max_bytes:
            yield group, row
            size = 0
        size += metadata.row_group(group).total_byte_size
        row += metadata.row_group(group).num_rows


def _cut_starts(stream, part: Part, max_bytes: int) -> Iterator[tuple[int, int]]:
    size = max_bytes
    at = 0
    for _, data, line in _cut(stream, part):
        if size >= max_bytes:
            yield at, line
            size = 0
        size += len(data)
        at += len(data)


def _line_starts(stream, max_bytes: int, blocks: bool) -> Iterator[tuple[int, int]]:
    at, line = 0, 1
    while True:
        start, first = at, line
        while at < start + max_bytes:
            data = stream.read(min(_CHUNK, start + max_bytes - at))
            if not data:
                break
            at, line = at + len(data), line + data.count(b"\n")
        ended, blank = False, False  # to the end of the line, and of blocks to the end of a blank line
        while not (ended and (blank or not blocks)):
            data = stream.readline(_CHUNK)
            if not data:
                break
            blank = ended and not data.strip()
            ended = data.endswith(b"\n")
            at, line = at + len(data), line + ended
        if at > start:
            yield start, first
        if not data:
            return


def _cut(stream, part: Part) -> Iterator[tuple[str, bytes, int]]:
    """(place, bytes, first line) of the documents of a plain-text file, nearly always one."""
    at, line, rest = part.start, part.line, b""
    while True:
        left = LONGEST_FILE if part.stop is None else min(LONGEST_FILE, part.stop - at)
        data = rest + stream.read(left - len(rest))
        if not data and at:
            return
        end = len(data)
        if end == LONGEST_FILE and stream.peek(1):
            end = data.rfind(b"\n\n", end // 2) + 2
            end = end if end > 1 else data.rfind(b"\n", LONGEST_FILE // 2) + 1
            end = end or _character_end(data)
        yield (f"{part.name}:{line}" if at else part.name), data[:end], line
        rest = data[end:]
        at, line = at + end, line + data.count(b"\n", 0, end)
        if (end == left and part.stop == at) or not (rest or stream.peek(1)):
            return


def _character_end(data: bytes) -> int:
    """Where the last whole UTF-8 character of `data` ends: at most 3 bytes before its end."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] & 0xC0 != 0x80:  # the first byte of a character
            length = 1 + (data[-back] >= 0xC0) + (data[-back] >= 0xE0) + (data[-back] >= 0xF0)
            return len(data) - back if back < length else len(data)
    return len(data)


def _cuts(stream, part: Part) -> Iterator[tuple[str, bytes]]:
    return ((place, data) for place, data, _ in _cut(stream, part))


def _numbered(stream, part: Part, report: Report) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each line of the part; one that is too long is set aside and blank here."""
    at, number = part.start, part.line
    while part.stop is None or at < part.stop:
        line = stream.readline(LONGEST_RECORD + 1)
        if not line:
            return
        at += len(line)
        if len(line) > LONGEST_RECORD and not line.endswith(b"\n"):
            report.read += 1
            report.reject(f"line of more than {LONGEST_RECORD >> 20} MiB", f"{part.name}:{number}")
            while line and not line.endswith(b"\n"):
                line = stream.readline(_CHUNK)
                at += len(line)
            line = b"\n"
        yield number, line
        number += 1


def _lines(stream, part: Part, report: Report) -> Iterator[tuple[str, bytes]]:
    """Lines that are not blank."""
    return ((f"{part.name}:{number}", line) for number, line in _numbered(stream, part, report) if line.strip())


def _blocks(stream, part: Part, report: Report) -> Iterator[tuple[str, bytes]]:
    """Runs of lines that are not blank; the place is that of the first."""
    block, size, start = [], 0, 0
    for number, line in _numbered(stream, part, report):
        if line.strip():
            start = start or number
            size += len(line)
            if size <= LONGEST_RECORD:
                block.append(line)
            continue
        if start:
            yield from _block(block, size, f"{part.name}:{start}", report)
        block, size, start = [], 0, 0
    if start:
        yield from _block(block, size, f"{part.name}:{start}", report)


def _block(block: list[bytes], size: int, place: str, report: Report) -> Iterator[tuple[str, bytes]]:
    if size <= LONGEST_RECORD:
        yield place, b"".join(block)
    else:
        report.read += 1
        report.reject(f"block of more than {LONGEST_RECORD >> 20} MiB", place)


def _decode(records: Iterable[tuple[str, bytes]], report: Report) -> Iterator[tuple[str, str]]:
    for place, data in records:
        report.read += 1
        report.bytes_read += len(data)
        try:
            yield place, data.decode("utf-8-sig")
        except UnicodeDecodeError:
            report.reject("not UTF-8", place)


def _json_lines(
    lines: Iterable[tuple[str, bytes]], report: Report, fields: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    for place, line in _decode(lines, report):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            report.reject("malformed JSON", place)
            continue
        named = [field for field in fields if isinstance(record, dict) and field in record]
        text = record[named[0]] if named else None
        if isinstance(text, str):
            yield place, text
        else:
            report.reject("no string under " + " or ".join(f'"{field}"' for field in fields), place)
