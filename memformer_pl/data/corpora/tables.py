"""Tables of texts in files: JSON lines, JSON, CSV, Parquet and Arrow.

JSON is read by Python's own parser. That of ``datasets`` makes a date of a text that looks like one, cannot say which
line is wrong, and ends the process at a line that holds ``null``.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from memformer_pl.data.corpora.formats import format_of, opened
from memformer_pl.errors import UsageError

ROWS = 64
"""Rows of a Parquet file that are in memory at once."""
BYTE_ORDER_MARK = "\ufeff"


def contents(path: Path, *, field: str) -> Iterator[tuple[str, bytes]]:
    """Where each row stands, and its text in UTF-8: empty where it is null.

    Args:
        path: A file that ends as one of ``formats.TABLES``, compressed or not.
        field: The column that holds the text.

    Raises:
        UsageError: The file cannot be read, or a row does not hold text in such a column; says which.
    """
    try:
        for place, row in READERS[format_of(path).table or ""](path, field):
            yield place, _content(row, field, place)
    except Exception as error:  # whatever the bytes provoke
        raise UsageError(f"cannot read {str(path)!r}: {error}") from error


def _content(row: object, field: str, place: str) -> bytes:
    if not isinstance(row, dict):
        raise UsageError(f"{place} holds {type(row).__name__}, no object with columns")
    if field not in row:
        raise UsageError(f"{place} has no column {field=}, only {sorted(row)}")
    if not isinstance(text := row[field], str | None):
        raise UsageError(f"{place}: column {field=} holds {type(text).__name__}, not text")
    try:
        return (text or "").encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{place}: column {field=} holds half a character: {error.reason}") from error


def _json(path: Path, field: str) -> Iterator[tuple[str, object]]:
    """Rows of one list or object, which are in memory at once; or of JSON lines."""
    whole = _whole(path)
    if whole is not None:
        yield from ((f"row {number}", row) for number, row in enumerate(whole, start=1))
    else:
        yield from _lines(path, field)


def _lines(path: Path, field: str) -> Iterator[tuple[str, object]]:
    del field
    offset = 0
    with opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                text = _decoded(line, place=f"line {number}", offset=offset).rstrip()
                yield f"line {number}", _value(text, line=number)
            offset += len(line)


def _whole(path: Path) -> list[object] | None:
    """The rows of a file that is one value; None where each line is one."""
    with opened(path) as file:
        text = _decoded(file.read(), place="it", offset=0).rstrip()
    try:
        value = _value(text, line=1)
    except ValueError as error:
        if getattr(error.__cause__, "msg", "") == "Extra data":
            return None
        raise
    return value if isinstance(value, list) else [value]


def _value(text: str, *, line: int) -> object:
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1}, column {error.colno}"
        raise UsageError(f"{where}: no JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number that is too long, or too many levels
        raise UsageError(f"line {line}: no JSON that can be read: {error}") from error
    return value


def _decoded(content: bytes, *, place: str, offset: int) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        wrong = f"byte {content[error.start]:#04x} at offset {offset + error.start}"
        raise UsageError(f"{place} is not UTF-8: {wrong}") from error
    return text if offset else text.removeprefix(BYTE_ORDER_MARK)


def _csv(path: Path, field: str) -> Iterator[tuple[str, object]]:
    """Rows under a header; a text with line ends stands in quotes, where a quote is doubled."""
    del field
    csv.field_size_limit((1 << 31) - 1)  # of the whole process; else a long text would be refused
    delimiter = "\t" if format_of(path).table == ".tsv" else ","
    number = 0
    with opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
        try:
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            header = next(rows, [])
            if len(set(header)) < len(header):
                raise UsageError(f"line 1 names a column twice: {header}")
            number = rows.line_num
            for row in rows:
                place, number = f"line {number + 1}", rows.line_num
                if len(row) not in (0, len(header)):
                    raise UsageError(f"{place} has {len(row)} columns, but the header has {len(header)}")
                if row:
                    yield place, dict(zip(header, row, strict=True))
        except UnicodeDecodeError as error:
            wrong = f"byte {error.object[error.start]:#04x}"
            raise UsageError(f"it is not UTF-8: {wrong} at or after line {number + 1}") from error
        except csv.Error as error:
            raise UsageError(f"line {number + 1}: not valid CSV: {error}") from error


def _parquet(path: Path, field: str) -> Iterator[tuple[str, object]]:
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        _require_one(file.schema_arrow.names, field)
        # a name with a dot is also that of a part of another column, which is then read too
        yield from _rows(file.iter_batches(batch_size=ROWS, columns=[field]), field)


def _arrow(path: Path, field: str) -> Iterator[tuple[str, object]]:
    """Rows of a file of Arrow's, which is also Feather's, or of one of its streams, as ``datasets`` writes it."""
    with pyarrow.OSFile(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
        _require_one(reader.schema.names, field)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield from _rows(map(_whole_batch, batches), field)


def _whole_batch(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    batch.validate(full=True)  # else places outside the file would be read, where a byte of it has changed
    return batch


def _require_one(columns: list[str], field: str) -> None:
    if columns.count(field) != 1:
        how_many = "more than one" if field in columns else "no"
        raise UsageError(f"it has {how_many} column {field=}, only {sorted(columns)}")


def _rows(batches: Iterable[pyarrow.RecordBatch], field: str) -> Iterator[tuple[str, object]]:
    number = 0
    for batch in batches:
        column = batch.column(batch.schema.get_field_index(field))
        for value in column:
            number += 1
            try:
                row = {field: value.as_py()}
            except UnicodeDecodeError as error:
                raise UsageError(f"row {number} is not UTF-8") from error
            yield f"row {number}", row


READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, object]]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".feather": _arrow,
}
