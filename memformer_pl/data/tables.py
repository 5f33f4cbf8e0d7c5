"""Tables of texts in files: JSON lines, JSON and Parquet.

JSON is read by Python's own parser. That of ``datasets`` makes a date of a text that looks like one, cannot say which
line is wrong, and ends the process at a line that holds ``null``.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet

from memformer_pl.errors import UsageError

TABLES = (".jsonl", ".json", ".parquet")
"""Files that end so are tables. Any other file is a document."""
ROWS = 64
"""Rows of a Parquet file that are in memory at once."""
BYTE_ORDER_MARK = "\ufeff"


def contents(path: Path, *, field: str) -> Iterator[tuple[str, bytes]]:
    """Where each row stands, and its text in UTF-8: empty where it is null.

    Args:
        path: A file that ends as one of ``TABLES``.
        field: The column that holds the text.

    Raises:
        UsageError: The file cannot be read, or a row does not hold text in such a column; says which.
    """
    try:
        for place, row in _parquet(path, field) if path.suffix == ".parquet" else _json(path):
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


def _json(path: Path) -> Iterator[tuple[str, object]]:
    """Rows of JSON lines, or those of one list or object, which are in memory at once."""
    whole = _whole(path) if path.suffix == ".json" else None
    if whole is not None:
        yield from ((f"row {number}", row) for number, row in enumerate(whole, start=1))
        return
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                text = _decoded(line, place=f"line {number}", offset=offset).rstrip()
                yield f"line {number}", _value(text, line=number)
            offset += len(line)


def _whole(path: Path) -> list[object] | None:
    """The rows of a file that is one value; None where each line is one."""
    text = _decoded(path.read_bytes(), place="it", offset=0).rstrip()
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


def _parquet(path: Path, field: str) -> Iterator[tuple[str, object]]:
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        columns = file.schema_arrow.names
        if columns.count(field) != 1:
            how_many = "more than one" if field in columns else "no"
            raise UsageError(f"it has {how_many} column {field=}, only {sorted(columns)}")
        number = 0
        for batch in file.iter_batches(batch_size=ROWS, columns=[field]):
            for value in batch.column(0):
                number += 1
                try:
                    row = {field: value.as_py()}
                except UnicodeDecodeError as error:
                    raise UsageError(f"row {number} is not UTF-8") from error
                yield f"row {number}", row
