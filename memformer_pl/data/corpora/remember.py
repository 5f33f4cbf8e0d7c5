"""Pairs of a key and a value, one in each segment, and the value of one key at the end: remember, or rewrite."""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np

from memformer_pl.data.corpora.corpus import Corpus, Document
from memformer_pl.errors import UsageError, require_sizes

SYMBOLS = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
BITS = 4
"""Of a symbol."""
SHOWN, ASKED, END = b":-,"
"""Behind a key that is shown, behind the key that is asked for, and at the end of a segment."""


class Remember(Corpus):
    """Remember the value of every key: the first of two tasks of ARMT (Rodkin et al. 2024, appendices B to E).

    With 3 pairs, and one symbol for a key and for a value, a document looks like this, one segment per column; only the
    value behind ``-`` and the end of its segment are predicted (:attr:`Document.answers`)::

        4:c,  b:0,  0:7,  b-0,

    The keys of a document are distinct, values are drawn independently, and one of the keys is asked for. A segment has
    :attr:`segment_length` tokens, one for each byte: use the tokenizer ``Bytes``, and give the data this length.
    ``AccuracyByDistance`` logs ``exact/N``, the share of documents with N pairs whose value and end are all right when
    each token is predicted from the true ones before it. These are the documents for which greedy generation gives
    exactly the value and the end, so this is exact match by generation.

    Ours: symbols are hexadecimal digits, and separators are printed characters, where the paper has the numbers 0 to 15
    and 100 to 102. Documents with few pairs are few, so held-out ones also occur in training, as in the paper.

    Args:
        pairs: Most pairs of a training document; each number from 1 on is equally likely.
        tested: Numbers of pairs of the held-out documents.
        key_length: Symbols of a key, at most 8.
        value_length: Symbols of a value.
        examples: Training documents.
        questions: Held-out documents for each number of pairs.
        seed: Seed of all documents. Held-out documents do not depend on the training documents.

    Raises:
        UsageError: A size is out of range, or there are fewer keys than a document needs.
    """

    revision: ClassVar[int] = 1
    """Increases whenever the same arguments give different documents, so that earlier packs are not reused."""
    repeats: ClassVar[bool] = False
    """Whether a key may be shown again."""

    def __init__(
        self,
        *,
        pairs: int = 5,
        tested: Sequence[int] = (1, 2, 3, 5, 10),
        key_length: int = 1,
        value_length: int = 1,
        examples: int = 100_000,
        questions: int = 256,
        seed: int = 0,
    ) -> None:
        require_sizes(pairs=pairs, value_length=value_length, examples=examples, questions=questions)
        require_sizes(**{f"tested[{n}]": each for n, each in enumerate(tested)})
        require_sizes(key_length=key_length, most=8)
        require_sizes(least=0, seed=seed)
        keys = len(SYMBOLS) ** key_length
        for name, shown in (("pairs", pairs), *((f"tested[{n}]", each) for n, each in enumerate(tested))):
            if shown > keys and not self.repeats:
                raise UsageError(
                    f"{name} must be at most {keys}, the number of distinct keys with {key_length=}, got {shown}: use "
                    f"a key_length of {_length_for(shown)}"
                )
        self.pairs, self.tested = pairs, list(tested)
        self.key_length, self.value_length = key_length, value_length
        self.examples, self.questions, self.seed = examples, questions, seed

    @property
    def segment_length(self) -> int:
        """Tokens of a segment: a key, a value, and two separators."""
        return self.key_length + self.value_length + 2

    @property
    def baselines(self) -> Mapping[str, float]:
        """Chance of a whole value."""
        return {"chance": 1 / len(SYMBOLS) ** self.value_length}

    def documents(self) -> Iterator[Document]:
        """Yield the training documents, then the held-out ones by their number of pairs."""
        random = np.random.default_rng((self.seed, 0))
        for number in range(self.examples):
            shown = int(random.integers(1, self.pairs, endpoint=True))
            yield self._document(random, shown, name=f"document {number}", split="train")
        random = np.random.default_rng((self.seed, 1))
        for shown in self.tested:
            for number in range(self.questions):
                yield self._document(random, shown, name=f"held-out document {number}", split="validation")

    def identity(self) -> Mapping[str, object]:
        """The arguments, and :attr:`revision`."""
        return {"corpus": type(self).__name__, "revision": self.revision, **vars(self)}

    def _document(self, random: np.random.Generator, pairs: int, *, name: str, split: str) -> Document:
        keys = random.choice(len(SYMBOLS) ** self.key_length, pairs, replace=self.repeats)
        values = random.choice(SYMBOLS, (pairs, self.value_length))
        asked = random.choice(np.unique(keys))
        last = np.flatnonzero(keys == asked)[-1]
        places = BITS * np.arange(self.key_length)[::-1]
        digits = np.append(keys, asked)[:, None] >> places & len(SYMBOLS) - 1
        segments = np.full((pairs + 1, self.segment_length), END, dtype=np.uint8)
        segments[:, : self.key_length] = SYMBOLS[digits]
        segments[:, self.key_length] = [SHOWN] * pairs + [ASKED]
        segments[:, self.key_length + 1 : -1] = np.vstack((values, values[last]))
        answer = pairs * self.segment_length + self.key_length + 1
        return Document(
            segments.tobytes(),
            name=f"{name} with {pairs} pairs",
            split=split,
            prompt_length=pairs * self.segment_length,
            answers=((answer, segments.size),),
        )


class Rewrite(Remember):
    """Rewrite what is known of a key: the second task of ARMT (appendices B to E).

    Keys are drawn with repetition, here from all that ``key_length`` symbols make, 16 with one as in the paper. One of
    the keys that occur is asked for, each equally likely, and its last value is the answer. All else is as in
    :class:`Remember`::

        4:c,  b:0,  4:7,  4-7,

    """

    repeats = True


def capacity(*, pairs: int, accuracy: float, value_length: int = 1) -> float:
    """Pairs that a model holds, by its exact match on documents with so many pairs: ``n (v a - 1) / (v - 1)`` (ARMT,
    appendix E).

    A model that knows some pairs and guesses the others is right by chance in ``1 / v`` of those; this takes the
    guesses off. ``v`` is the number of values, 16 to the power of their length; the paper has values of one symbol.

    Args:
        pairs: Pairs of a document.
        accuracy: Share of documents whose value is exactly right.
        value_length: Symbols of a value.
    """
    values: int = len(SYMBOLS) ** value_length
    return pairs * (values * accuracy - 1) / (values - 1)


def _length_for(keys: int) -> int:
    """Symbols that make so many distinct keys."""
    return -(-(keys - 1).bit_length() // BITS)
