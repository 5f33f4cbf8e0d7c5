"""Corpora that are read from files or from the Hugging Face hub.

Files do not go through ``datasets``: it would turn ``\\r\\n`` into ``\\n`` and refuse bytes that are no UTF-8, where a
corpus of bytes has to be lossless. ``tables.py`` says why tables do not either.
"""

import glob
import os
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Protocol, runtime_checkable

from memformer_pl.data import tables
from memformer_pl.data.corpora import SPLITS, Corpus, Document
from memformer_pl.data.streams import blocks_of
from memformer_pl.errors import UsageError

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
    """Files on disk. A row of a ``.jsonl``, ``.json`` or ``.parquet`` is a document; so is every other file.

    Args:
        paths: Files, directories or globs, where ``**`` stands for any directories. In a directory every file is read,
            at any depth, except what is hidden. Order and repetition are of no effect.
        field: The column of a table that holds the text.
    """

    def __init__(self, *, paths: str | list[str], field: str = "text") -> None:
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        self.field = field
        if not self.paths or not all(self.paths):
            raise UsageError(f"paths must name files, directories or globs, at least one, got {paths=}")

    def documents(self) -> Iterator[Document]:
        """Documents by path, then by row.

        Raises:
            UsageError: A path is missing or matches no file, or a table has no such column or cannot be read.
        """
        for path in self._files():
            if path.suffix in tables.TABLES:
                rows = tables.contents(path, field=self.field)
                yield from (Document(content, name=f"{path}, {place}") for place, content in rows)
            else:
                yield Document(path.read_bytes(), name=str(path))

    def streams(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Name and content of each document, in blocks: of a file no more than a block is held, of a table its rows."""
        for path in self._files():
            if path.suffix in tables.TABLES:
                rows = tables.contents(path, field=self.field)
                yield from ((f"{path}, {place}", iter([content])) for place, content in rows)
            else:
                yield str(path), _read_in_blocks(path)

    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self._files())

    def identity(self) -> Mapping[str, object]:
        """Name, size and time of the last change of every file."""
        return {"corpus": "Files", "field": self.field, "files": _stamp(self._files())}

    def _files(self) -> list[Path]:
        return sorted({file for path in self.paths for file in _matches(path)})


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
        return {"corpus": type(self).__name__, **given, "files": _stamp(_below(Path(self.path)))}

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
                raise UsageError(f"column {field=} holds {type(value).__name__}, not text")
            yield value or ""


def require_column(table: Table, field: str) -> None:
    """Raise a ``UsageError`` for a table without such a column."""
    columns = table.column_names or list(next(iter(table), {field: ""}))
    if field not in columns:
        raise UsageError(f"it has no column {field=}, only {sorted(columns)}")


def _read_in_blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from blocks_of(file.read)


def _matches(path: str) -> list[Path]:
    """The files that a path stands for, absolute.

    Raises:
        UsageError: There are none.
    """
    here = Path(path).expanduser().absolute()
    if here.is_file():
        return [here]
    # Path.glob takes no absolute pattern
    found = _below(here) if here.is_dir() else list(map(Path, glob.iglob(str(here), recursive=True)))  # noqa: PTH207
    lost = [file for file in found if file.is_symlink() and not file.exists()]
    if lost:
        raise UsageError(f"{str(lost[0])!r} is a link that leads nowhere, got {path=}")
    files = [file for file in found if file.is_file()]
    if not files:
        raise UsageError(f"{_why(here)}, got {path=}")
    return files


def _why(path: Path) -> str:
    if path.is_dir():
        return "the directory has no file in it"
    return "no file matches the pattern" if glob.has_magic(str(path)) else "there is no such file or directory"


def _below(folder: Path) -> list[Path]:
    """Every file in a folder, at any depth, by path; what is hidden is left out."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files.extend(Path(parent, name) for name in names if not name.startswith("."))
    return sorted(files)


def _stamp(files: Iterable[Path]) -> str:
    """Changes when a file is added, removed, renamed or written."""
    digest = blake2b(digest_size=16)
    for file in files:
        status = file.stat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()
