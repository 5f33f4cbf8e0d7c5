"""Synthetic documents that show something at their beginning and ask for it many segments later."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import UInt8

from memformer_pl.data.corpora.corpus import Corpus, Document
from memformer_pl.errors import UsageError, require_sizes

CUE = ord("?")
DIGITS = np.frombuffer(b"0123456789", dtype=np.uint8)

Bytes = UInt8[np.ndarray, " _"]


class Task(NamedTuple):
    """The parts of a document."""

    shown: Bytes
    """At the beginning of the document."""
    question: Bytes
    """At the beginning of the segment before the answer. That segment ends with a cue, if there is room."""
    answer: Bytes
    """The whole last segment."""


class DelayedQuestions(Corpus):
    """Documents that show something at their beginning and ask for it ``distance`` segments later.

    Between the two lies noise: digits. Only the answer is to be predicted (:attr:`Document.prompt_length`). The
    question stands in the segment before the answer, because Memformer's decoder reaches memory only through what its
    encoder makes of the previous segment. So 2 is the smallest distance that requires memory. A token should be a byte.

    Training documents have every distance from :attr:`shortest` to ``longest``; held-out documents have the distances
    ``tested``. Read from the shortest to the longest (``SegmentData(shortest_first=True)``), the training documents are
    a curriculum.

    Args:
        segment_length: Bytes of a segment; must equal that of the data.
        longest: The longest training distance.
        nearest: Share of the training documents with the shortest distance; the other distances share the rest equally.
        tested: Distances of the held-out documents.
        literal: Share of the positions of a training question that already hold the answer.
        examples: Training documents.
        questions: Held-out documents per distance.
        seed: Seed of all documents.
    """

    revision: ClassVar[int] = 1
    """Increases whenever the same arguments give different documents, so that earlier packs are not reused."""

    def __init__(
        self,
        *,
        segment_length: int,
        longest: int,
        nearest: float,
        tested: Sequence[int],
        literal: float,
        examples: int,
        questions: int,
        seed: int,
    ) -> None:
        require_sizes(examples=examples, questions=questions)
        require_sizes(least=2, longest=longest, **{f"tested[{n}]": distance for n, distance in enumerate(tested)})
        require_sizes(least=0, seed=seed)
        if not 0 <= nearest <= 1:
            raise UsageError(f"nearest must be from 0 to 1, got {nearest}")
        if not 0 <= literal < 1:
            raise UsageError(f"literal must be at least 0 and below 1, got {literal}")
        self.segment_length, self.longest, self.nearest, self.tested = segment_length, longest, nearest, list(tested)
        self.literal, self.examples, self.questions, self.seed = literal, examples, questions, seed

    @property
    def shortest(self) -> int:
        """The smallest training distance."""
        return 2

    @property
    @abstractmethod
    def baselines(self) -> Mapping[str, float]:
        """Accuracy of predictors with partial knowledge, by what they know; ``chance`` knows nothing."""

    @abstractmethod
    def task(self, random: np.random.Generator, *, distance: int, split: str) -> Task:
        """Draw what one document shows, asks and answers."""

    def documents(self) -> Iterator[Document]:
        """Yield the training documents, then the held-out ones by distance."""
        random = np.random.default_rng(self.seed)
        for number in range(self.examples):
            near = self.longest == self.shortest or random.random() < self.nearest
            distance = self.shortest if near else int(random.integers(self.shortest + 1, self.longest + 1))
            yield self._document(distance, f"question {number}", "train", random)
        for distance in self.tested:
            for number in range(self.questions):
                yield self._document(distance, f"held-out question {number}", "validation", random)

    def identity(self) -> Mapping[str, object]:
        """The arguments, and :attr:`revision`."""
        return {"corpus": type(self).__name__, "revision": self.revision, **vars(self)}

    def _document(self, distance: int, name: str, split: str, random: np.random.Generator) -> Document:
        prompt = random.choice(DIGITS, distance * self.segment_length)
        shown, question, answer = self.task(random, distance=distance, split=split)
        prompt[: len(shown)] = shown
        last_segment = prompt[-self.segment_length :]
        last_segment[-1] = CUE
        last_segment[: len(question)] = question
        content = np.concatenate((prompt, answer)).tobytes()
        return Document(content, name=f"{name} at distance {distance}", split=split, prompt_length=len(prompt))
