"""Documents, and the corpora that come with Python.

A corpus streams its documents and never holds all of them. Its :meth:`~Corpus.identity` says what the documents depend
on without reading them: a second run with the same identity reuses the packed corpus of the first. ``files.py`` has the
corpora that are read from disk or from the Hugging Face hub.
"""

import os
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from memformer_pl.errors import UsageError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


class Document(NamedTuple):
    """A text that is read from its first byte to its last, independently of every other document."""

    content: bytes
    """The bytes as they were found: nothing is decoded, stripped or translated."""
    name: str
    """Where it was found, for error messages."""
    split: str = "train"
    """One of ``SPLITS``. A split that a corpus does not bring is taken from ``train``, see ``packing/splits.py``."""
    prompt_length: int = 0
    """Bytes at the beginning that are read but not predicted. A token ends there."""
    answers: tuple[tuple[int, int], ...] = ()
    """Where behind the prompt the bytes lie that are predicted: begin and end of each stretch, in order. Tokens end
    there. By default, all that follows the prompt is predicted.
    """

    def text(self) -> str:
        """Decode the content.

        Raises:
            UsageError: The content is not UTF-8.
        """
        try:
            return self.content.decode()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{self.name} is not UTF-8: byte {self.content[error.start]:#04x} at offset {error.start}; "
                "convert the file, or use the tokenizer Bytes, which reads any file"
            ) from None


class Corpus(ABC):
    """A stream of documents that can be read again, in the same order."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield the documents one at a time."""

    @abstractmethod
    def identity(self) -> Mapping[str, object]:
        """Return what the documents depend on, ready for JSON, without reading them: equal identities mean equal
        documents.
        """

    def would_read(self, path: Path) -> bool:
        """Whether this file is part of the corpus, or would be if it existed. Nothing else may be written there."""
        del path
        return False


class Pydoc(Corpus):
    """The reference topics that ship with CPython: 79 documents, 0.46 MB of English prose about Python. No download."""

    def documents(self) -> Iterator[Document]:
        """Yield the topics, in the order of their names."""
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield Document(topics[name].encode(), name=f"pydoc topic {name!r}")

    def identity(self) -> Mapping[str, object]:
        """The Python release, which determines the topics."""
        return {"corpus": "Pydoc", "python": platform.python_version()}


class Stdlib(Corpus):
    """The sources of Python's standard library: about 700 documents, 11 MB. No download.

    The documents are long, and names recur far back. Left out are tests, installed packages, the topics of
    :class:`Pydoc`, and files that describe the build of one machine.
    """

    left_out = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"})

    def documents(self) -> Iterator[Document]:
        """Yield the sources, sorted by path."""
        for path in self._paths():
            yield Document(path.read_bytes(), name=str(path))

    def identity(self) -> Mapping[str, object]:
        """The Python release, and the path and size of every source."""
        root = self._root()
        sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in self._paths()}
        return {"corpus": "Stdlib", "python": platform.python_version(), "sizes": sizes}

    def _paths(self) -> list[Path]:
        found: list[Path] = []
        for folder, folders, names in os.walk(self._root()):
            folders[:] = [name for name in folders if name not in self.left_out and not name.startswith("config-")]
            sources = (name for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata"))
            found.extend(Path(folder, name) for name in sources)
        return sorted(found, key=Path.as_posix)

    def _root(self) -> Path:
        return Path(sysconfig.get_path("stdlib"))
