"""Synthetic documents in which something is shown, noise passes, and what was shown is asked for."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from memformer_pl.data.corpora import Corpus, Document
from memformer_pl.sizes import require_sizes

CUE = ord("?")
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
KEYS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype=np.uint8)
DIGITS = np.frombuffer(b"0123456789", dtype=np.uint8)

Bytes = UInt8[np.ndarray, " _"]


class Task(NamedTuple):
    """What a document is about."""

    shown: Bytes
    """Stands at the beginning of the first segment."""
    question: Bytes
    """Stands at the beginning of the segment before the answer, whose last byte is the cue."""
    answer: Bytes
    """Stands in the last segment, and is all of it."""


class Questions(Corpus):
    """Documents that show something in their first segment, and ask for it ``distance`` segments later.

    Between the two lies noise, digits. Only the answer is to be predicted (:attr:`Document.given`). The question ends
    in a cue and stands in the segment before the answer, since Memformer's decoder reaches memory only through what its
    encoder makes of the previous segment; so 2 is the least distance that takes a memory, and ``distance - 2`` segments
    of noise lie between what is shown and the question. A token is meant to be a byte.

    Training documents have every distance from 2 to ``longest``, held-out ones each of ``tested``. Read from the
    shortest to the longest (``SegmentData(shortest_first=True)``), those for training are a curriculum.

    Args:
        segment_length: Bytes of a segment; must be that of the data.
        longest: The longest distance that is trained.
        nearest: Share of the training documents that have distance 2; the others share the rest equally.
        tested: Distances of the held-out documents.
        examples: Training documents.
        questions: Held-out documents of each distance.
        seed: Of all documents.
    """

    def __init__(
        self,
        *,
        segment_length: int,
        longest: int,
        nearest: float,
        tested: Sequence[int],
        examples: int,
        questions: int,
        seed: int,
    ) -> None:
        require_sizes(examples=examples, questions=questions)
        require_sizes(least=2, longest=longest, **{f"tested[{n}]": distance for n, distance in enumerate(tested)})
        require_sizes(least=0, seed=seed)
        if not 0 <= nearest <= 1:
            raise ValueError(f"nearest must be a share from 0 to 1, got {nearest}")
        self.segment_length, self.longest, self.nearest, self.tested = segment_length, longest, nearest, list(tested)
        self.examples, self.questions, self.seed = examples, questions, seed

    @property
    @abstractmethod
    def chance(self) -> float:
        """How often an answer is right that knows nothing of what was shown."""

    @abstractmethod
    def task(self, random: np.random.Generator, *, split: str) -> Task:
        """What one document is about."""

    def documents(self) -> Iterator[Document]:
        """Those for training, then those that are held out, by distance."""
        random = np.random.default_rng(self.seed)
        for number in range(self.examples):
            near = self.longest == 2 or random.random() < self.nearest
            distance = 2 if near else int(random.integers(3, self.longest + 1))
            yield self._document(distance, f"question {number}", "train", random)
        for distance in self.tested:
            for number in range(self.questions):
                yield self._document(distance, f"held-out question {number}", "validation", random)

    def identity(self) -> Mapping[str, object]:
        """The arguments."""
        return {"corpus": type(self).__name__, **vars(self)}

    def _document(self, distance: int, name: str, split: str, random: np.random.Generator) -> Document:
        given = random.choice(DIGITS, distance * self.segment_length)
        shown, question, answer = self.task(random, split=split)
        given[: len(shown)] = shown
        asks = given[-self.segment_length :]
        asks[: len(question)] = question
        asks[-1] = CUE
        content = np.concatenate((given, answer)).tobytes()
        return Document(content, name=f"{name} at distance {distance}", split=split, given=len(given))


class Recall(Questions):
    """Copying: letters are shown at the beginning of a document, and asked for ``distance`` segments later.

    With 4 letters and segments of 8 bytes, this is a document of distance 4, one segment in each column::

        hmca4071  88213940  25506117  5521309?  hmca
        shown     noise     noise     cue       answer

    The answer cannot be guessed: letters are drawn independently, so chance is one in ``letters``.

    Args:
        segment_length: Bytes of a segment; must be that of the data.
        longest: The longest distance that is trained.
        nearest: Share of the training documents that have distance 2; the others share the rest equally.
        tested: Distances of the held-out documents.
        shown: Letters that are shown.
        letters: How many different ones there are; at most 26.
        examples: Training documents.
        questions: Held-out documents of each distance.
        seed: Of all documents.
    """

    def __init__(
        self,
        *,
        segment_length: int = 8,
        longest: int = 8,
        nearest: float = 0.6,
        tested: Sequence[int] = (2, 4, 8, 16, 32),
        shown: int = 4,
        letters: int = 16,
        examples: int = 50_000,
        questions: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(
            segment_length=segment_length,
            longest=longest,
            nearest=nearest,
            tested=tested,
            examples=examples,
            questions=questions,
            seed=seed,
        )
        require_sizes(shown=shown, letters=letters)
        if shown >= segment_length:
            raise ValueError(f"a segment shows letters and a cue: shown must be below {segment_length=}, got {shown=}")
        if letters > len(LETTERS):
            raise ValueError(f"letters must be at most {len(LETTERS)}, got {letters}")
        self.shown, self.letters = shown, letters

    @property
    def chance(self) -> float:
        """One letter in as many as there are."""
        return 1 / self.letters

    def task(self, random: np.random.Generator, *, split: str) -> Task:
        """Letters; the question is the cue alone."""
        del split
        letters = random.choice(LETTERS[: self.letters], self.shown)
        return Task(letters, letters[:0], letters)


class Lookup(Questions):
    """Key-value lookup: pairs of a key and a value are shown, and the values of all keys asked for, in another order.

    With 4 pairs and segments of 8 bytes, this is a document of distance 4, one segment in each column::

        GhBmKcAa  88213940  25506117  KGAB130?  cham
        shown     noise     noise     keys      values

    Keys are capital letters, all different in a document; values are small letters, drawn independently, so without
    what was shown chance is one in ``values``, whatever keys are asked and whatever was answered before. Who knows
    which values were shown, and not whose they are, is right far more often, :attr:`unbound`: what stands above that
    is lookup.

    In training ``literal`` of the places of a question hold no key but a value, which answers itself::

        KgAt130?  cgat

    Held-out questions have none. Without them nothing tells a model, as long as it cannot look up, that the n-th answer
    belongs to the n-th letter of the question, and what it reads there cannot begin to help
    (``experiments/README.md``).

    Args:
        segment_length: Bytes of a segment; must be that of the data.
        longest: The longest distance that is trained.
        nearest: Share of the training documents that have distance 2; the others share the rest equally.
        tested: Distances of the held-out documents.
        pairs: Pairs that are shown.
        keys: How many different keys there are; at most 26.
        values: How many different values there are; at most 26.
        literal: Share of the places of a training question that hold a value.
        examples: Training documents.
        questions: Held-out documents of each distance.
        seed: Of all documents.
    """

    def __init__(
        self,
        *,
        segment_length: int = 8,
        longest: int = 8,
        nearest: float = 0.6,
        tested: Sequence[int] = (2, 4, 8, 16, 32),
        pairs: int = 4,
        keys: int = 16,
        values: int = 16,
        literal: float = 0.5,
        examples: int = 50_000,
        questions: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(
            segment_length=segment_length,
            longest=longest,
            nearest=nearest,
            tested=tested,
            examples=examples,
            questions=questions,
            seed=seed,
        )
        require_sizes(pairs=pairs, keys=keys, values=values)
        if 2 * pairs > segment_length or pairs == segment_length:
            raise ValueError(f"a segment shows all pairs: pairs must be at most half {segment_length=}, got {pairs=}")
        if max(keys, values) > len(LETTERS) or pairs > keys:
            raise ValueError(
                f"keys and values must be at most {len(LETTERS)}, and pairs at most keys, got {keys=}, "
                f"{values=} and {pairs=}"
            )
        if not 0 <= literal < 1:
            raise ValueError(f"literal must be a share of at least 0 and below 1, got {literal}")
        self.pairs, self.keys, self.values, self.literal = pairs, keys, values, literal

    @property
    def chance(self) -> float:
        """One value in as many as there are."""
        return 1 / self.values

    @property
    def unbound(self) -> float:
        """How often an answer is right that knows which values are shown, how often each, and the answers before it.

        It guesses what is left most often; as answers go on, less is left. The mean over all draws of values.
        """
        return float(np.mean([self._unbound_at(left) / left for left in range(1, self.pairs + 1)]))

    def _unbound_at(self, left: int) -> float:
        """How often the most frequent of ``left`` values occurs among them, on average."""
        # What is left of independent draws are independent draws. In how many does no value occur more than n times?
        expected, total = 0.0, float(self.values**left)
        for most in range(left):
            one = np.array([1 / math.factorial(n) for n in range(most + 1)])  # exponential series, cut after most
            series = np.ones(1)
            for _ in range(self.values):
                series = np.convolve(series, one)[: left + 1]
            none_above = series[left] * math.factorial(left) / total if len(series) > left else 0.0
            expected += 1 - none_above
        return expected

    def task(self, random: np.random.Generator, *, split: str) -> Task:
        """Pairs, their keys in another order, and the values of these."""
        keys = random.choice(KEYS[: self.keys], self.pairs, replace=False)
        values = random.choice(LETTERS[: self.values], self.pairs)
        order = random.permutation(self.pairs)
        question, answer = keys[order], values[order]
        if split == "train":
            literal = random.random(self.pairs) < self.literal
            others = random.choice(LETTERS[: self.values], self.pairs)
            question, answer = np.where(literal, others, question), np.where(literal, others, answer)
        return Task(np.stack((keys, values), axis=1).ravel(), question, answer)
