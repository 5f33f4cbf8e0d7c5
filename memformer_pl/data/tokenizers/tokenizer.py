"""Tokenizers: from text to token numbers and back. Here is the one of bytes; ``subwords.py`` has those that learn."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import SupportsInt

import numpy as np
from jaxtyping import Integer

from memformer_pl.data.corpora.corpus import Document
from memformer_pl.data.tokenizers.alignment import Aligned, missing
from memformer_pl.data.tokenizers.pieces import BytesOfTokens, Characters
from memformer_pl.errors import UsageError


class Tokenizer(ABC):
    """Text to token numbers and back. One that learns does so once, while a corpus is packed, and is kept with it."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token numbers are below this. Known before anything is learned."""

    @abstractmethod
    def identity(self) -> Mapping[str, object]:
        """What the token numbers depend on besides the documents, ready for JSON."""

    @abstractmethod
    def encode_documents(self, documents: Sequence[Document]) -> list[Integer[np.ndarray, " tokens"]]:
        """The token numbers of each document.

        Raises:
            UsageError: The tokenizer reads text and a document is not UTF-8.
        """

    @abstractmethod
    def decode(self, tokens: Iterable[SupportsInt]) -> str:
        """The text of any tokens, to be shown to people: bytes that are no UTF-8 become the replacement character."""

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for by itself; empty for a number that is no token."""
        return self.decode([token]).encode()

    def written(self) -> str | None:
        """All of it in a word or in JSON, for ``subwords.from_written``; None if more than that is needed."""
        return None

    def encode(self, text: str) -> Integer[np.ndarray, " tokens"]:
        """The token numbers of a text."""
        return self.encode_documents([Document(text.encode(), name="text")])[0]

    def encode_blocks(self, blocks: Iterable[bytes], *, name: str) -> Iterator[Integer[np.ndarray, " _"]]:
        """The token numbers that :meth:`encode_documents` gives a document, while no more than a piece of it is held.

        Raises:
            UsageError: As there.
        """
        yield self.encode_documents([Document(b"".join(blocks), name=name)])[0]

    def align_blocks(self, blocks: Iterable[bytes], *, name: str) -> Iterator[Aligned]:
        """What :meth:`encode_blocks` gives, with the bytes of each token: together they are the document.

        Raises:
            UsageError: As there; or the bytes of the tokens are not those of the document.
        """
        document = Document(b"".join(blocks), name=name)
        (tokens,) = self.encode_documents([document])
        own = [self.bytes_of(token) for token in tokens.tolist()]
        if b"".join(own) != document.content:
            raise UsageError(
                f"the bytes of the tokens of {name} are not its own: give {type(self).__name__} a method "
                "align_blocks that says which they are"
            )
        yield Aligned(tokens, np.array(list(map(len, own)), dtype=np.int64), document.content)

    def lost(self, documents: Sequence[Document], encoded: Sequence[Integer[np.ndarray, " _"]]) -> list[int]:
        """How many bytes of each document do not come back from its tokens, see :func:`~.alignment.missing`.

        Args:
            documents: As they were found.
            encoded: The tokens of each.
        """
        texts = (document.content.decode(errors="replace") for document in documents)
        return [missing(text, self.decode(tokens)) for text, tokens in zip(texts, encoded, strict=True)]

    def bytes_of_all(self, tokens: Integer[np.ndarray, " tokens"]) -> bytes:
        """The document that tokens come from, as far as it comes back."""
        return self.decode(tokens).encode()

    def characters(self) -> Characters:
        """Makes text of tokens as they come."""
        return BytesOfTokens(self.bytes_of)

    def train(self, documents: Iterable[Document]) -> None:
        """Learn from training documents. A tokenizer with nothing to learn does not look at them."""
        del documents

    def save(self, folder: Path) -> None:
        """Write what was learned into a folder."""
        del folder

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote."""
        del folder


class Bytes(Tokenizer):
    """A token is a byte, whatever the file: 256 tokens, lossless, nothing to learn."""

    vocab_size = 256

    def identity(self) -> Mapping[str, object]:
        return {"tokenizer": "Bytes"}

    def encode_documents(self, documents: Sequence[Document]) -> list[Integer[np.ndarray, " tokens"]]:
        return [np.frombuffer(document.content, dtype=np.uint8) for document in documents]

    def encode_blocks(self, blocks: Iterable[bytes], *, name: str) -> Iterator[Integer[np.ndarray, " _"]]:
        del name
        yield from (np.frombuffer(block, dtype=np.uint8) for block in blocks)

    def align_blocks(self, blocks: Iterable[bytes], *, name: str) -> Iterator[Aligned]:
        for tokens in self.encode_blocks(blocks, name=name):
            yield Aligned(tokens, np.ones(len(tokens), dtype=np.int64), tokens.tobytes())

    def lost(self, documents: Sequence[Document], encoded: Sequence[Integer[np.ndarray, " _"]]) -> list[int]:
        """Nothing: the tokens are the bytes."""
        del encoded
        return [0] * len(documents)

    def bytes_of_all(self, tokens: Integer[np.ndarray, " tokens"]) -> bytes:
        return tokens.astype(np.uint8).tobytes()

    def decode(self, tokens: Iterable[SupportsInt]) -> str:
        return bytes(int(token) for token in tokens).decode(errors="replace")

    def bytes_of(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def written(self) -> str | None:
        return "Bytes" if type(self) is Bytes else None  # a user's own may read bytes in another way


class GreyValues(Bytes):
    """A token is the grey value of a pixel: a byte below ``values``. People are shown numbers.

    Args:
        values: How many there are; at most 256.
    """

    def __init__(self, *, values: int = 256) -> None:
        if not 1 <= values <= 256:
            raise UsageError(f"values must be 1 to 256, since a pixel is a byte, got {values}")
        self.vocab_size = values

    def identity(self) -> Mapping[str, object]:
        return {"tokenizer": "GreyValues", "values": self.vocab_size}

    def encode_documents(self, documents: Sequence[Document]) -> list[Integer[np.ndarray, " tokens"]]:
        images = super().encode_documents(documents)
        for document, pixels in zip(documents, images, strict=True):
            if pixels.size and pixels.max() >= self.vocab_size:
                raise UsageError(f"{document.name} has a pixel of {pixels.max()}, but values={self.vocab_size}")
        return images

    def encode_blocks(self, blocks: Iterable[bytes], *, name: str) -> Iterator[Integer[np.ndarray, " _"]]:
        for block in blocks:
            yield from self.encode_documents([Document(block, name=name)])

    def decode(self, tokens: Iterable[SupportsInt]) -> str:
        return "".join(f"{int(token)} " for token in tokens)

    def characters(self) -> Characters:
        return BytesOfTokens(lambda token: self.decode([token]).encode())

    def written(self) -> str | None:
        return f"GreyValues {self.vocab_size}" if type(self) is GreyValues else None
