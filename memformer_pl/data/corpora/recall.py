"""Synthetic memory tasks: copy what was shown, or look it up by its key."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from memformer_pl.data.corpora.delayed import DIGITS, DelayedQuestions, Task
from memformer_pl.errors import UsageError, require_sizes

LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
KEYS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype=np.uint8)
EASY_SHARE = 0.75
"""Share of the shortest training documents of associative recall that draw on few keys and values."""


class Copy(DelayedQuestions):
    """Copy task: letters are shown at the beginning of a document and asked for ``distance`` segments later.

    With 4 letters and segments of 8 bytes, a document of distance 4 looks like this, one segment per column::

        hmca4071  88213940  25506117  5521309?  hmca
        shown     noise     noise     cue       answer

    The letters are independent, so chance is one in ``letters``.

    In training, a share ``literal`` of the letters also stands in the question, each at its position in the answer.
    This teaches where the answer is read before memory holds anything; otherwise both have to be found at once
    (``experiments/NEGATIVE.md`` says what happens without)::

        hmca4071  88213940  25506117  h91a309?  hmca

    Args:
        segment_length: Bytes of a segment; must equal that of the data.
        longest: The longest training distance.
        nearest: Share of the training documents with distance 2; the other distances share the rest equally.
        tested: Distances of the held-out documents.
        shown: Letters that are shown.
        letters: Size of the alphabet; at most 26.
        literal: Share of the positions of a training question that already hold the answer.
        examples: Training documents.
        questions: Held-out documents per distance.
        seed: Seed of all documents.
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
            raise UsageError(f"shown must be below {segment_length=}, to leave room for a cue, got {shown=}")
        if letters > len(LETTERS):
            raise UsageError(f"letters must be at most {len(LETTERS)}, got {letters}")
        self.shown, self.letters = shown, letters

    @property
    def baselines(self) -> Mapping[str, float]:
        """Chance: one in ``letters``."""
        return {"chance": 1 / self.letters}

    def task(self, random: np.random.Generator, *, distance: int, split: str) -> Task:
        """Draw letters; the question is the cue alone, or in training some of the letters."""
        del distance
        letters = random.choice(LETTERS[: self.letters], self.shown)
        if split != "train":
            return Task(letters, letters[:0], letters)
        noise, literal = random.choice(DIGITS, self.shown), random.random(self.shown) < self.literal
        return Task(letters, np.where(literal, letters, noise), letters)


class AssociativeRecall(DelayedQuestions):
    """Key-value lookup: pairs of a key and a value are shown, then the values of all keys are asked for in another
    order.

    With 4 pairs and segments of 4 bytes, a document of distance 5 looks like this, one segment per column::

        GhBm  KcAa  8821  2550  KGAB  cham
        shown       noise       keys  values

    Keys are capital letters, distinct within a document. Values are small letters, drawn independently, so chance is
    one in ``values``. A model that remembers which values were shown, but not their keys, reaches :attr:`values_only`,
    far above chance: only accuracy above that level is lookup.

    Three measures make the task learnable (``experiments/NEGATIVE.md`` says what happens without). First, in training a
    share ``literal`` of the positions of a question hold a value instead of a key, which is its own answer. This
    teaches that an answer belongs to the letter at its position in the question::

        GhBm  KcAa  8821  2550  KgAt  cgat

    Second, training documents show two pairs or more, at random positions in the first segments; otherwise the first
    pair would be written into all of memory::

        Gh07  BmKc  8821  2550  BgG?  mgh

    Third, three quarters of the shortest training documents, which have no noise after these segments, draw on the
    first ``few`` keys and values only.

    Args:
        segment_length: Bytes of a segment; must equal that of the data.
        longest: The longest training distance.
        nearest: Share of the training documents with the shortest distance; the other distances share the rest equally.
        tested: Distances of the held-out documents.
        pairs: Pairs that are shown; in training at most.
        keys: Number of different keys; at most 26.
        values: Number of different values; at most 26.
        few: Number of keys and of values in most of the shortest training documents.
        literal: Share of the positions of a training question that hold a value.
        examples: Training documents.
        questions: Held-out documents per distance.
        seed: Seed of all documents.
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
                f"segment_length must be even, so that no pair crosses a border of segments, got {segment_length}"
            )
        require_sizes(pairs=pairs, most=min(keys, segment_length))
        require_sizes(keys=keys, values=values, most=len(LETTERS))
        require_sizes(few=few, least=pairs, most=min(keys, values))
        self.pairs, self.keys, self.values, self.few = pairs, keys, values, few
        require_sizes(longest=longest, least=self.shortest)
        if short := [distance for distance in tested if self._room(distance) < pairs]:
            raise UsageError(f"distance {min(short)} is too short to show {pairs=}, got {tested=}")

    @property
    def shortest(self) -> int:
        """The smallest distance with room for all pairs."""
        return 1 + math.ceil(self.pairs / (self.segment_length // 2))

    @property
    def baselines(self) -> Mapping[str, float]:
        """Chance, one in ``values``; and :attr:`values_only`."""
        return {"chance": 1 / self.values, "values without their keys": self.values_only}

    @property
    def values_only(self) -> float:
        """Expected accuracy of a predictor that knows how often each value was shown, and the answers so far, but no
        key.

        It guesses the most frequent of the remaining values. This is the mean over all draws of values.
        """
        return float(np.mean([self._values_only_at(left) / left for left in range(1, self.pairs + 1)]))

    def _values_only_at(self, left: int) -> float:
        """Expected count of the most frequent among ``left`` values."""
        # The remaining draws are independent. Count those in which no value occurs more than ``most`` times.
        expected, total = 0.0, float(self.values**left)
        for most in range(left):
            one = np.array([1 / math.factorial(n) for n in range(most + 1)])  # exponential series, truncated
            series = np.ones(1)
            for _ in range(self.values):
                series = np.convolve(series, one)[: left + 1]
            none_above = series[left] * math.factorial(left) / total if len(series) > left else 0.0
            expected += 1 - none_above
        return expected

    def task(self, random: np.random.Generator, *, distance: int, split: str) -> Task:
        """Draw pairs, their keys in another order, and the values of these keys."""
        pairs, keys, letters = self.pairs, KEYS[: self.keys], LETTERS[: self.values]
        if split == "train":
            pairs = int(random.integers(min(2, pairs), pairs, endpoint=True))
            if distance == self.shortest and random.random() < EASY_SHARE:
                keys, letters = keys[: self.few], letters[: self.few]
        keys = random.choice(keys, pairs, replace=False)
        values, order = random.choice(letters, pairs), random.permutation(pairs)
        question, answer = keys[order], values[order]
        if split == "train":
            literal, others = random.random(pairs) < self.literal, random.choice(letters, pairs)
            question, answer = np.where(literal, others, question), np.where(literal, others, answer)
        shown = np.stack((keys, values), axis=1)
        if split == "train":
            positions = random.choice(DIGITS, (self._room(self.shortest), 2))
            positions[random.choice(len(positions), pairs, replace=False)] = shown
            shown = positions
        return Task(shown.ravel(), question, answer)

    def _room(self, distance: int) -> int:
        """Pairs that fit into the segments before the question without crossing a border."""
        return (distance - 1) * (self.segment_length // 2)
