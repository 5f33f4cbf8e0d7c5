"""Tokenizers of the library ``tokenizers``: they read text, and are kept as ``tokenizer.json``."""

import re
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
from memformer_pl.data.streams import PIECE, Characters, TextOfTokens, decoded, pieces
from memformer_pl.data.tokens import Bytes, GreyValues, Tokenizer
from memformer_pl.errors import UsageError

PIECES = 16
"""Pieces that are encoded side by side."""
EMPTY = np.empty(0, dtype=np.int64)


class SubwordTokenizer(Tokenizer):
    """What tokenizers of the library ``tokenizers`` share: they read text, and are kept as ``tokenizer.json``."""

    filename = "tokenizer.json"

    def __init__(self, model: tokenizers.Tokenizer | None = None) -> None:
        self._take(model)

    def _take(self, model: tokenizers.Tokenizer | None) -> None:
        self._model = model
        self._bytes: Mapping[int, bytes] | None = None

    @property
    def model(self) -> tokenizers.Tokenizer:
        """The tokenizer itself.

        Raises:
            RuntimeError: It has learned nothing yet.
        """
        if self._model is None:
            raise RuntimeError(f"{type(self).__name__} has learned nothing yet: train it, or pack a corpus with it")
        return self._model

    @property
    def vocab(self) -> int:
        """One more than the largest token number, which is the size unless there are gaps."""
        return max(self.model.get_vocab(with_added_tokens=True).values()) + 1

    def fingerprint(self) -> str:
        """Equal for equal tokenizers."""
        return blake2b(self.model.to_str().encode(), digest_size=16).hexdigest()

    def encode_documents(self, documents: Sequence[Document]) -> list[Integer[np.ndarray, " tokens"]]:
        model, cut = self.model, [list(pieces([document.text()])) for document in documents]
        encoded = self._encode(model, list(chain(*cut)))
        try:
            return [np.concatenate([EMPTY, *islice(encoded, len(own))]) for own in cut]
        except Exception as error:  # the library raises nothing more specific
            first = documents[0].name
            raise UsageError(f"the tokenizer cannot read {first} or a document after it: {error}") from error

    def encode_blocks(self, blocks: Iterable[bytes], *, name: str) -> Iterator[Integer[np.ndarray, " _"]]:
        for piece in pieces(decoded(blocks, name=name)):
            yield from self._encode(self.model, [piece])

    def decode(self, tokens: Iterable[SupportsInt]) -> str:
        return self.model.decode([int(token) for token in tokens], skip_special_tokens=False)

    def _encode(self, model: tokenizers.Tokenizer, pieces: Sequence[str]) -> Iterator[Integer[np.ndarray, " _"]]:
        for start in range(0, len(pieces), PIECES):
            batch = model.encode_batch_fast(pieces[start : start + PIECES], add_special_tokens=False)
            yield from (np.array(encoding.ids, dtype=np.int64) for encoding in batch)

    def save(self, folder: Path) -> None:
        self.model.save(str(folder / self.filename))

    def load(self, folder: Path) -> None:
        self._take(_read(folder / self.filename))

    def bytes_of(self, token: int) -> bytes:
        if self._bytes is None:
            self._bytes = _bytes_of_all(self.model)
        return self._bytes.get(token, b"")

    def characters(self) -> Characters:
        return super().characters() if _is_of_bytes(self.model) else TextOfTokens(self.model)

    def written(self) -> str:
        return self.model.to_str()


class BytePairs(SubwordTokenizer):
    """Byte-level byte pair encoding, learned from the training split: lossless on any text, no special tokens.

    Args:
        vocab: Tokens to learn, the 256 bytes among them. A small corpus may have fewer to learn.
    """

    vocab = 2048

    def __init__(self, *, vocab: int = 2048) -> None:
        super().__init__()
        if vocab < 256:
            raise UsageError(f"vocab must be at least 256, since every byte is a token, got {vocab=}")
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
        texts: Iterator[str] = chain.from_iterable(_cut_anywhere(document.text()) for document in documents)
        model.train_from_iterator(texts, trainer=trainer)
        self._take(model)


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
            self._take(_read(self.path))
        return super().model

    def identity(self) -> Mapping[str, object]:
        return {"tokenizer": "TokenizerFile", "content": self.fingerprint()}


class WrittenTokenizer(SubwordTokenizer):
    """A tokenizer that comes with a model.

    Args:
        text: What is in a ``tokenizer.json``.
    """

    def __init__(self, *, text: str) -> None:
        super().__init__(_parsed(text, name="the tokenizer of the model"))

    def identity(self) -> Mapping[str, object]:
        return {"tokenizer": "WrittenTokenizer", "content": self.fingerprint()}


def from_written(text: str) -> Tokenizer:
    """The tokenizer whose :meth:`Tokenizer.written` this is. No code is run.

    Raises:
        UsageError: It is that of none.
    """
    if text == Bytes().written():
        return Bytes()
    if grey := re.fullmatch(r"GreyValues (\d+)", text):
        return GreyValues(values=int(grey[1]))
    return WrittenTokenizer(text=text)


def _read(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise UsageError(f"there is no tokenizer file {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{str(path)!r} is no tokenizer.json: it is not UTF-8") from error
    return _parsed(text, name=repr(str(path)))


def _parsed(text: str, *, name: str) -> tokenizers.Tokenizer:
    try:
        model = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise UsageError(f"{name} is no tokenizer.json: {error}") from error
    if not model.get_vocab(with_added_tokens=True):
        raise UsageError(f"{name} has no tokens")
    model.no_truncation()
    model.no_padding()
    return model


def _bytes_of_all(model: tokenizers.Tokenizer) -> dict[int, bytes]:
    """What every token of a byte-level tokenizer stands for; of another one, its text."""
    added = {number: token.content.encode() for number, token in model.get_added_tokens_decoder().items()}
    known = model.get_vocab(with_added_tokens=False).items()
    if not _is_of_bytes(model):
        return {number: token.encode() for token, number in known} | added
    # a byte is written as the character of its number where that can be seen, and as one above them where it cannot
    alphabet = sorted(map(ord, pre_tokenizers.ByteLevel.alphabet()))
    seen = [number for number in alphabet if number < 256]
    written = seen + sorted(set(range(256)) - set(seen))
    byte_of = {chr(number): byte for number, byte in zip(alphabet, written, strict=True)}
    return {number: bytes(byte_of[character] for character in token) for token, number in known} | added


def _is_of_bytes(model: tokenizers.Tokenizer) -> bool:
    return isinstance(model.decoder, decoders.ByteLevel)


def _cut_anywhere(text: str) -> Iterator[str]:
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))
