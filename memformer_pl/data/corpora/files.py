"""Corpora that are read from files or from the Hugging Face hub.

Files do not go through ``datasets``: it would turn ``\\r\\n`` into ``\\n`` and refuse bytes that are no UTF-8, where a
corpus of bytes has to be lossless. ``tables.py`` says why tables do not either.
"""

import logging
import lzma
import os
import zlib
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Protocol, runtime_checkable

from memformer_pl.data.corpora import paths as places
from memformer_pl.data.corpora import tables
from memformer_pl.data.corpora.corpus import SPLITS, Corpus, Document
from memformer_pl.data.corpora.formats import disguised, format_of, opened
from memformer_pl.data.tokenizers.pieces import blocks_of
from memformer_pl.errors import UsageError, usage_error

log = logging.getLogger(__name__)

ROWS = 64
"""Rows that are in memory at once."""


@runtime_checkable
class Table(Protocol):
    """What is used of a data set of ``datasets``, be it streamed or not."""

    @property
    def column_names(self) -> list[str] | None: ...

    def select_columns(self, column_names: str) -> "Table": ...

    def iter(self, batch_size: int) -> Iterator[dict[str, list[object]]]: ...

    def __iter__(self) -> Iterator[dict[str, object]]: ...


class Files(Corpus):
    """Files on disk. A row of a table is a document: ``.jsonl``, ``.ndjson``, ``.json``, ``.csv`` and ``.tsv`` with a
    header, ``.parquet``, ``.arrow``, ``.feather``. So is every other file, byte for byte.

    A file that also ends in ``.gz``, ``.bz2``, ``.xz``, ``.lzma`` or ``.zst`` is decompressed, ``rows.jsonl.gz`` say.
    Archives (``.zip``, ``.tar``) and other compressions are refused. Endings may be in capitals. They alone decide: a
    compressed file or a table under another name is read byte for byte, and a warning says so.

    Args:
        paths: Files, directories or globs, where ``**`` stands for any directories. In a directory every file is read,
            at any depth, except what is hidden. Order and repetition are of no effect.
        field: The column of a table that holds the text.
    """

    def __init__(self, *, paths: str | list[str], field: str = "text") -> None:
        self._disguised: set[Path] = set()
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        self.field = field
        if not self.paths or not all(self.paths):
            raise UsageError(f"paths must name files, directories or globs, at least one, got {paths=}")

    def documents(self) -> Iterator[Document]:
        """Documents by path, then by row.

        Raises:
            UsageError: A path is missing or matches no file, or a table has no such column or cannot be read.
        """
        for name, blocks in self.streams():
            yield Document(b"".join(blocks), name=name)

    def streams(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Name and content of each document, in blocks: of a file no more than a block is held, of a table its rows."""
        for path in self._files():
            if format_of(path).table is not None:
                rows = tables.contents(path, field=self.field)
                yield from ((f"{path}, {place}", iter([content])) for place, content in rows)
            else:
                yield str(path), self._blocks(path)

    def size(self) -> int | None:
        """Bytes of all documents, if that is known before they are read: it is not of tables and compressed files."""
        files = self._files()
        plain = all(format_of(path) == (None, None) for path in files)
        return sum(path.stat().st_size for path in files) if plain else None

    def identity(self) -> Mapping[str, object]:
        """Name, size and time of the last change of every file."""
        return {"corpus": "Files", "field": self.field, "files": places.stamp(self._files())}

    def would_read(self, path: Path) -> bool:
        if path.exists():
            there = path.stat()
            if any(os.path.samestat(there, file.stat()) for file in self._files()):
                return True
        return any(places.covers(pattern, path) for pattern in self.paths)

    def _blocks(self, path: Path) -> Iterator[bytes]:
        """The content of a file, decompressed."""
        about = f"cannot read {str(path)!r}"
        with usage_error(OSError, EOFError, lzma.LZMAError, zlib.error, about=about), opened(path) as file:
            plain = format_of(path).compression is None
            if plain and path not in self._disguised and (kind := disguised(file.peek())):
                self._disguised.add(path)  # told once
                log.warning("%s begins as a file of %s, but is read byte for byte, as its name says", path, kind)
            yield from blocks_of(file.read)

    def _files(self) -> list[Path]:
        return sorted({file for path in self.paths for file in places.matches(path)})


class Hub(Corpus):
    """A data set of the Hugging Face hub, or a local directory in one of its formats: a row is a document.

    It keeps its splits, as far as they are named train, validation and test; one that it does not have is cut from
    train. Other splits are not read. What was packed stays as it is when the data set changes on the hub.

    Args:
        path: For example ``roneneldan/TinyStories``.
        name: Which of its configurations, where it has several.
        field: The column that holds the text.
    """

    def __init__(self, *, path: str, name: str | None = None, field: str = "text") -> None:
        self.path = path
        self.name = name
        self.field = field

    def documents(self) -> Iterator[Document]:
        """Documents by split, in the order of the data set.

        Raises:
            UsageError: There is no such data set, or it has no such column or none of the splits.
        """
        splits = self._load()
        for split in SPLITS:
            if split in splits:
                for number, content in enumerate(self._contents(splits[split])):
                    yield Document(content, name=f"{self.path}, {split} document {number}", split=split)

    def identity(self) -> Mapping[str, object]:
        """The arguments; of a local directory also name, size and time of the last change of every file."""
        given = {"path": self.path, "name": self.name, "field": self.field}
        return {"corpus": type(self).__name__, **given, "files": places.stamp(places.below(Path(self.path)))}

    def would_read(self, path: Path) -> bool:
        return Path(self.path).is_dir() and places.covers(self.path, path)

    def _contents(self, table: Table) -> Iterator[bytes]:
        return (text.encode() for text in self._texts_of_documents(_texts(table, field=self.field)))

    def _texts_of_documents(self, rows: Iterator[str]) -> Iterator[str]:
        return rows

    def _load(self) -> Mapping[str, Table]:
        from datasets import load_dataset  # takes a second

        try:
            splits: Mapping[str, Table] = load_dataset(self.path, self.name)
        except Exception as error:  # whatever a data set provokes
            raise UsageError(f"cannot load the data set {self.path!r} with name={self.name!r}: {error}") from error
        if "train" not in splits:
            raise UsageError(f"the data set {self.path!r} has no split 'train', only {sorted(splits)}")
        return splits


def _texts(table: Table, *, field: str) -> Iterator[str]:
    """The column ``field`` of a table; empty where it is null.

    Raises:
        UsageError: There is no such column, or it does not hold text.
    """
    require_column(table, field)
    for batch in table.select_columns(field).iter(batch_size=ROWS):
        for value in batch[field]:
            if not isinstance(value, str | None):
                raise UsageError(f"column {field=} holds {type(value).__name__}, not text{_cure(value)}")
            yield value or ""


def _cure(value: object) -> str:
    if isinstance(value, date):
        return ": datasets takes texts that look like dates for dates; read the files with Files, which does not"
    return ""


def require_column(table: Table, field: str) -> None:
    """Raise a ``UsageError`` for a table without such a column."""
    columns = table.column_names or list(next(iter(table), {field: ""}))
    if field not in columns:
        raise UsageError(f"it has no column {field=}, only {sorted(columns)}")
