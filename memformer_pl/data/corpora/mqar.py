"""Multi-query associative recall (MQAR): many pairs of a key and a value first, then each key once, anywhere behind."""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Int64

from memformer_pl.data.corpora.corpus import Corpus, Document
from memformer_pl.errors import UsageError, require_sizes

SYMBOL = np.dtype("<u2")
"""A token of the content, as the tokenizer ``Symbols`` reads it."""
Row = tuple[int, int, int]
"""Tokens of a document, pairs that it asks for, and how many such documents."""


class MQAR(Corpus):
    """Multi-query associative recall, with the published grids of zoology (Arora et al. 2023 and 2024).

    With 2 pairs and 12 tokens a document looks like this; ``.`` is noise, and only the values behind a question are
    predicted (:attr:`Document.answers`)::

        k v  K V  . .  K V  . .  k v
        shown          asked     asked

    The keys of a document are distinct, and so are its values: the lower half of the vocabulary without 0 holds the
    keys, the upper half the values. Each key is asked once. With pairs of ``unit`` tokens, a question begins
    ``unit * g`` tokens behind what is shown; the gaps g are drawn without repetition, with a probability in proportion
    to ``(g + 1) ** (power - 1)``. Noise is drawn from the whole vocabulary, so it may hold keys and values too.

    A document is cut into segments by ``SegmentData(segment_length=...)`` and needs the tokenizer ``Symbols`` with the
    same ``vocab_size``. If ``unit`` divides the length of a segment, a question and its value lie in one segment.

    Ours: zoology's model reads noise where a value is asked for, and has the value as a label of the question's place;
    we predict tokens, so the value stands behind the question. It is asked once, so nothing leaks. Where keys are shown
    again, all that is shown stands in random order. A key of two tokens is a cell of a square grid as small as holds
    all pairs of the document, so that most tokens of keys belong to several keys.

    Args:
        trained: Training documents: rows of tokens, pairs, and how many documents. By default, the second paper's.
        tested: Held-out documents, likewise.
        vocab_size: Number of tokens.
        updates: Keys of a document that are shown again with a new value; the last value counts.
        key_length: Tokens of a key, 1 or 2; ``unit`` is one more.
        power: Exponent of the power law of the gaps; 1 makes all gaps equally likely.
        seed: Seed of all documents. Held-out documents do not depend on the training documents.

    Raises:
        UsageError: A size is out of range, a document is too short for its pairs, or the vocabulary has too few keys.
    """

    revision: ClassVar[int] = 1
    """Increases whenever the same arguments give different documents, so that earlier packs are not reused."""

    def __init__(
        self,
        *,
        trained: Sequence[Row] = (
            (64, 4, 100_000),
            (128, 8, 20_000),
            (256, 16, 20_000),
            (256, 32, 20_000),
            (256, 64, 20_000),
        ),
        tested: Sequence[Row] = (
            (64, 4, 1000),
            (64, 8, 1000),
            (64, 16, 1000),
            (128, 32, 1000),
            (256, 64, 1000),
            (512, 128, 1000),
            (1024, 256, 1000),
        ),
        vocab_size: int = 8192,
        updates: int = 0,
        key_length: int = 1,
        power: float = 0.01,
        seed: int = 0,
    ) -> None:
        require_sizes(vocab_size=vocab_size, least=4, most=1 << 16)
        require_sizes(key_length=key_length, most=2)
        require_sizes(least=0, updates=updates, seed=seed)
        if not power > 0:
            raise UsageError(f"power must be above 0, got {power}")
        self.trained, self.tested = [list(row) for row in trained], [list(row) for row in tested]
        self.vocab_size, self.updates, self.key_length = vocab_size, updates, key_length
        self.power, self.seed = power, seed
        for name, rows in (("trained", self.trained), ("tested", self.tested)):
            for number, (length, pairs, count) in enumerate(rows):
                self._require_row(f"{name}[{number}]", length=length, pairs=pairs, count=count)

    @property
    def unit(self) -> int:
        """Tokens of a key and its value."""
        return self.key_length + 1

    @property
    def baselines(self) -> Mapping[str, float]:
        """Chance: one in as many values as the vocabulary has."""
        return {"chance": 1 / (self.vocab_size - self.vocab_size // 2)}

    def documents(self) -> Iterator[Document]:
        """Yield the training documents, then the held-out ones, row by row."""
        for stream, (split, rows) in enumerate((("train", self.trained), ("validation", self.tested))):
            random = np.random.default_rng((self.seed, stream))
            for length, pairs, count in rows:
                for number in range(count):
                    name = f"{split} document {number} with {length} tokens and {pairs} pairs"
                    yield self._document(random, length=length, pairs=pairs, name=name, split=split)

    def identity(self) -> Mapping[str, object]:
        """The arguments, and :attr:`revision`."""
        return {"corpus": type(self).__name__, "revision": self.revision, **vars(self)}

    def _document(self, random: np.random.Generator, *, length: int, pairs: int, name: str, split: str) -> Document:
        shown = pairs + self.updates
        keys = self._keys(random, pairs)
        owners = np.concatenate((np.arange(pairs), random.choice(pairs, self.updates, replace=False)))
        owners = random.permutation(owners)
        values = random.choice(np.arange(self.vocab_size // 2, self.vocab_size), shown, replace=False)
        last = np.zeros(pairs, dtype=np.int64)
        np.maximum.at(last, owners, np.arange(shown))
        weights = np.arange(1, length // self.unit - shown + 1, dtype=np.float64) ** (self.power - 1)
        gaps = random.choice(len(weights), pairs, replace=False, p=weights / weights.sum())
        units = random.integers(self.vocab_size, size=(length // self.unit, self.unit))
        units[:shown] = np.column_stack((keys[owners], values))
        units[shown + gaps] = np.column_stack((keys, values[last]))
        ends = np.sort(shown + gaps + 1) * self.unit * SYMBOL.itemsize
        return Document(
            units.astype(SYMBOL).tobytes(),
            name=name,
            split=split,
            prompt_length=shown * self.unit * SYMBOL.itemsize,
            answers=tuple((end - SYMBOL.itemsize, end) for end in ends.tolist()),
        )

    def _keys(self, random: np.random.Generator, pairs: int) -> Int64[np.ndarray, "pairs key_length"]:
        """Draw distinct keys in random order."""
        symbols = np.arange(1, self.vocab_size // 2)
        if self.key_length == 1:
            return random.choice(symbols, pairs, replace=False)[:, None]
        rows, columns = random.choice(symbols, (2, _side(pairs)), replace=False)
        cells = random.choice(_side(pairs) ** 2, pairs, replace=False)
        return np.stack((rows[cells // len(columns)], columns[cells % len(columns)]), axis=1)

    def _require_row(self, name: str, *, length: int, pairs: int, count: int) -> None:
        given, unit = [length, pairs, count], self.unit
        if min(given) < 1:
            raise UsageError(f"{name} must be tokens, pairs and documents, each at least 1, got {given}")
        if length % unit:
            raise UsageError(
                f"{name} needs a length that is a multiple of {unit}, the tokens of a pair: {length - length % unit} "
                f"or {length - length % unit + unit}, got {given}"
            )
        if length < (least := (2 * pairs + self.updates) * unit):
            raise UsageError(
                f"{name} has {length} tokens, too few to show {pairs} pairs and {self.updates} updates and to ask for "
                f"all keys: use at least {least} tokens, or fewer pairs, got {given}"
            )
        if self.updates > pairs:
            raise UsageError(f"{name} has {pairs} keys to show again, got updates={self.updates}: use fewer updates")
        symbols = pairs if self.key_length == 1 else 2 * _side(pairs)
        if max(symbols + 1, pairs + self.updates) > self.vocab_size // 2:
            need = 2 * max(symbols + 1, pairs + self.updates)
            raise UsageError(
                f"{name} needs a vocabulary of at least {need} tokens, for distinct keys and values, got {given} and "
                f"vocab_size={self.vocab_size}"
            )


def _side(pairs: int) -> int:
    """Rows of the smallest square grid with so many cells."""
    return int(np.ceil(np.sqrt(pairs)))
