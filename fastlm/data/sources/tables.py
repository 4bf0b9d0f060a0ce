"""Documents from the text column of CSV, Parquet and Arrow files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence

from fastlm.data._extras import require
from fastlm.data.sources.report import Report
from fastlm.data.sources.streams import Damaged

_BATCH_ROWS = 256  # rows are taken out of a table so many at a time: a few MB of documents


def read_csv(
    stream, name: str, delimiter: str, report: Report, fields: Sequence[str], longest: int
) -> Iterator[tuple[str, str]]:
    """The column of each row; the first row has the names of the columns. The place of a row is its last line."""
    csv.field_size_limit(max(csv.field_size_limit(), longest))  # of the process; the default is 128 KiB
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    column = None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            report.read += 1
            report.reject("malformed CSV", f"{name}:{rows.line_num}")
            continue
        if column is None:
            field = _choose(row, fields)
            column, width = row.index(field), len(row)
            continue
        place = f"{name}:{rows.line_num}"
        if not row:
            continue
        report.read += 1
        if len(row) != width:
            report.reject(f"row of other than {width} columns", place)
            continue
        text = row[column]
        report.bytes_read += len(text)
        try:
            text.encode()
        except UnicodeEncodeError:
            report.reject("not UTF-8", place)
        else:
            yield place, text


def _choose(columns: Sequence[str], fields: Sequence[str]) -> str:
    for field in fields:
        if field in columns:
            return field
    names = " or ".join(f'"{field}"' for field in fields)
    raise Damaged(f"table without a column {names}, but {', '.join(columns[:8])}")


def read_parquet(
    stream, name: str, start: int, stop: int | None, row: int, report: Report, fields: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """The column in the row groups from `start` to `stop`; `row` is the number of the first row, from 1."""
    file = open_parquet(stream)
    field = _choose(file.schema_arrow.names, fields)

    for group in range(start, file.num_row_groups if stop is None else stop):

        def batches(group=group):
            return file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[field], use_threads=False)

        yield from _checked(batches, "row group of a malformed Parquet file", field, name, row, report)
        row += file.metadata.row_group(group).num_rows


def open_parquet(stream):
    """pyarrow's ParquetFile; Damaged where the file has no valid footer."""
    parquet = require("pyarrow.parquet")
    try:
        return parquet.ParquetFile(stream, page_checksum_verification=True)
    except (_arrow_error(), OSError):
        raise Damaged("malformed Parquet file") from None


def read_arrow(stream, name: str, report: Report, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The column of an Arrow file in either format, of streams (what `datasets` writes) or of files (Feather)."""
    ipc = require("pyarrow.ipc")
    as_file = stream.read(6) == b"ARROW1"

    def batches():
        stream.seek(0)
        if not as_file:
            yield from ipc.open_stream(stream)
            return
        reader = ipc.open_file(stream)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))

    try:
        first = next(batches(), None)
    except (_arrow_error(), OSError):
        raise Damaged("malformed Arrow file") from None
    if first is not None:
        field = _choose(first.schema.names, fields)
        selected = lambda: (batch.select([field]) for batch in batches())  # noqa: E731
        yield from _checked(selected, "malformed Arrow file", field, name, 1, report)


def _arrow_error() -> type[Exception]:
    return require("pyarrow").ArrowException


def _checked(
    batches: Callable[[], Iterable], damage: str, field: str, name: str, row: int, report: Report
) -> Iterator[tuple[str, str]]:
    """The text of each row of `batches`, which are decoded once before, so that damaged ones give nothing."""
    pyarrow = require("pyarrow")
    try:
        for batch in batches():
            batch.validate(full=False)
            _as_bytes(batch.column(0), pyarrow)
    except TypeError:
        report.reject(f'column "{field}" without strings', f"{name}:{row}")
        return
    except (pyarrow.ArrowException, OSError):
        report.reject(damage, f"{name}:{row}")
        return
    for batch in batches():
        column = _as_bytes(batch.column(0), pyarrow)
        report.bytes_read += column.nbytes
        for at in range(0, len(column), _BATCH_ROWS):
            for value in column.slice(at, _BATCH_ROWS).to_pylist():
                report.read += 1
                place, row = f"{name}:{row}", row + 1
                if value is None:
                    report.reject(f'no string under "{field}"', place)
                    continue
                try:
                    yield place, value.decode()
                except UnicodeDecodeError:
                    report.reject("not UTF-8", place)


def _as_bytes(column, pyarrow):
    """The column as bytes, since a string in a file may be no UTF-8. TypeError for another kind."""
    types = pyarrow.types
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_null(kind):
        return column.cast(pyarrow.binary())
    accepted = types.is_string, types.is_large_string, types.is_binary, types.is_large_binary
    if not any(is_kind(kind) for is_kind in accepted):
        raise TypeError
    return column.cast(kind).cast(pyarrow.large_binary())
