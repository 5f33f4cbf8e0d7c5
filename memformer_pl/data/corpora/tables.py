"""Tables of texts in files: JSON lines, JSON, CSV, Parquet and Arrow.

JSON is read by Python's own parser. The parser of ``datasets`` converts texts that look like dates, cannot say which
line is wrong, and aborts the process on a line that holds ``null``.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from memformer_pl.data.corpora.formats import format_of, open_decompressed
from memformer_pl.errors import UsageError

ROWS = 64
"""Rows of a Parquet file in memory at once."""
BYTE_ORDER_MARK = "\ufeff"


def contents(path: Path, *, field: str) -> Iterator[tuple[str, bytes]]:
    """Yield the position of each row and its text in UTF-8; a null becomes an empty text.

    Args:
        path: A file with one of the endings in ``formats.TABLES``, compressed or not.
        field: The column that holds the text.

    Raises:
        UsageError: The file cannot be read, or a row lacks the column or holds something other than text there; says
            which.
    """
    try:
        for place, row in READERS[format_of(path).table or ""](path, field):
            yield place, _content(row, field, place)
    except Exception as error:  # damaged bytes may raise anything
        raise UsageError(f"cannot read {str(path)!r}: {error}") from error


def _content(row: object, field: str, place: str) -> bytes:
    if not isinstance(row, dict):
        raise UsageError(f"{place} holds {type(row).__name__}, not an object with columns")
    if field not in row:
        raise UsageError(f"{place} has no column {field=}, only {sorted(row)}")
    if not isinstance(text := row[field], str | None):
        raise UsageError(f"{place}: column {field=} holds {type(text).__name__}, not text")
    try:
        return (text or "").encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{place}: column {field=} holds an invalid character: {error.reason}") from error


def _json(path: Path, field: str) -> Iterator[tuple[str, object]]:
    """Rows of a single list or object, which is held in memory, or of JSON lines."""
    whole = _whole(path)
    if whole is not None:
        yield from ((f"row {number}", row) for number, row in enumerate(whole, start=1))
    else:
        yield from _lines(path, field)


def _lines(path: Path, field: str) -> Iterator[tuple[str, object]]:
    del field
    offset = 0
    with open_decompressed(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                text = _decoded(line, place=f"line {number}", offset=offset).rstrip()
                yield f"line {number}", _value(text, line=number)
            offset += len(line)


def _whole(path: Path) -> list[object] | None:
    """The rows of a file that is a single JSON value; None if each line is one."""
    with open_decompressed(path) as file:
        text = _decoded(file.read(), place="the file", offset=0).rstrip()
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
        raise UsageError(f"{where}: not valid JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # too long a number, or nested too deep
        raise UsageError(f"line {line}: cannot parse JSON: {error}") from error
    return value


def _decoded(content: bytes, *, place: str, offset: int) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        reason = f"byte {content[error.start]:#04x} at offset {offset + error.start}"
        raise UsageError(f"{place} is not UTF-8: {reason}") from error
    return text if offset else text.removeprefix(BYTE_ORDER_MARK)


def _csv(path: Path, field: str) -> Iterator[tuple[str, object]]:
    """Rows below a header; a text with line ends is quoted, and a quote inside it is doubled."""
    del field
    csv.field_size_limit((1 << 31) - 1)  # for the whole process; otherwise a long text is refused
    delimiter = "\t" if format_of(path).table == ".tsv" else ","
    number = 0
    with open_decompressed(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
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
            reason = f"byte {error.object[error.start]:#04x}"
            raise UsageError(f"the file is not UTF-8: {reason} at or after line {number + 1}") from error
        except csv.Error as error:
            raise UsageError(f"line {number + 1}: not valid CSV: {error}") from error


def _parquet(path: Path, field: str) -> Iterator[tuple[str, object]]:
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        _require_one(file.schema_arrow.names, field)
        # a name with a dot also selects a field of a struct column, which is then read too
        yield from _rows(file.iter_batches(batch_size=ROWS, columns=[field]), field)


def _arrow(path: Path, field: str) -> Iterator[tuple[str, object]]:
    """Rows of an Arrow file, which is also a Feather file, or of an Arrow stream, as ``datasets`` writes it."""
    with pyarrow.OSFile(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file)
        _require_one(reader.schema.names, field)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield from _rows(map(_whole_batch, batches), field)


def _whole_batch(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    batch.validate(full=True)  # otherwise a changed byte can make Arrow read outside the file
    return batch


def _require_one(columns: list[str], field: str) -> None:
    if columns.count(field) != 1:
        how_many = "more than one" if field in columns else "no"
        raise UsageError(f"the file has {how_many} column {field=}, only {sorted(columns)}")


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
