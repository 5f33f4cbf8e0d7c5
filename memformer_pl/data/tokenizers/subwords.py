"""Tokenizers of the library ``tokenizers``: they read text, and are kept as ``tokenizer.json``."""

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
from memformer_pl.data.tokenizers.alignment import NO_TOKENS, Aligned, Meaning, missing, sizes_by_offsets, without_gaps
from memformer_pl.data.tokenizers.pieces import PIECE, Characters, TextOfTokens, decoded, pieces
from memformer_pl.data.tokenizers.tokenizer import Bytes, GreyValues, Tokenizer
from memformer_pl.errors import UsageError, usage_error

PIECES = 16
"""Pieces that are encoded side by side."""


class SubwordTokenizer(Tokenizer):
    """What tokenizers of the library ``tokenizers`` share: they read text, and are kept as ``tokenizer.json``."""

    filename = "tokenizer.json"

    def __init__(self, model: tokenizers.Tokenizer | None = None) -> None:
        self._take(model)

    def _take(self, model: tokenizers.Tokenizer | None) -> None:
        self._model = model
        self._meaning: Meaning | None = None

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
    def vocab_size(self) -> int:
        """One more than the largest token number, which is the size unless there are gaps."""
        return max(self.model.get_vocab(with_added_tokens=True).values()) + 1

    def fingerprint(self) -> str:
        """Equal for equal tokenizers."""
        return blake2b(self.model.to_str().encode(), digest_size=16).hexdigest()

    @property
    def meaning(self) -> Meaning:
        """What its tokens stand for."""
        if self._meaning is None:
            self._meaning = Meaning(self.model)
        return self._meaning

    def encode_documents(self, documents: Sequence[Document]) -> list[Integer[np.ndarray, " tokens"]]:
        model, cut = self.model, [list(pieces([document.text()])) for document in documents]
        with _reading(f"{documents[0].name} or a document after it" if documents else "nothing"):
            encoded = self._encode(model, list(chain(*cut)))
            return [np.concatenate([NO_TOKENS, *islice(encoded, len(own))]) for own in cut]

    def encode_blocks(self, blocks: Iterable[bytes], *, name: str) -> Iterator[Integer[np.ndarray, " _"]]:
        model = self.model
        for piece in pieces(decoded(blocks, name=name)):
            with _reading(name):
                (tokens,) = self._encode(model, [piece])
            yield tokens

    def align_blocks(self, blocks: Iterable[bytes], *, name: str) -> Iterator[Aligned]:
        return without_gaps(self._align_pieces(pieces(decoded(blocks, name=name)), name))

    def lost(self, documents: Sequence[Document], encoded: Sequence[Integer[np.ndarray, " _"]]) -> list[int]:
        return self._lost([document.text() for document in documents], [tokens.tolist() for tokens in encoded])

    def decode(self, tokens: Iterable[SupportsInt]) -> str:
        return self._decode([[int(token) for token in tokens]])[0]

    def _encode(self, model: tokenizers.Tokenizer, pieces: Sequence[str]) -> Iterator[Integer[np.ndarray, " _"]]:
        for start in range(0, len(pieces), PIECES):
            batch = model.encode_batch_fast(pieces[start : start + PIECES], add_special_tokens=False)
            yield from (np.array(encoding.ids, dtype=np.int64) for encoding in batch)

    def _decode(self, batch: Sequence[list[int]]) -> list[str]:
        if self.meaning.joins:
            return [self.meaning.join(tokens).decode(errors="replace") for tokens in batch]
        texts: list[str] = self.model.decode_batch(batch, skip_special_tokens=False)
        return texts

    def _align_pieces(self, texts: Iterable[str], name: str) -> Iterator[Aligned]:
        before: list[int] = []
        for text in texts:
            part = self._align(text, name, before)
            before = part.tokens[-1:].tolist() or before
            yield part

    def _align(self, piece: str, name: str, before: list[int]) -> Aligned:
        """A piece with its tokens.

        Args:
            piece: Of a document.
            name: Of the document.
            before: The token in front of it: a decoder that drops the first space of a text is not to drop one here.
        """
        meaning, content = self.meaning, piece.encode()
        with _reading(name):
            if meaning.of_bytes:  # the bytes of the tokens are those of the text, nearly always
                (tokens,) = self._encode(self.model, [piece])
                own = [meaning.bytes[token] for token in tokens.tolist()]
                if b"".join(own) == content:
                    return Aligned(tokens, np.array(list(map(len, own)), dtype=np.int64), content)
            (encoding,) = self.model.encode_batch([piece], add_special_tokens=False)
        numbers, before = encoding.ids, [token for token in before if token != meaning.unknown]
        (lost,) = self._lost([self.decode(before) + piece], [before + numbers])
        sizes = sizes_by_offsets(numbers, encoding.offsets, piece, meaning)
        return Aligned(np.array(numbers, dtype=np.int64), sizes, content, lost)

    def _lost(self, texts: Sequence[str], encoded: Sequence[list[int]]) -> list[int]:
        """Bytes of each text that do not come back; an unknown token brings nothing back but its own name."""
        meaning, lost = self.meaning, [0] * len(texts)
        places = [
            place
            for place, (text, tokens) in enumerate(zip(texts, encoded, strict=True))
            if not meaning.of_bytes or meaning.join(tokens) != text.encode()
        ]
        again = self._decode([meaning.known(encoded[place], texts[place]) for place in places])
        for place, text in zip(places, again, strict=True):
            lost[place] = missing(texts[place], text)
        return lost

    def save(self, folder: Path) -> None:
        path = str(folder / self.filename)
        with usage_error(Exception, about=f"cannot write {path!r}"):  # the library raises nothing more specific
            self.model.save(path)

    def load(self, folder: Path) -> None:
        self._take(_read(folder / self.filename))

    def bytes_of(self, token: int) -> bytes:
        return self.meaning.bytes.get(token, b"")

    def bytes_of_all(self, tokens: Integer[np.ndarray, " tokens"]) -> bytes:
        return self.meaning.join(tokens.tolist()) if self.meaning.joins else self.decode(tokens).encode()

    def characters(self) -> Characters:
        return super().characters() if self.meaning.joins else TextOfTokens(self.model)

    def written(self) -> str:
        return self.model.to_str()


