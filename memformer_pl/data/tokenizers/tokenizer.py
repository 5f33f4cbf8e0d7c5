"""The interface of tokenizers, and the tokenizers of bytes; ``subwords.py`` has those that learn."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, SupportsInt

import numpy as np
from jaxtyping import Integer

from memformer_pl.data.corpora.corpus import Document
from memformer_pl.data.tokenizers.alignment import Aligned, count_missing_bytes
from memformer_pl.data.tokenizers.pieces import BytesDecoder, IncrementalDecoder
from memformer_pl.errors import UsageError, require_sizes


class Tokenizer(ABC):
    """Converts text to token numbers and back. A tokenizer that learns does so once, when a corpus is packed."""

    reads_text: ClassVar[bool] = True
    """Whether documents are text, and not numbers."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token numbers. Known before training."""

    @abstractmethod
    def identity(self) -> Mapping[str, object]:
        """What the token numbers depend on besides the documents, ready for JSON."""

    @abstractmethod
    def encode_documents(self, documents: Sequence[Document]) -> list[Integer[np.ndarray, " tokens"]]:
        """Return the token numbers of each document.

        Raises:
            UsageError: The tokenizer reads text, and a document is not UTF-8.
        """

    @abstractmethod
    def decode(self, tokens: Iterable[SupportsInt]) -> str:
        """Return the text of any tokens, for display: invalid UTF-8 becomes the replacement character."""

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a single token stands for; empty for a number that is not a token."""
        return self.decode([token]).encode()

    def serialize(self) -> str | None:
        """Describe the tokenizer as text for ``subwords.deserialize_tokenizer``; None if that is not possible."""
        return None

    def encode(self, text: str) -> Integer[np.ndarray, " tokens"]:
        """Return the token numbers of a text."""
        return self.encode_documents([Document(text.encode(), name="text")])[0]

    def encode_blocks(self, blocks: Iterable[bytes], *, name: str) -> Iterator[Integer[np.ndarray, " _"]]:
        """Yield the token numbers of a document, as :meth:`encode_documents` gives them, holding only a piece of it in
        memory.

        Raises:
            UsageError: The tokenizer reads text, and the document is not UTF-8.
        """
        yield self.encode_documents([Document(b"".join(blocks), name=name)])[0]

    def align_blocks(self, blocks: Iterable[bytes], *, name: str) -> Iterator[Aligned]:
        """Like :meth:`encode_blocks`, with the bytes of each token: together they are the document.

        Raises:
            UsageError: As :meth:`encode_blocks`, or the bytes of the tokens do not join to the document.
        """
        document = Document(b"".join(blocks), name=name)
        (tokens,) = self.encode_documents([document])
        contents = [self.bytes_of(token) for token in tokens.tolist()]
        if b"".join(contents) != document.content:
            raise UsageError(
                f"the bytes of the tokens of {name} do not join to the document: override "
                f"{type(self).__name__}.align_blocks to return the bytes of each token"
            )
        yield Aligned(tokens, np.array(list(map(len, contents)), dtype=np.int64), document.content)

    def count_lost_bytes(
        self, documents: Sequence[Document], encoded: Sequence[Integer[np.ndarray, " _"]]
    ) -> list[int]:
        """Bytes of each document that its tokens cannot restore, see :func:`~.alignment.count_missing_bytes`.

        Args:
            documents: The original documents.
            encoded: The tokens of each document.
        """
        texts = (document.content.decode(errors="replace") for document in documents)
        return [count_missing_bytes(text, self.decode(tokens)) for text, tokens in zip(texts, encoded, strict=True)]

    def bytes_of_all(self, tokens: Integer[np.ndarray, " tokens"]) -> bytes:
        """The document that these tokens come from, as far as it can be restored."""
        return self.decode(tokens).encode()

    def incremental_decoder(self) -> IncrementalDecoder:
        """Return a decoder that turns tokens into text one at a time."""
        return BytesDecoder(self.bytes_of)

    def train(self, documents: Iterable[Document]) -> None:
        """Learn from training documents. A tokenizer with nothing to learn ignores them."""
        del documents

    def save(self, folder: Path) -> None:
        """Write what was learned into a folder."""
        del folder

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote."""
        del folder


class Bytes(Tokenizer):
    """A token is a byte, for any file: 256 tokens, lossless, nothing to learn."""

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

    def count_lost_bytes(
        self, documents: Sequence[Document], encoded: Sequence[Integer[np.ndarray, " _"]]
    ) -> list[int]:
        """Always 0: the tokens are the bytes."""
        del encoded
        return [0] * len(documents)

    def bytes_of_all(self, tokens: Integer[np.ndarray, " tokens"]) -> bytes:
        return tokens.astype(np.uint8).tobytes()

    def decode(self, tokens: Iterable[SupportsInt]) -> str:
        return bytes(int(token) for token in tokens).decode(errors="replace")

    def bytes_of(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def serialize(self) -> str | None:
        return "Bytes" if type(self) is Bytes else None  # a subclass may encode bytes differently


class GreyValues(Bytes):
    """A token is the grey value of a pixel: a byte below ``values``. Decodes to numbers.

    Args:
        values: Number of grey values; at most 256.
    """

    reads_text = False

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

    def incremental_decoder(self) -> IncrementalDecoder:
        return BytesDecoder(lambda token: self.decode([token]).encode())

    def serialize(self) -> str | None:
        return f"GreyValues {self.vocab_size}" if type(self) is GreyValues else None


class Symbols(Tokenizer):
    """A token is a number of two bytes, the lower one first, below ``vocab_size``: for corpora made of numbers, such as
    ``MQAR``. Decodes to numbers.

    Args:
        vocab_size: Number of tokens; at most 65,536.
    """

    reads_text = False

    def __init__(self, *, vocab_size: int = 8192) -> None:
        require_sizes(vocab_size=vocab_size, most=1 << 16)
        self._vocab_size = vocab_size

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def identity(self) -> Mapping[str, object]:
        return {"tokenizer": "Symbols", "vocab_size": self.vocab_size}

    def encode_documents(self, documents: Sequence[Document]) -> list[Integer[np.ndarray, " tokens"]]:
        encoded = []
        for document in documents:
            if len(document.content) % 2:
                raise UsageError(
                    f"{document.name} has {len(document.content)} bytes, but a token of Symbols has two: use the "
                    "tokenizer Bytes for other files"
                )
            symbols = np.frombuffer(document.content, dtype="<u2")
            if symbols.size and symbols.max() >= self.vocab_size:
                raise UsageError(
                    f"{document.name} has the token {symbols.max()}, but vocab_size={self.vocab_size}: give the "
                    "tokenizer the vocab_size of the corpus"
                )
            encoded.append(symbols)
        return encoded

    def count_lost_bytes(
        self, documents: Sequence[Document], encoded: Sequence[Integer[np.ndarray, " _"]]
    ) -> list[int]:
        """Always 0: the tokens are the bytes, two at a time."""
        del encoded
        return [0] * len(documents)

    def decode(self, tokens: Iterable[SupportsInt]) -> str:
        return "".join(f"{int(token)} " for token in tokens)

    def bytes_of(self, token: int) -> bytes:
        return int(token).to_bytes(2, "little") if token < self.vocab_size else b""

    def bytes_of_all(self, tokens: Integer[np.ndarray, " tokens"]) -> bytes:
        return tokens.astype("<u2").tobytes()

    def incremental_decoder(self) -> IncrementalDecoder:
        return BytesDecoder(lambda token: self.decode([token]).encode())

    def serialize(self) -> str | None:
        return f"Symbols {self.vocab_size}" if type(self) is Symbols else None
