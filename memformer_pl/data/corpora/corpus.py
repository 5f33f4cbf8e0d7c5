"""Where documents come from.

A corpus streams its documents and never holds them all. What it is, without reading it, is its
:meth:`~Corpus.identity`: a second run with the same identity reuses what the first one packed. Here are the corpora
that come with Python; ``files.py`` has those that are read from disk or from the Hugging Face hub.
"""

import os
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from memformer_pl.errors import UsageError

SPLITS = ("train", "validation", "test")


class Document(NamedTuple):
    """A text that is read from its first byte to its last, and remembers nothing of any other."""

    content: bytes
    """As it was found: nothing is decoded, stripped or translated before a tokenizer asks for text."""
    name: str
    """Where it was found, for error messages."""
    split: str = "train"
    """One of ``SPLITS``. Splits that a corpus does not bring are cut from ``train``, see ``splits.py``."""
    prompt_length: int = 0
    """Bytes at its beginning that are only read: what stands behind them is to be predicted. A token ends there."""

    def text(self) -> str:
        """The content as text.

        Raises:
            UsageError: It is not UTF-8.
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
        """Each document, one at a time."""

    @abstractmethod
    def identity(self) -> Mapping[str, object]:
        """What the documents depend on, ready for JSON, without reading them: equal identities mean equal documents."""

    def would_read(self, path: Path) -> bool:
        """Whether a file is read, or would be if it were there: nothing else may be written to such a place."""
        del path
        return False


class Pydoc(Corpus):
    """The reference topics that ship with CPython: 79 documents, 0.46 MB of English prose on Python. No download."""

    def documents(self) -> Iterator[Document]:
        """Topics by name."""
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield Document(topics[name].encode(), name=f"pydoc topic {name!r}")

    def identity(self) -> Mapping[str, object]:
        """The release of Python, which the topics come with."""
        return {"corpus": "Pydoc", "python": platform.python_version()}


class Stdlib(Corpus):
    """The standard library's own Python sources: about 700 documents, 11 MB. No download.

    Long documents in which names recur far back. Left out: tests, installed packages, the topics of :class:`Pydoc`, and
    what describes one machine's build.
    """

    left_out = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"})

    def documents(self) -> Iterator[Document]:
        """Sources by path."""
        for path in self._paths():
            yield Document(path.read_bytes(), name=str(path))

    def identity(self) -> Mapping[str, object]:
        """The release of Python, and the name and size of every source."""
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
