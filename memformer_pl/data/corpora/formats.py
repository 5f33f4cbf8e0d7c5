"""What the name of a file says about it: how it is compressed, and whether it holds a table or one document.

Only the ending decides, in upper or lower case: ``book.txt`` is read byte for byte, whatever is in it.
:func:`detect_binary` finds files whose content suggests that the name is wrong.
"""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow

from memformer_pl.errors import UsageError


def _zstd(path: Path) -> Any:
    return pyarrow.input_stream(str(path), compression="zstd")


TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
"""Endings of tables, in which a row is a document."""
BINARY_TABLES = (".parquet", ".arrow", ".feather")
COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".lzma": lzma.LZMAFile,
    ".zst": _zstd,
    ".zstd": _zstd,
}
"""How to open a compressed file; the ending before this one says what is inside."""
REFUSED = {
    "unpack it, and pass the folder": (".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".7z", ".rar"),
    "decompress it, or compress it as .gz, .bz2, .xz or .zst": (".lz4", ".lz", ".lzo", ".br", ".bz", ".z"),
    "save the table as .jsonl, .csv or .parquet": (".xlsx", ".xls", ".ods", ".orc", ".avro"),
}
"""Endings of files that hold documents but cannot be read, by what to do about them."""
MAGIC = {
    b"\x1f\x8b\x08": "gzip (.gz)",
    b"BZh": "bzip2 (.bz2)",
    b"\xfd7zXZ\x00": "xz (.xz)",
    b"\x28\xb5\x2f\xfd": "zstd (.zst)",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet (.parquet)",
    b"ARROW1": "Arrow (.arrow)",
}
"""First bytes of files that are rarely meant to be read byte for byte."""


class Format(NamedTuple):
    """The format of a file."""

    table: str | None
    """One of ``TABLES``, or None if the file is one document."""
    compression: str | None
    """A key of ``COMPRESSED``, or None."""


def format_of(path: Path) -> Format:
    """Return the format that the name of a file stands for.

    Raises:
        UsageError: The format is not supported; says what to do.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else None
    last = suffixes[-1] if suffixes else ""
    for remedy, endings in REFUSED.items():
        if last in endings:
            raise UsageError(
                f"cannot read {str(path)!r}: {last} files are not supported; {remedy}, or exclude the file with a "
                "pattern such as 'folder/**/*.txt'"
            )
    if compression and last in BINARY_TABLES:
        raise UsageError(f"cannot read {str(path)!r}: compressed {last} files are not supported; decompress the file")
    return Format(last if last in TABLES else None, compression)


def open_decompressed(path: Path) -> io.BufferedReader:
    """Open a file for reading, decompressing it."""
    compression = format_of(path).compression
    if compression is None:
        return path.open("rb")
    if not path.stat().st_size:
        raise EOFError("a compressed file cannot be empty")
    return io.BufferedReader(COMPRESSED[compression](path))


def detect_binary(start: bytes) -> str | None:
    """Return the format that begins with these bytes if it is rarely meant to be read byte for byte, else None."""
    return next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
