"""Tokenizers of the library ``tokenizers``: they read text, and are stored as ``tokenizer.json``."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import SupportsInt

import numpy as np
import tokenizers
from jaxtyping import Integer
from tokenizers import decoders, models, pre_tokenizers, trainers

from memformer_pl.data.corpora.corpus import Document
from memformer_pl.data.tokenizers.alignment import (
    NO_TOKENS,
    Aligned,
    TokenBytes,
    count_missing_bytes,
    sizes_by_offsets,
    without_gaps,
)
from memformer_pl.data.tokenizers.pieces import PIECE, IncrementalDecoder, TextDecoder, decoded, pieces
from memformer_pl.data.tokenizers.tokenizer import Bytes, GreyValues, Symbols, Tokenizer
from memformer_pl.errors import UsageError, usage_error

PIECES = 16
"""Pieces that are encoded in parallel."""


class SubwordTokenizer(Tokenizer):
    """Base class for the library ``tokenizers``: its tokenizers read text, and are stored as ``tokenizer.json``."""

    filename = "tokenizer.json"

    def __init__(self, model: tokenizers.Tokenizer | None = None) -> None:
        self._set_model(model)

    def _set_model(self, model: tokenizers.Tokenizer | None) -> None:
        self._model = model
        self._token_bytes: TokenBytes | None = None

    @property
    def model(self) -> tokenizers.Tokenizer:
        """The underlying tokenizer.

        Raises:
            RuntimeError: It is not trained yet.
        """
        if self._model is None:
            raise RuntimeError(f"{type(self).__name__} is not trained yet: train it, or pack a corpus with it")
        return self._model

    @property
    def vocab_size(self) -> int:
        """One more than the largest token number."""
        return max(self.model.get_vocab(with_added_tokens=True).values()) + 1

    def fingerprint(self) -> str:
        """Hash of the tokenizer."""
        return blake2b(self.model.to_str().encode(), digest_size=16).hexdigest()

    @property
    def token_bytes(self) -> TokenBytes:
        """The bytes that its tokens stand for."""
        if self._token_bytes is None:
            self._token_bytes = TokenBytes(self.model)
        return self._token_bytes

    def encode_documents(self, documents: Sequence[Document]) -> list[Integer[np.ndarray, " tokens"]]:
        model, split = self.model, [list(pieces([document.text()])) for document in documents]
        with _encoding_errors(f"{documents[0].name} or a document after it" if documents else "nothing"):
            encoded = self._encode(model, list(chain(*split)))
            return [np.concatenate([NO_TOKENS, *islice(encoded, len(parts))]) for parts in split]

    def encode_blocks(self, blocks: Iterable[bytes], *, name: str) -> Iterator[Integer[np.ndarray, " _"]]:
        model = self.model
        for piece in pieces(decoded(blocks, name=name)):
            with _encoding_errors(name):
                (tokens,) = self._encode(model, [piece])
            yield tokens

    def align_blocks(self, blocks: Iterable[bytes], *, name: str) -> Iterator[Aligned]:
        return without_gaps(self._align_pieces(pieces(decoded(blocks, name=name)), name))

    def count_lost_bytes(
        self, documents: Sequence[Document], encoded: Sequence[Integer[np.ndarray, " _"]]
    ) -> list[int]:
        return self._count_lost_bytes(
            [document.text() for document in documents], [tokens.tolist() for tokens in encoded]
        )

    def decode(self, tokens: Iterable[SupportsInt]) -> str:
        return self._decode([[int(token) for token in tokens]])[0]

    def _encode(self, model: tokenizers.Tokenizer, pieces: Sequence[str]) -> Iterator[Integer[np.ndarray, " _"]]:
        for start in range(0, len(pieces), PIECES):
            batch = model.encode_batch_fast(pieces[start : start + PIECES], add_special_tokens=False)
            yield from (np.array(encoding.ids, dtype=np.int64) for encoding in batch)

    def _decode(self, batch: Sequence[list[int]]) -> list[str]:
        if self.token_bytes.joins:
            return [self.token_bytes.join(tokens).decode(errors="replace") for tokens in batch]
        texts: list[str] = self.model.decode_batch(batch, skip_special_tokens=False)
        return texts

    def _align_pieces(self, texts: Iterable[str], name: str) -> Iterator[Aligned]:
        before: list[int] = []
        for text in texts:
            part = self._align(text, name, before)
            before = part.tokens[-1:].tolist() or before
            yield part

    def _align(self, piece: str, name: str, before: list[int]) -> Aligned:
        """Encode a piece, with the bytes of each token.

        Args:
            piece: Part of a document.
            name: Name of the document.
            before: The token before the piece, so that a decoder that drops the first space of a text does not drop
                one here.
        """
        token_bytes, content = self.token_bytes, piece.encode()
        with _encoding_errors(name):
            if token_bytes.byte_level:  # nearly always, the bytes of the tokens are those of the text
                (tokens,) = self._encode(self.model, [piece])
                contents = [token_bytes.bytes[token] for token in tokens.tolist()]
                if b"".join(contents) == content:
                    return Aligned(tokens, np.array(list(map(len, contents)), dtype=np.int64), content)
            (encoding,) = self.model.encode_batch([piece], add_special_tokens=False)
        numbers, before = encoding.ids, [token for token in before if token != token_bytes.unknown]
        (lost,) = self._count_lost_bytes([self.decode(before) + piece], [before + numbers])
        sizes = sizes_by_offsets(numbers, encoding.offsets, piece, token_bytes)
        return Aligned(np.array(numbers, dtype=np.int64), sizes, content, lost)

    def _count_lost_bytes(self, texts: Sequence[str], encoded: Sequence[list[int]]) -> list[int]:
        """Bytes of each text that cannot be restored; an unknown token restores only its own name."""
        token_bytes, lost = self.token_bytes, [0] * len(texts)
        inexact = [
            index
            for index, (text, tokens) in enumerate(zip(texts, encoded, strict=True))
            if not token_bytes.byte_level or token_bytes.join(tokens) != text.encode()
        ]
        restored = self._decode([token_bytes.without_unknown(encoded[index], texts[index]) for index in inexact])
        for index, text in zip(inexact, restored, strict=True):
            lost[index] = count_missing_bytes(texts[index], text)
        return lost

    def save(self, folder: Path) -> None:
        path = str(folder / self.filename)
        with usage_error(Exception, about=f"cannot write {path!r}"):  # the library raises nothing more specific
            self.model.save(path)

    def load(self, folder: Path) -> None:
        self._set_model(_read(folder / self.filename))

    def bytes_of(self, token: int) -> bytes:
        return self.token_bytes.bytes.get(token, b"")

    def bytes_of_all(self, tokens: Integer[np.ndarray, " tokens"]) -> bytes:
        return self.token_bytes.join(tokens.tolist()) if self.token_bytes.joins else self.decode(tokens).encode()

    def incremental_decoder(self) -> IncrementalDecoder:
        return super().incremental_decoder() if self.token_bytes.joins else TextDecoder(self.model)

    def serialize(self) -> str:
        return self.model.to_str()


class BytePairs(SubwordTokenizer):
    """Byte-level byte pair encoding, learned from the training split: lossless on any text, no special tokens.

    Args:
        vocab_size: Tokens to learn, including the 256 bytes. A small corpus may yield fewer.
    """

    vocab_size = 2048

    def __init__(self, *, vocab_size: int = 2048) -> None:
        super().__init__()
        if vocab_size < 256:
            raise UsageError(f"vocab_size must be at least 256, since every byte is a token, got {vocab_size=}")
        self.vocab_size = vocab_size

    def identity(self) -> Mapping[str, object]:
        return {"tokenizer": "BytePairs", "vocab_size": self.vocab_size}

    def count_lost_bytes(
        self, documents: Sequence[Document], encoded: Sequence[Integer[np.ndarray, " _"]]
    ) -> list[int]:
        """Always 0: every byte is a token, and there is no normalization."""
        del encoded
        return [0] * len(documents)

    def train(self, documents: Iterable[Document]) -> None:
        """Learn the most frequent pairs. The texts are streamed in pieces."""
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=self.vocab_size, initial_alphabet=alphabet, show_progress=False)
        texts: Iterator[str] = chain.from_iterable(_split_anywhere(document.text()) for document in documents)
        model.train_from_iterator(texts, trainer=trainer)
        self._set_model(model)


class TokenizerFile(SubwordTokenizer):
    """Any ``tokenizer.json``. It never truncates, pads or adds special tokens.

    Args:
        path: The file.
    """

    def __init__(self, *, path: str) -> None:
        super().__init__()
        self.path = Path(path).expanduser()

    @property
    def model(self) -> tokenizers.Tokenizer:
        """The underlying tokenizer, read on first use."""
        if self._model is None:
            self._set_model(_read(self.path))
        return super().model

    def identity(self) -> Mapping[str, object]:
        return {"tokenizer": "TokenizerFile", "content": self.fingerprint()}


class SerializedTokenizer(SubwordTokenizer):
    """A tokenizer that is stored with a model.

    Args:
        text: Content of a ``tokenizer.json``.
    """

    def __init__(self, *, text: str) -> None:
        super().__init__(_parsed(text, name="the model's tokenizer"))

    def identity(self) -> Mapping[str, object]:
        return {"tokenizer": "SerializedTokenizer", "content": self.fingerprint()}


def deserialize_tokenizer(text: str) -> Tokenizer:
    """Restore a tokenizer from the result of :meth:`Tokenizer.serialize`. No code is run.

    Raises:
        UsageError: The text does not describe a tokenizer.
    """
    if text == Bytes().serialize():
        return Bytes()
    if grey := re.fullmatch(r"GreyValues (\d+)", text):
        return GreyValues(values=int(grey[1]))
    if symbols := re.fullmatch(r"Symbols (\d+)", text):
        return Symbols(vocab_size=int(symbols[1]))
    return SerializedTokenizer(text=text)


def _read(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise UsageError(f"there is no tokenizer file {str(path)!r}")
    try:
        with usage_error(OSError, about=f"cannot read {str(path)!r}"):
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{str(path)!r} is not a tokenizer.json: it is not UTF-8") from error
    return _parsed(text, name=repr(str(path)))


def _parsed(text: str, *, name: str) -> tokenizers.Tokenizer:
    try:
        model = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise UsageError(f"{name} is not a tokenizer.json: {error}") from error
    if not model.get_vocab(with_added_tokens=True):
        raise UsageError(f"{name} has no tokens")
    model.no_truncation()
    model.no_padding()
    return model


def _encoding_errors(name: str) -> AbstractContextManager[None]:
    # the library raises nothing more specific
    return usage_error(Exception, about=f"the tokenizer cannot encode {name}")


def _split_anywhere(text: str) -> Iterator[str]:
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))
