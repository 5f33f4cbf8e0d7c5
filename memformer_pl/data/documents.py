"""Documents as token numbers: all tokens of a split in one flat file, and where each document begins.

A folder holds ``tokens.bin``, ``offsets.npy`` (one more than there are documents), ``bytes.npy`` and ``words.npy`` (how
many bytes and words the text of each document has, for bits per byte and perplexity per word) and ``names.txt`` (where
each was found, a line of JSON for each). Reading a slice costs a microsecond, whatever the size of the file.
"""

import json
from array import array
from collections.abc import Collection, Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

TOKENS, OFFSETS, BYTES, WORDS, NAMES = "tokens.bin", "offsets.npy", "bytes.npy", "words.npy", "names.txt"
SPACES = np.frombuffer(b" \t\n\v\f\r", dtype=np.uint8)


class Summary(NamedTuple):
    """What a folder holds, in numbers that are ready for JSON."""

    documents: int
    tokens: int
    bytes: int
    fingerprint: str
    """Equal for equal tokens in equal documents."""


class PackedDocuments:
    """The documents of one split.

    Args:
        tokens: Token numbers of all documents, one after the other.
        offsets: Where each document begins, and where the last one ends.
        bytes: How many bytes the text of each document has.
        words: How many words, as :func:`count_words` counts them; 0 where there is no text.
        fingerprint: Equal for equal tokens in equal documents.
        names: File with the name of each document, if there is one.
    """

    def __init__(
        self,
        *,
        tokens: Integer[np.ndarray, " tokens"],
        offsets: Int64[np.ndarray, " boundaries"],
        bytes: Int64[np.ndarray, " documents"],
        words: Int64[np.ndarray, " documents"],
        fingerprint: str,
        names: Path | None = None,
    ) -> None:
        self.tokens = tokens
        self.offsets = offsets
        self.bytes = bytes
        self.words = words
        self.fingerprint = fingerprint
        self._names = names

    @classmethod
    def from_arrays(cls, documents: Sequence[Integer[np.ndarray, " _"]]) -> "PackedDocuments":
        """Documents that are made rather than read; a token counts as a byte."""
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        tokens = np.concatenate(documents) if documents else np.empty(0, dtype=np.int64)
        offsets = _offsets(lengths)
        fingerprint = blake2b(tokens.tobytes() + offsets.tobytes(), digest_size=16).hexdigest()
        return cls(tokens=tokens, offsets=offsets, bytes=lengths, words=np.zeros_like(lengths), fingerprint=fingerprint)

    @classmethod
    def open(cls, folder: Path, *, dtype: str, fingerprint: str) -> "PackedDocuments":
        """The documents of a folder that :class:`DocumentWriter` wrote. Tokens stay on disk until they are used."""
        offsets = np.load(folder / OFFSETS)
        # an empty file cannot be mapped
        tokens = np.memmap(folder / TOKENS, dtype=dtype, mode="r") if offsets[-1] else np.empty(0, dtype=dtype)
        return cls(
            tokens=tokens,
            offsets=offsets,
            bytes=np.load(folder / BYTES),
            words=np.load(folder / WORDS),
            fingerprint=fingerprint,
            names=folder / NAMES,
        )

    def __len__(self) -> int:
        return len(self.bytes)

    def document(self, index: int) -> Integer[np.ndarray, " length"]:
        """The token numbers of a document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def names(self, indices: Collection[int]) -> dict[int, str]:
        """Where documents were found, as far as that is known: it is not for documents from memory."""
        if self._names is None or not self._names.is_file():
            return {}
        with self._names.open() as lines:
            return {index: json.loads(line) for index, line in enumerate(lines) if index in indices}

    @property
    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a token stands for, over all documents: what turns nats per token into bits per byte."""
        return float(self.bytes.sum()) / max(len(self.tokens), 1)


class DocumentWriter:
    """Writes documents into a folder, one at a time, inside ``with``. Documents without tokens are dropped.

    Args:
        folder: Is made.
        dtype: Of the token numbers.
    """

    def __init__(self, folder: Path, *, dtype: str) -> None:
        folder.mkdir()
        self.folder = folder
        self.dtype = np.dtype(dtype)
        self._file = (folder / TOKENS).open("wb")
        self._names = (folder / NAMES).open("w")
        self._hash = blake2b(digest_size=16)
        self._lengths = array("q")
        self._bytes = array("q")
        self._words = array("q")

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._names.close()

    def add(self, tokens: Integer[np.ndarray, " tokens"], *, text: bytes, name: str) -> None:
        """Append a document with that text."""
        if len(tokens):
            packed = tokens.astype(self.dtype).tobytes()
            self._file.write(packed)
            self._hash.update(packed)
            self._lengths.append(len(tokens))
            self._bytes.append(len(text))
            self._words.append(count_words(text))
            self._names.write(f"{json.dumps(name)}\n")

    def finish(self) -> Summary:
        """Write the offsets and say what the folder holds."""
        offsets = _offsets(np.array(self._lengths, dtype=np.int64))
        self._hash.update(offsets.tobytes())
        np.save(self.folder / OFFSETS, offsets)
        np.save(self.folder / BYTES, np.array(self._bytes, dtype=np.int64))
        np.save(self.folder / WORDS, np.array(self._words, dtype=np.int64))
        return Summary(len(self._lengths), int(offsets[-1]), sum(self._bytes), self._hash.hexdigest())


def count_words(text: bytes) -> int:
    """Words of a text as WikiText-103 counts them: what stands between white space (of ASCII), and each end of a line.

    Published perplexities per word are of such words: there, an end of a line is a token to be predicted.
    """
    characters = np.frombuffer(text, dtype=np.uint8)
    space = np.concatenate(([True], np.isin(characters, SPACES)))
    return int((space[:-1] & ~space[1:]).sum() + (characters == ord("\n")).sum())


def _offsets(lengths: Int64[np.ndarray, " documents"]) -> Int64[np.ndarray, " boundaries"]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
