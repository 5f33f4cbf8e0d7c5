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
BEGINNERS = 0.75
"""Share of the shortest lookups in training that hold few letters alone."""
DIGITS = np.frombuffer(b"0123456789", dtype=np.uint8)

Bytes = UInt8[np.ndarray, " _"]


class Task(NamedTuple):
    """What a document is about."""

    shown: Bytes
    """Stands at the beginning."""
    question: Bytes
    """Stands at the beginning of the segment before the answer, whose last byte is a cue where there is room."""
    answer: Bytes
    """Stands in the last segment, and is all of it."""


class Questions(Corpus):
    """Documents that show something at their beginning, and ask for it ``distance`` segments later.

    Between the two lies noise, digits. Only the answer is to be predicted (:attr:`Document.given`). The question stands
    in the segment before the answer, since Memformer's decoder reaches memory only through what its encoder makes of
    the previous segment; so 2 is the least distance that takes a memory, and all that lies between what is shown and
    the question is noise. A token is meant to be a byte.

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
    def levels(self) -> Mapping[str, float]:
        """How often answers are right that know less than all, by what they know; ``chance`` knows nothing."""

    @abstractmethod
    def task(self, random: np.random.Generator, *, distance: int, split: str) -> Task:
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
        shown, question, answer = self.task(random, distance=distance, split=split)
        given[: len(shown)] = shown
        asks = given[-self.segment_length :]
        asks[-1] = CUE
        asks[: len(question)] = question
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
    def levels(self) -> Mapping[str, float]:
        """Chance is one letter in as many as there are."""
        return {"chance": 1 / self.letters}

    def task(self, random: np.random.Generator, *, distance: int, split: str) -> Task:
        """Letters; the question is the cue alone."""
        del distance, split
        letters = random.choice(LETTERS[: self.letters], self.shown)
        return Task(letters, letters[:0], letters)


class Lookup(Questions):
    """Key-value lookup: pairs of a key and a value are shown, and the values of all keys asked for, in another order.

    With 4 pairs and segments of 4 bytes, this is a document of distance 5, one segment in each column::

        GhBm  KcAa  8821  2550  KGAB  cham
        shown       noise       keys  values

    Keys are capital letters, all different in a document; values are small letters, drawn independently, so without
    what was shown chance is one in ``values``, whatever keys are asked and whatever was answered before. Who knows
    which values were shown, and not whose they are, is right far more often, :attr:`unbound`: what stands above that
    is lookup.

    Two things make it learnable (``experiments/README.md`` has what happens without). In training ``literal`` of the
    places of a question hold no key but a value, which answers itself; else nothing tells a model that cannot look up
    yet that an answer belongs to the letter at its own place in the question::

        GhBm  KcAa  8821  2550  KgAt  cgat

    And training begins with less: of the documents of distance 2 three quarters hold the first ``few`` keys and values
    alone, and as many pairs as fit into their one segment. Longer ones show at least so many, at most ``pairs``::

        GhBe  BG1?  eh

    Args:
        segment_length: Bytes of a segment; must be that of the data.
        longest: The longest distance that is trained.
        nearest: Share of the training documents that have distance 2; the others share the rest equally.
        tested: Distances of the held-out documents.
        pairs: Pairs that are shown.
        keys: How many different keys there are; at most 26.
        values: How many different values there are; at most 26.
        few: How many of each occur in most training documents of distance 2.
        literal: Share of the places of a training question that hold a value.
        examples: Training documents.
        questions: Held-out documents of each distance.
        seed: Of all documents.
    """

    def __init__(
        self,
        *,
        segment_length: int = 4,
        longest: int = 8,
        nearest: float = 0.6,
        tested: Sequence[int] = (3, 4, 8, 16, 32),
        pairs: int = 4,
        keys: int = 16,
        values: int = 16,
        few: int = 8,
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
        if segment_length < 2 or segment_length % 2:
            raise ValueError(
                f"segment_length must be even, so that none of its borders cuts a pair, got {segment_length}"
            )
        require_sizes(pairs=pairs, most=min(keys, segment_length))
        require_sizes(keys=keys, values=values, most=len(LETTERS))
        require_sizes(few=few, least=segment_length // 2, most=min(keys, values))
        self.pairs, self.keys, self.values, self.few, self.literal = pairs, keys, values, few, literal
        if short := [distance for distance in tested if self._room(distance) < pairs]:
            raise ValueError(f"a distance of {min(short)} is too short to show {pairs=} and to ask, got {tested=}")
        if not 0 <= literal < 1:
            raise ValueError(f"literal must be a share of at least 0 and below 1, got {literal}")

    @property
    def levels(self) -> Mapping[str, float]:
        """Chance is one value in as many as there are; and :attr:`unbound`."""
        return {"chance": 1 / self.values, "values, not whose": self.unbound}

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

    def task(self, random: np.random.Generator, *, distance: int, split: str) -> Task:
        """Pairs, their keys in another order, and the values of these."""
        pairs, keys, letters = self.pairs, KEYS[: self.keys], LETTERS[: self.values]
        if split == "train":
            pairs = int(random.integers(min(self._room(2), pairs), min(self._room(distance), pairs), endpoint=True))
            if distance == 2 and random.random() < BEGINNERS:
                keys, letters = keys[: self.few], letters[: self.few]
        keys = random.choice(keys, pairs, replace=False)
        values, order = random.choice(letters, pairs), random.permutation(pairs)
        question, answer = keys[order], values[order]
        if split == "train":
            literal, others = random.random(pairs) < self.literal, random.choice(letters, pairs)
            question, answer = np.where(literal, others, question), np.where(literal, others, answer)
        return Task(np.stack((keys, values), axis=1).ravel(), question, answer)

    def _room(self, distance: int) -> int:
        """Pairs that fit into the segments before the question, none of which is cut by a border."""
        return (distance - 1) * (self.segment_length // 2)
