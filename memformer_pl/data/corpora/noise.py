"""A few sentences that count, spread between whole sentences of real prose, and a question at the end."""

import re
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import ClassVar, NamedTuple

import numpy as np

from memformer_pl.data.corpora.corpus import Corpus, Document, Pydoc
from memformer_pl.errors import UsageError, require_sizes

HELD_OUT_EVERY = 3
"""One in so many topics gives the noise of held-out documents."""
SENTENCE = re.compile(r"[A-Z][ -{}~]{30,300}(?<!i\.e)(?<!e\.g)\.")
"""A sentence of the noise: one line of ASCII, without the ``|`` of tables."""
LEAST_WORDS = 8


class Hidden(NamedTuple):
    """What a document hides, and asks for."""

    facts: list[str]
    """Sentences, in their order in the document."""
    question: str
    answer: str
    """A word; a full stop is added."""

    @property
    def size(self) -> int:
        """Bytes of all that is not noise."""
        return len(" ".join([*self.facts, self.question, self.answer])) + 1


class InNoise(Corpus):
    """Sentences that count, in order, at random places between whole sentences of noise; a question, and its answer.

    The noise is prose of :class:`Pydoc`: consecutive sentences up to a random one. The first sentence loses its
    beginning, so that a document has exactly the given number of bytes. Training documents and held-out ones take noise
    from different topics. Only the answer and its full stop are predicted (:attr:`Document.answers`).

    Lengths are in bytes, so in tokens of the tokenizer ``Bytes``: a document of ``length`` bytes has its answer
    ``length / segment_length - 1`` segments behind its start, which is what ``AccuracyByDistance`` counts if it is
    whole. With a tokenizer that learns, lengths in tokens vary a little. ``exact/D`` is then the share of documents
    whose answer is exactly right.

    Args:
        trained: Bytes of the training documents; each length is equally likely.
        tested: Bytes of the held-out documents.
        examples: Training documents.
        questions: Held-out documents of each length.
        seed: Seed of all documents. Held-out documents do not depend on the training documents.
    """

    revision: ClassVar[int] = 1
    """Increases whenever the same arguments give different documents, so that earlier packs are not reused."""

    def __init__(
        self, *, trained: Sequence[int], tested: Sequence[int], examples: int, questions: int, seed: int
    ) -> None:
        require_sizes(examples=examples, questions=questions)
        require_sizes(least=0, seed=seed)
        self.trained, self.tested = list(trained), list(tested)
        self.examples, self.questions, self.seed = examples, questions, seed
        if not self.trained:
            raise UsageError("trained must have at least one length, got none")

    @property
    @abstractmethod
    def baselines(self) -> Mapping[str, float]:
        """Share of answers that are right by chance."""

    @property
    @abstractmethod
    def words(self) -> Collection[str]:
        """Words that must not occur in the noise."""

    @property
    @abstractmethod
    def needed(self) -> int:
        """Bytes that hold everything but noise, whatever is drawn."""

    @abstractmethod
    def hide(self, random: np.random.Generator) -> Hidden:
        """Draw what a document hides, and asks for."""

    def documents(self) -> Iterator[Document]:
        """Yield the training documents, then the held-out ones by length.

        Raises:
            UsageError: A length is shorter than what it has to hold, or longer than the noise.
        """
        noise, random = self._noise("train", self.trained), np.random.default_rng((self.seed, 0))
        held_out = self._noise("validation", self.tested)
        for number in range(self.examples):
            length = int(random.choice(self.trained))
            yield self._document(random, noise, length, name=f"document {number}", split="train")
        random = np.random.default_rng((self.seed, 1))
        for length in self.tested:
            for number in range(self.questions):
                name = f"held-out document {number}"
                yield self._document(random, held_out, length, name=name, split="validation")

    def identity(self) -> Mapping[str, object]:
        """The arguments, :attr:`revision`, and that of the noise."""
        return {"corpus": type(self).__name__, "revision": self.revision, "noise": Pydoc().identity(), **vars(self)}

    def require_lengths(self) -> None:
        """Refuse lengths that do not hold the facts, the question and the answer. A subclass calls this once built."""
        for name, lengths in (("trained", self.trained), ("tested", self.tested)):
            for number, length in enumerate(lengths):
                if length < self.needed:
                    raise UsageError(
                        f"{name}[{number}] is too short for the sentences, the question and the answer: use at least "
                        f"{self.needed} bytes, got {length}"
                    )

    def _noise(self, split: str, lengths: Sequence[int]) -> list[str]:
        found = sentences(split=split, without=frozenset(self.words))
        most = sum(len(sentence) + 1 for sentence in found)
        if lengths and max(lengths) > most:
            raise UsageError(
                f"there are only {most} bytes of noise for the {split} documents, got a length of {max(lengths)}: use "
                "shorter documents"
            )
        return found

    def _document(
        self, random: np.random.Generator, noise: list[str], length: int, *, name: str, split: str
    ) -> Document:
        hidden = self.hide(random)
        text = enough(noise, length - hidden.size, last=int(random.integers(len(noise))))
        places = np.sort(random.integers(len(text) + 1, size=len(hidden.facts)))
        for place, fact in reversed(list(zip(places.tolist(), hidden.facts, strict=True))):
            text.insert(place, fact)
        answer = f"{hidden.answer}.".encode()
        content = " ".join([*text, hidden.question, ""]).encode() + answer
        return Document(
            content,
            name=f"{name} of {length} bytes",
            split=split,
            prompt_length=length - len(answer),
            answers=((length - len(answer), length),),
        )


def enough(noise: Sequence[str], room: int, *, last: int) -> list[str]:
    """Consecutive sentences up to the one at ``last``, which take exactly so many bytes with a space behind each.

    The first is cut at its front; all of it, if there is room for its space alone. Before the first one of the noise
    comes the last one.
    """
    taken: list[str] = []
    while room > 0:
        sentence = noise[(last - len(taken)) % len(noise)]
        taken.append(sentence[max(len(sentence) + 1 - room, 0) :])
        room -= len(taken[-1]) + 1
    return taken[::-1]


@cache
def sentences(*, split: str, without: frozenset[str]) -> list[str]:
    """The sentences of the noise of a split, in the order of the topics.

    Args:
        split: ``train``, or another one, whose noise is from other topics.
        without: Words; sentences with one of them are left out.
    """
    found: set[str] = set()  # a sentence of several topics counts for the first
    own: list[str] = []
    for number, topic in enumerate(Pydoc().documents()):
        for paragraph in topic.text().split("\n\n"):
            for sentence in re.split(r"(?<=[.!?]) ", " ".join(paragraph.split())):
                words = re.findall(r"\w+", sentence.lower())
                if not SENTENCE.fullmatch(sentence) or len(words) < LEAST_WORDS or not without.isdisjoint(words):
                    continue
                held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
                if sentence not in found and held_out == (split != "train"):
                    own.append(sentence)
                found.add(sentence)
    return own
