"""What the name of a file says of it: whether it is compressed, and whether it holds a table or one document.

The ending decides, in capitals or not, and nothing else does: ``book.txt`` is read byte for byte, whatever is in it.
Where that looks like a slip, :func:`disguised` says so.
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
"""A row is a document."""
BINARY_TABLES = (".parquet", ".arrow", ".feather")
COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".lzma": lzma.LZMAFile,
    ".zst": _zstd,
    ".zstd": _zstd,
}
"""How a file that is compressed is opened; what stands before the ending says what is in it."""
REFUSED = {
    "unpack it, and give the folder": (".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst", ".7z", ".rar"),
    "decompress it, or compress it as .gz, .bz2, .xz or .zst": (".lz4", ".lz", ".lzo", ".br", ".bz", ".z"),
    "save the table as .jsonl, .csv or .parquet": (".xlsx", ".xls", ".ods", ".orc", ".avro"),
}
"""What to do about endings of files that hold documents, but are not read."""
MAGIC = {
    b"\x1f\x8b\x08": "gzip (.gz)",
    b"BZh": "bzip2 (.bz2)",
    b"\xfd7zXZ\x00": "xz (.xz)",
    b"\x28\xb5\x2f\xfd": "zstd (.zst)",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet (.parquet)",
    b"ARROW1": "Arrow (.arrow)",
}
"""How files begin that are not often meant to be read byte for byte."""


class Format(NamedTuple):
    """What is in a file."""

    table: str | None
    """One of ``TABLES``, or None where the file is one document."""
    compression: str | None
    """A key of ``COMPRESSED``."""


def format_of(path: Path) -> Format:
    """What the name of a file says.

    Raises:
        UsageError: It is one of a kind that is not read; says what to do.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSED else None
    last = suffixes[-1] if suffixes else ""
    for cure, endings in REFUSED.items():
        if last in endings:
            raise UsageError(
                f"cannot read {str(path)!r}: files that end in {last} are not read; {cure}, or leave the file out by a "
                "pattern such as 'folder/**/*.txt'"
            )
    if compression and last in BINARY_TABLES:
        raise UsageError(f"cannot read {str(path)!r}: a table in {last} is not read compressed; decompress the file")
    return Format(last if last in TABLES else None, compression)


def opened(path: Path) -> io.BufferedReader:
    """A file to read from, decompressed."""
    compression = format_of(path).compression
    if compression is None:
        return path.open("rb")
    if not path.stat().st_size:
        raise EOFError("a compressed file cannot be empty")
    return io.BufferedReader(COMPRESSED[compression](path))


def disguised(start: bytes) -> str | None:
    """The kind of file that begins like this, which is not often meant to be read byte for byte; None otherwise."""
    return next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
