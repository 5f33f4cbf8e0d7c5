"""Tokenizers: from text to token numbers and back."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import SupportsInt

import numpy as np
import tokenizers
from jaxtyping import Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

from memformer_pl.data.corpora import Document

PIECE = 1 << 16
"""Characters that are encoded as one: what a tokenizer needs in memory does not grow with a document."""
PIECES = 16
"""Pieces that are encoded side by side."""
EMPTY = np.empty(0, dtype=np.int64)


class Tokenizer(ABC):
    """Text to token numbers and back. One that learns does so once, while a corpus is packed, and is kept with it."""

    @property
    @abstractmethod
    def vocab(self) -> int:
        """Token numbers are below this. Known before anything is learned."""

    @abstractmethod
    def identity(self) -> Mapping[str, object]:
        """What the token numbers depend on besides the documents, ready for JSON."""

    @abstractmethod
    def encode_documents(self, documents: Sequence[Document]) -> list[Integer[np.ndarray, " tokens"]]:
        """The token numbers of each document.

        Raises:
            ValueError: The tokenizer reads text and a document is not UTF-8.
        """

    @abstractmethod
    def decode(self, tokens: Iterable[SupportsInt]) -> str:
        """The text of any tokens, to be shown to people: bytes that are no UTF-8 become the replacement character."""

    def encode(self, text: str) -> Integer[np.ndarray, " tokens"]:
        """The token numbers of a text."""
        return self.encode_documents([Document(text.encode(), name="text")])[0]

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

    vocab = 256

    def identity(self) -> Mapping[str, object]:
        return {"tokenizer": "Bytes"}

    def encode_documents(self, documents: Sequence[Document]) -> list[Integer[np.ndarray, " tokens"]]:
        return [np.frombuffer(document.content, dtype=np.uint8) for document in documents]

    def decode(self, tokens: Iterable[SupportsInt]) -> str:
        return bytes(int(token) for token in tokens).decode(errors="replace")


class SubwordTokenizer(Tokenizer):
    """What tokenizers of the library ``tokenizers`` share: they read text, and are kept as ``tokenizer.json``."""

    filename = "tokenizer.json"

    def __init__(self) -> None:
        self._model: tokenizers.Tokenizer | None = None

    @property
    def model(self) -> tokenizers.Tokenizer:
        """The tokenizer itself.

        Raises:
            RuntimeError: It has learned nothing yet.
        """
        if self._model is None:
            raise RuntimeError(f"{type(self).__name__} has learned nothing yet: train it, or pack a corpus with it")
        return self._model

    def encode_documents(self, documents: Sequence[Document]) -> list[Integer[np.ndarray, " tokens"]]:
        model, pieces = self.model, [_pieces(document.text()) for document in documents]
        encoded = self._encode(model, list(chain(*pieces)))
        try:
            return [np.concatenate([EMPTY, *islice(encoded, len(own))]) for own in pieces]
        except Exception as error:  # the library raises nothing more specific
            first = documents[0].name
            raise ValueError(f"the tokenizer cannot read {first} or a document after it: {error}") from error

    def decode(self, tokens: Iterable[SupportsInt]) -> str:
        return self.model.decode([int(token) for token in tokens], skip_special_tokens=False)

    def _encode(self, model: tokenizers.Tokenizer, pieces: Sequence[str]) -> Iterator[Integer[np.ndarray, " _"]]:
        for start in range(0, len(pieces), PIECES):
            batch = model.encode_batch_fast(pieces[start : start + PIECES], add_special_tokens=False)
            yield from (np.array(encoding.ids, dtype=np.int64) for encoding in batch)

    def save(self, folder: Path) -> None:
        self.model.save(str(folder / self.filename))

    def load(self, folder: Path) -> None:
        self._model = _read(folder / self.filename)


class BytePairs(SubwordTokenizer):
    """Byte-level byte pair encoding, learned from the training split: lossless on any text, no special tokens.

    Args:
        vocab: Tokens to learn, the 256 bytes among them. A small corpus may have fewer to learn.
    """

    vocab = 2048

    def __init__(self, *, vocab: int = 2048) -> None:
        super().__init__()
        if vocab < 256:
            raise ValueError(f"vocab must be at least 256, since every byte is a token, got {vocab=}")
        self.vocab = vocab

    def identity(self) -> Mapping[str, object]:
        return {"tokenizer": "BytePairs", "vocab": self.vocab}

    def train(self, documents: Iterable[Document]) -> None:
        """Learn the most frequent pairs. The texts are read once, in pieces, and not kept."""
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=self.vocab, initial_alphabet=alphabet, show_progress=False)
        texts: Iterator[str] = chain.from_iterable(_pieces(document.text()) for document in documents)
        model.train_from_iterator(texts, trainer=trainer)
        self._model = model


class TokenizerFile(SubwordTokenizer):
    """A tokenizer that was made elsewhere: any ``tokenizer.json``. It is not made to truncate, pad or add tokens.

    Args:
        path: The file.
    """

    def __init__(self, *, path: str) -> None:
        super().__init__()
        self.path = Path(path).expanduser()

    @property
    def model(self) -> tokenizers.Tokenizer:
        """The tokenizer itself, read when it is first asked for."""
        if self._model is None:
            self._model = _read(self.path)
        return self._model

    @property
    def vocab(self) -> int:
        """One more than the largest token number, which is the size unless there are gaps.

        Raises:
            ValueError: There are no tokens.
        """
        numbers = self.model.get_vocab(with_added_tokens=True).values()
        if not numbers:
            raise ValueError(f"the tokenizer {str(self.path)!r} has no tokens")
        return max(numbers) + 1

    def identity(self) -> Mapping[str, object]:
        content = self.model.to_str().encode()
        return {"tokenizer": "TokenizerFile", "content": blake2b(content, digest_size=16).hexdigest()}


def _read(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ValueError(f"there is no tokenizer file {str(path)!r}")
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{str(path)!r} is no tokenizer.json: {error}") from error
    model.no_truncation()
    model.no_padding()
    return model


def _pieces(text: str) -> list[str]:
    return [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