class BytePairs(SubwordTokenizer):
    """Byte-level byte pair encoding, learned from the training split: lossless on any text, no special tokens.

    Args:
        vocab_size: Tokens to learn, the 256 bytes among them. A small corpus may have fewer to learn.
    """

    vocab_size = 2048

    def __init__(self, *, vocab_size: int = 2048) -> None:
        super().__init__()
        if vocab_size < 256:
            raise UsageError(f"vocab_size must be at least 256, since every byte is a token, got {vocab_size=}")
        self.vocab_size = vocab_size

    def identity(self) -> Mapping[str, object]:
        return {"tokenizer": "BytePairs", "vocab_size": self.vocab_size}

    def lost(self, documents: Sequence[Document], encoded: Sequence[Integer[np.ndarray, " _"]]) -> list[int]:
        """Nothing: every byte is a token, and the text is not changed before."""
        del encoded
        return [0] * len(documents)

    def train(self, documents: Iterable[Document]) -> None:
        """Learn the most frequent pairs. The texts are read once, in pieces, and not kept."""
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=self.vocab_size, initial_alphabet=alphabet, show_progress=False)
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
        with usage_error(OSError, about=f"cannot read {str(path)!r}"):
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


def _reading(name: str) -> AbstractContextManager[None]:
    # the library raises nothing more specific
    return usage_error(Exception, about=f"the tokenizer cannot read {name}")


def _cut_anywhere(text: str) -> Iterator[str]:
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))
