r"""Corpora that are read from files or from the Hugging Face hub.

Files do not go through ``datasets``, which would turn ``\r\n`` into ``\n`` and refuse bytes that are not UTF-8; a
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

from memformer_pl.data.corpora import tables
from memformer_pl.data.corpora.corpus import SPLITS, Corpus, Document
from memformer_pl.data.corpora.formats import detect_binary, format_of, open_decompressed
from memformer_pl.data.corpora.paths import below, covers, matches, stamp
from memformer_pl.data.tokenizers.pieces import blocks_of
from memformer_pl.errors import UsageError, usage_error

log = logging.getLogger(__name__)

ROWS = 64
"""Rows in memory at once."""


@runtime_checkable
class Table(Protocol):
    """The methods used of a data set of ``datasets``, streamed or not."""

    @property
    def column_names(self) -> list[str] | None: ...

    def select_columns(self, column_names: str) -> "Table": ...

    def iter(self, batch_size: int) -> Iterator[dict[str, list[object]]]: ...

    def __iter__(self) -> Iterator[dict[str, object]]: ...


class Files(Corpus):
    """Files on disk. Each row of a table is a document: ``.jsonl``, ``.ndjson``, ``.json``, ``.csv`` and ``.tsv`` with
    a header, ``.parquet``, ``.arrow``, ``.feather``. Every other file is one document, byte for byte.

    A file that also ends in ``.gz``, ``.bz2``, ``.xz``, ``.lzma`` or ``.zst`` is decompressed, for example
    ``rows.jsonl.gz``. Archives (``.zip``, ``.tar``) and other compressions are refused. Only the ending decides, in
    upper or lower case: a compressed file or a table under another name is read byte for byte, with a warning.

    Args:
        paths: Files, directories or globs, where ``**`` matches any number of directories. In a directory every file is
            read, at any depth, except hidden ones. Order and repetition do not matter.
        field: The column of a table that holds the text.
    """

    def __init__(self, *, paths: str | list[str], field: str = "text") -> None:
        self._warned: set[Path] = set()
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        self.field = field
        if not self.paths or not all(self.paths):
            raise UsageError(f"paths must be one or more files, directories or globs, got {paths=}")

    def documents(self) -> Iterator[Document]:
        """Yield the documents, sorted by path, then by row.

        Raises:
            UsageError: A path is missing or matches no file, or a table lacks the column or cannot be read.
        """
        for name, blocks in self.document_blocks():
            yield Document(b"".join(blocks), name=name)

    def document_blocks(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield the name of each document and its content in blocks, so that a file is never held in memory."""
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
        """Path, size and modification time of every file."""
        return {"corpus": "Files", "field": self.field, "files": stamp(self._files())}

    def would_read(self, path: Path) -> bool:
        if path.exists():
            status = path.stat()
            if any(os.path.samestat(status, file.stat()) for file in self._files()):
                return True
        return any(covers(pattern, path) for pattern in self.paths)

    def _blocks(self, path: Path) -> Iterator[bytes]:
        """The decompressed content of a file."""
        about = f"cannot read {str(path)!r}"
        with usage_error(OSError, EOFError, lzma.LZMAError, zlib.error, about=about), open_decompressed(path) as file:
            plain = format_of(path).compression is None
            if plain and path not in self._warned and (kind := detect_binary(file.peek())):
                self._warned.add(path)  # warn once
                log.warning("%s looks like a %s file, but is read byte for byte because of its name", path, kind)
            yield from blocks_of(file.read)

    def _files(self) -> list[Path]:
        return sorted({file for path in self.paths for file in matches(path)})


class Hub(Corpus):
    """A data set of the Hugging Face hub, or a local directory in one of its formats: a row is a document.

    Splits named train, validation and test are kept; a missing one is taken from train, and other splits are not read.
    A packed corpus does not change when the data set changes on the hub.

    Args:
        path: For example ``roneneldan/TinyStories``.
        name: Configuration of the data set, if it has several.
        field: The column that holds the text.
    """

    def __init__(self, *, path: str, name: str | None = None, field: str = "text") -> None:
        self.path = path
        self.name = name
        self.field = field

    def documents(self) -> Iterator[Document]:
        """Yield the documents by split, in the order of the data set.

        Raises:
            UsageError: The data set does not exist, or lacks the column or the split train.
        """
        splits = load_splits(self.path, self.name)
        for split in SPLITS:
            if split in splits:
                for number, content in enumerate(self._contents(splits[split])):
                    yield Document(content, name=f"{self.path}, {split} document {number}", split=split)

    def identity(self) -> Mapping[str, object]:
        """The arguments; for a local directory also path, size and modification time of every file."""
        options = {"path": self.path, "name": self.name, "field": self.field}
        return {"corpus": type(self).__name__, **options, "files": stamp(below(Path(self.path)))}

    def would_read(self, path: Path) -> bool:
        return Path(self.path).is_dir() and covers(self.path, path)

    def _contents(self, table: Table) -> Iterator[bytes]:
        return (text.encode() for text in self._texts_of_documents(_texts(table, field=self.field)))

    def _texts_of_documents(self, rows: Iterator[str]) -> Iterator[str]:
        return rows


def load_splits(path: str, name: str | None = None) -> Mapping[str, Table]:
    """Load a data set of the Hugging Face hub, or a local directory in one of its formats.

    Raises:
        UsageError: The data set does not exist, or lacks the split train.
    """
    from datasets import load_dataset  # takes a second

    try:
        splits: Mapping[str, Table] = load_dataset(path, name)
    except Exception as error:  # a data set may raise anything
        raise UsageError(f"cannot load the data set {path!r} with {name=}: {error}") from error
    if "train" not in splits:
        raise UsageError(f"the data set {path!r} has no split 'train', only {sorted(splits)}")
    return splits


def _texts(table: Table, *, field: str) -> Iterator[str]:
    """The column ``field`` of a table; a null becomes an empty text.

    Raises:
        UsageError: The column is missing, or does not hold text.
    """
    require_column(table, field)
    for batch in table.select_columns(field).iter(batch_size=ROWS):
        for value in batch[field]:
            if not isinstance(value, str | None):
                raise UsageError(f"column {field=} holds {type(value).__name__}, not text{_date_hint(value)}")
            yield value or ""


def _date_hint(value: object) -> str:
    if isinstance(value, date):
        return ": datasets converts texts that look like dates; read the files with the corpus Files instead"
    return ""


def require_column(table: Table, field: str) -> None:
    """Raise a ``UsageError`` if a table lacks this column."""
    columns = table.column_names or list(next(iter(table), {field: ""}))
    if field not in columns:
        raise UsageError(f"the data set has no column {field=}, only {sorted(columns)}")
