"""enwik8: the first 100 million bytes of a Wikipedia dump; a page is a document."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from memformer_pl.data.corpora.corpus import SPLITS, Corpus, Document
from memformer_pl.errors import UsageError

SHARES = (90, 5, 5)
"""Percent of the file for training, validation and test, the usual split."""
PAGE = re.compile(rb"(?=^  <page>\n)", re.MULTILINE)


class Enwik8(Corpus):
    """The file of Mahoney's compression benchmark (http://mattmahoney.net/dc/enwik8.zip, unpacked), byte by byte.

    The first 90 % are for training, the next 5 % for validation, the rest for test. A page is a document; a page that
    crosses the border of a split is cut there. To evaluate a split as one stream, set ``reset: never`` and
    ``evaluation_batch_size: 1``.

    Args:
        path: The unpacked file.
    """

    def __init__(self, *, path: str) -> None:
        self.path = path

    def documents(self) -> Iterator[Document]:
        """Yield the pages in order; text before the first page of a split is a document too.

        Raises:
            UsageError: The file does not exist, or is still a zip archive.
        """
        try:
            content = Path(self.path).expanduser().read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read enwik8, got path={self.path!r}: {error.strerror}") from error
        if content.startswith(b"PK"):
            raise UsageError(f"path={self.path!r} is a zip file: unpack it, and pass the file inside")
        end = 0
        for split, share in zip(SPLITS, SHARES, strict=True):
            begin, end = end, end + len(content) * share // 100 if split != SPLITS[-1] else len(content)
            for number, page in enumerate(filter(None, PAGE.split(content[begin:end]))):
                yield Document(page, name=f"{self.path}, {split} page {number}", split=split)

    def would_read(self, path: Path) -> bool:
        return path.resolve() == Path(self.path).expanduser().resolve()

    def identity(self) -> Mapping[str, object]:
        """Path, size and modification time of the file."""
        path = Path(self.path).expanduser()
        status = path.stat() if path.exists() else None
        changed = (status.st_size, status.st_mtime_ns) if status else None
        return {"corpus": "Enwik8", "path": str(path.absolute()), "changed": changed}
