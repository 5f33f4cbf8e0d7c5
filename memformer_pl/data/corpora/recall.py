"""Synthetic tasks of memory: what was shown is copied, or looked up by its key."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from memformer_pl.data.corpora.delayed import DIGITS, DelayedQuestions, Task
from memformer_pl.errors import UsageError, require_sizes

LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
KEYS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype=np.uint8)
BEGINNERS = 0.75
"""Share of the shortest training documents of a lookup that hold few letters alone."""


class Copy(DelayedQuestions):
    """Copying: letters are shown at the beginning of a document, and asked for ``distance`` segments later.

    With 4 letters and segments of 8 bytes, this is a document of distance 4, one segment in each column::

        hmca4071  88213940  25506117  5521309?  hmca
        shown     noise     noise     cue       answer

    The answer cannot be guessed: letters are drawn independently, so chance is one in ``letters``.

    In training ``literal`` of the letters stand in the question, too, each at the place that it has in the answer. It
    shows where an answer is read, before memory holds anything; else both have to be found at once
    (``experiments/README.md`` has what happens without)::

        hmca4071  88213940  25506117  h91a309?  hmca

    Args:
        segment_length: Bytes of a segment; must be that of the data.
        longest: The longest distance that is trained.
        nearest: Share of the training documents that have distance 2; the others share the rest equally.
        tested: Distances of the held-out documents.
        shown: Letters that are shown.
        letters: How many different ones there are; at most 26.
        literal: Share of the places of a training question that hold their letter.
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
            literal=literal,
            examples=examples,
            questions=questions,
            seed=seed,
        )
        require_sizes(shown=shown, letters=letters)
        if shown >= segment_length:
            raise UsageError(f"a segment shows letters and a cue: shown must be below {segment_length=}, got {shown=}")
        if letters > len(LETTERS):
            raise UsageError(f"letters must be at most {len(LETTERS)}, got {letters}")
        self.shown, self.letters = shown, letters

    @property
    def levels(self) -> Mapping[str, float]:
        """Chance is one letter in as many as there are."""
        return {"chance": 1 / self.letters}

    def task(self, random: np.random.Generator, *, distance: int, split: str) -> Task:
        """Letters; the question is the cue alone, or in training some of them."""
        del distance
        letters = random.choice(LETTERS[: self.letters], self.shown)
        if split != "train":
            return Task(letters, letters[:0], letters)
        noise, literal = random.choice(DIGITS, self.shown), random.random(self.shown) < self.literal
        return Task(letters, np.where(literal, letters, noise), letters)


class AssociativeRecall(DelayedQuestions):
    """Key-value lookup: pairs of a key and a value are shown, and the values of all keys asked for, in another order.

    With 4 pairs and segments of 4 bytes, this is a document of distance 5, one segment in each column::

        GhBm  KcAa  8821  2550  KGAB  cham
        shown       noise       keys  values

    Keys are capital letters, all different in a document; values are small letters, drawn independently, so without
    what was shown chance is one in ``values``, whatever keys are asked and whatever was answered before. Who knows
    which values were shown, and not whose they are, is right far more often, :attr:`unbound`: what stands above that
    is lookup.

    What makes it learnable (``experiments/README.md`` has what happens without): in training ``literal`` of the
    places of a question hold no key but a value, which answers itself; else nothing tells a model that cannot look up
    yet that an answer belongs to the letter at its own place in the question::

        GhBm  KcAa  8821  2550  KgAt  cgat

    There, from two pairs to all are shown, anywhere in the first segments that have room for all of them; else what
    comes first is written into all of the memory::

        Gh07  BmKc  8821  2550  BgG?  mgh

    And training begins with less: three quarters of its shortest documents, which have no noise behind these segments,
    hold the first ``few`` keys and values alone.

    Args:
        segment_length: Bytes of a segment; must be that of the data.
        longest: The longest distance that is trained.
        nearest: Share of the training documents that have the shortest distance; the others share the rest equally.
        tested: Distances of the held-out documents.
        pairs: Pairs that are shown; in training at most.
        keys: How many different keys there are; at most 26.
        values: How many different values there are; at most 26.
        few: How many of each occur in most of the shortest training documents.
        literal: Share of the places of a training question that hold a value.
        examples: Training documents.
        questions: Held-out documents of each distance.
        seed: Of all documents.
    """

    revision = 2

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
            literal=literal,
            examples=examples,
            questions=questions,
            seed=seed,
        )
        if segment_length < 2 or segment_length % 2:
            raise UsageError(
                f"segment_length must be even, so that none of its borders cuts a pair, got {segment_length}"
            )
        require_sizes(pairs=pairs, most=min(keys, segment_length))
        require_sizes(keys=keys, values=values, most=len(LETTERS))
        require_sizes(few=few, least=pairs, most=min(keys, values))
        self.pairs, self.keys, self.values, self.few = pairs, keys, values, few
        require_sizes(longest=longest, least=self.shortest)
        if short := [distance for distance in tested if self._room(distance) < pairs]:
            raise UsageError(f"a distance of {min(short)} is too short to show {pairs=} and to ask, got {tested=}")

    @property
    def shortest(self) -> int:
        """The least distance that has room for all pairs."""
        return 1 + math.ceil(self.pairs / (self.segment_length // 2))

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
            pairs = int(random.integers(min(2, pairs), pairs, endpoint=True))
            if distance == self.shortest and random.random() < BEGINNERS:
                keys, letters = keys[: self.few], letters[: self.few]
        keys = random.choice(keys, pairs, replace=False)
        values, order = random.choice(letters, pairs), random.permutation(pairs)
        question, answer = keys[order], values[order]
        if split == "train":
            literal, others = random.random(pairs) < self.literal, random.choice(letters, pairs)
            question, answer = np.where(literal, others, question), np.where(literal, others, answer)
        shown = np.stack((keys, values), axis=1)
        if split == "train":
            places = random.choice(DIGITS, (self._room(self.shortest), 2))
            places[random.choice(len(places), pairs, replace=False)] = shown
            shown = places
        return Task(shown.ravel(), question, answer)

    def _room(self, distance: int) -> int:
        """Pairs that fit into the segments before the question, none of which is cut by a border."""
        return (distance - 1) * (self.segment_length // 2)
