"""Packed documents: the tokens of a split in one flat file, and where each document begins.

A folder holds, for each document: ``offsets.npy``, the position of its first token (and one more, the end of the last
document); ``bytes.npy`` and ``words.npy``, the bytes and words of its text, for bits per byte and perplexity per word;
``lost.npy``, the bytes that its tokens cannot restore; ``prompt_lengths.npy``, the tokens at its beginning that are not
predicted; ``answers.npy``, where tokens are predicted if not all behind the prompt are (only if a document has such);
and ``names.txt``, where it was found, one JSON string per line. ``tokens.bin`` holds the tokens. Reading a
slice takes a microsecond, whatever the size of the file.
"""

import json
from array import array
from collections.abc import Collection, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Integer

TOKENS, OFFSETS, BYTES, WORDS = "tokens.bin", "offsets.npy", "bytes.npy", "words.npy"
LOST, PROMPT_LENGTHS, ANSWERS, NAMES = "lost.npy", "prompt_lengths.npy", "answers.npy", "names.txt"
SPACES = np.frombuffer(b" \t\n\v\f\r", dtype=np.uint8)


class Summary(NamedTuple):
    """Contents of a folder in numbers, ready for JSON."""

    documents: int
    tokens: int
    bytes: int
    fingerprint: str
    """Hash of the tokens, of the lengths of documents and prompts, and of the answers."""
    lost: int
    """Bytes that cannot be restored from the tokens."""
    without_tokens: int
    """Documents left out because the tokenizer finds no token in them."""


class PackedDocuments:
    """The documents of one split.

    Args:
        tokens: Token numbers of all documents, one after another.
        offsets: Where each document begins, and where the last one ends.
        bytes: Bytes of the text of each document.
        words: Words of each text, as :func:`count_words` counts them; 0 if there is no text.
        fingerprint: Hash of the tokens, of the lengths of documents and prompts, and of the answers.
        prompt_lengths: Tokens at the beginning of each document that are not predicted; by default none.
        answers: Positions in ``tokens`` that are predicted, ascending, of documents where not all behind the prompt is.
        lost: Bytes of each document that cannot be restored from its tokens; by default none.
        names: File with the name of each document, if any.
    """

    def __init__(
        self,
        *,
        tokens: Integer[np.ndarray, " tokens"],
        offsets: Int64[np.ndarray, " boundaries"],
        bytes: Int64[np.ndarray, " documents"],
        words: Int64[np.ndarray, " documents"],
        fingerprint: str,
        prompt_lengths: Int64[np.ndarray, " documents"] | None = None,
        answers: Int64[np.ndarray, " answers"] | None = None,
        lost: Int64[np.ndarray, " documents"] | None = None,
        names: Path | None = None,
    ) -> None:
        self.tokens = tokens
        self.offsets = offsets
        self.bytes = bytes
        self.words = words
        self.fingerprint = fingerprint
        self.prompt_lengths = np.zeros_like(bytes) if prompt_lengths is None else prompt_lengths
        self.answers = np.empty(0, dtype=np.int64) if answers is None else answers
        self.lost = np.zeros_like(bytes) if lost is None else lost
        self._names = names

    @classmethod
    def from_arrays(cls, documents: Sequence[Integer[np.ndarray, " _"]]) -> "PackedDocuments":
        """Build documents from token numbers in memory; a token counts as a byte."""
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        tokens = np.concatenate(documents) if documents else np.empty(0, dtype=np.int64)
        offsets = _offsets(lengths)
        fingerprint = blake2b(tokens.tobytes() + offsets.tobytes(), digest_size=16).hexdigest()
        return cls(tokens=tokens, offsets=offsets, bytes=lengths, words=np.zeros_like(lengths), fingerprint=fingerprint)

    @classmethod
    def open(cls, folder: Path, *, dtype: str, fingerprint: str) -> "PackedDocuments":
        """Open a folder that :class:`DocumentWriter` wrote. Everything stays on disk until it is used."""
        offsets = _mapped(folder / OFFSETS)
        # an empty file cannot be mapped
        tokens = np.memmap(folder / TOKENS, dtype=dtype, mode="r") if offsets[-1] else np.empty(0, dtype=dtype)
        return cls(
            tokens=tokens,
            offsets=offsets,
            bytes=_mapped(folder / BYTES),
            words=_mapped(folder / WORDS),
            fingerprint=fingerprint,
            prompt_lengths=_mapped(folder / PROMPT_LENGTHS),
            answers=_mapped(folder / ANSWERS) if (folder / ANSWERS).is_file() else None,
            lost=_mapped(folder / LOST),
            names=folder / NAMES,
        )

    def __len__(self) -> int:
        return len(self.bytes)

    def document(self, index: int) -> Integer[np.ndarray, " length"]:
        """The token numbers of a document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def names(self, indices: Collection[int]) -> dict[int, str]:
        """Where these documents were found; empty for documents made in memory."""
        if self._names is None or not self._names.is_file():
            return {}
        with self._names.open() as lines:
            return {index: json.loads(line) for index, line in enumerate(lines) if index in indices}

    @property
    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    @cached_property
    def has_answers(self) -> Bool[np.ndarray, " documents"]:
        """Whether only the answers of a document are predicted, and not all that follows its prompt."""
        return np.diff(np.searchsorted(self.answers, self.offsets)) > 0

    def are_answers(self, positions: Int64[np.ndarray, "*shape"]) -> Bool[np.ndarray, "*shape"]:
        """Whether the tokens at these positions of ``tokens`` are answers."""
        if not self.answers.size:
            return np.zeros(positions.shape, dtype=bool)
        found = np.searchsorted(self.answers, positions).clip(max=self.answers.size - 1)
        return np.asarray(self.answers[found] == positions)

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes per token, which converts nats per token into bits per byte."""
        return float(self.bytes.sum()) / max(len(self.tokens), 1)

    @cached_property
    def lost_share(self) -> float:
        """Share of all bytes that cannot be restored from the tokens."""
        return float(self.lost.sum()) / max(float(self.bytes.sum()), 1.0)


