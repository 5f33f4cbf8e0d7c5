"""Documents that show something at their beginning, and ask for it many segments later."""

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
    """What a document is about."""

    shown: Bytes
    """Stands at the beginning."""
    question: Bytes
    """Stands at the beginning of the segment before the answer, whose last byte is a cue where there is room."""
    answer: Bytes
    """Stands in the last segment, and is all of it."""


class DelayedQuestions(Corpus):
    """Documents that show something at their beginning, and ask for it ``distance`` segments later.

    Between the two lies noise, digits. Only the answer is to be predicted (:attr:`Document.prompt_length`). The question stands
    in the segment before the answer, since Memformer's decoder reaches memory only through what its encoder makes of
    the previous segment; so 2 is the least distance that takes a memory, and all that lies between what is shown and
    the question is noise. A token is meant to be a byte.

    Training documents have every distance from :attr:`shortest` to ``longest``, held-out ones each of ``tested``. Read
    from the shortest to the longest (``SegmentData(shortest_first=True)``), those for training are a curriculum.

    Args:
        segment_length: Bytes of a segment; must be that of the data.
        longest: The longest distance that is trained.
        nearest: Share of the training documents that have the shortest distance; the others share the rest equally.
        tested: Distances of the held-out documents.
        literal: Share of the places of a training question that hold their answer.
        examples: Training documents.
        questions: Held-out documents of each distance.
        seed: Of all documents.
    """

    revision: ClassVar[int] = 1
    """Counts up where the same arguments come to give other documents: what was packed before is not read again."""

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
            raise UsageError(f"nearest must be a share from 0 to 1, got {nearest}")
        if not 0 <= literal < 1:
            raise UsageError(f"literal must be a share of at least 0 and below 1, got {literal}")
        self.segment_length, self.longest, self.nearest, self.tested = segment_length, longest, nearest, list(tested)
        self.literal, self.examples, self.questions, self.seed = literal, examples, questions, seed

    @property
    def shortest(self) -> int:
        """The least distance of training documents."""
        return 2

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
        given = random.choice(DIGITS, distance * self.segment_length)
        shown, question, answer = self.task(random, distance=distance, split=split)
        given[: len(shown)] = shown
        asks = given[-self.segment_length :]
        asks[-1] = CUE
        asks[: len(question)] = question
        content = np.concatenate((given, answer)).tobytes()
        return Document(content, name=f"{name} at distance {distance}", split=split, prompt_length=len(given))