class DocumentWriter:
    """Context manager that writes documents into a folder, one at a time. Documents without tokens are dropped.

    Args:
        folder: The folder to create.
        dtype: Type of the token numbers.
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
        self._prompt_lengths = array("q")
        self._answers = array("q")
        self._lost = array("q")
        self._tokens = 0
        self._words = array("q")
        self._without_tokens = 0

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._names.close()

    def add(
        self,
        tokens: Integer[np.ndarray, " tokens"],
        *,
        text: bytes,
        name: str,
        prompt_length: int = 0,
        answers: Sequence[tuple[int, int]] = (),
        lost: int = 0,
    ) -> None:
        """Append a document with this text, of which ``lost`` bytes cannot be restored from its tokens.

        ``answers`` are begin and end, in tokens of the document, of what is predicted, if not all behind the prompt is.
        """
        if not len(tokens):
            self._without_tokens += 1
        else:
            packed = tokens.astype(self.dtype).tobytes()
            self._file.write(packed)
            self._hash.update(packed)
            for begin, end in answers:
                self._answers.extend(range(self._tokens + begin, self._tokens + end))
            self._tokens += len(tokens)
            self._lengths.append(len(tokens))
            self._bytes.append(len(text))
            self._words.append(count_words(text))
            self._prompt_lengths.append(prompt_length)
            self._lost.append(lost)
            self._names.write(f"{json.dumps(name)}\n")

    def finish(self) -> Summary:
        """Write the offsets, and return a summary of the folder."""
        offsets, prompt_lengths = (
            _offsets(np.array(self._lengths, dtype=np.int64)),
            np.array(self._prompt_lengths, dtype=np.int64),
        )
        self._hash.update(offsets.tobytes())
        if prompt_lengths.any():  # without prompts, the fingerprint covers tokens and lengths only
            self._hash.update(prompt_lengths.tobytes())
        if self._answers:
            answers = np.array(self._answers, dtype=np.int64)
            self._hash.update(answers.tobytes())
            np.save(self.folder / ANSWERS, answers)
        np.save(self.folder / OFFSETS, offsets)
        np.save(self.folder / PROMPT_LENGTHS, prompt_lengths)
        np.save(self.folder / LOST, np.array(self._lost, dtype=np.int64))
        np.save(self.folder / BYTES, np.array(self._bytes, dtype=np.int64))
        np.save(self.folder / WORDS, np.array(self._words, dtype=np.int64))
        return Summary(
            documents=len(self._lengths),
            tokens=int(offsets[-1]),
            bytes=sum(self._bytes),
            fingerprint=self._hash.hexdigest(),
            lost=sum(self._lost),
            without_tokens=self._without_tokens,
        )


def count_words(text: bytes) -> int:
    """Count words as WikiText-103 does: everything between ASCII white space, and each end of a line.

    Published perplexities per word use this count: in WikiText-103 the end of a line is a token to be predicted.
    """
    characters = np.frombuffer(text, dtype=np.uint8)
    space = np.concatenate(([True], np.isin(characters, SPACES)))
    return int((space[:-1] & ~space[1:]).sum() + (characters == ord("\n")).sum())


def _mapped(path: Path) -> Int64[np.ndarray, " _"]:
    """The array in a file; what is written into it stays in memory."""
    return np.asarray(np.load(path, mmap_mode="c"))


def _offsets(lengths: Int64[np.ndarray, " documents"]) -> Int64[np.ndarray, " boundaries"]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
