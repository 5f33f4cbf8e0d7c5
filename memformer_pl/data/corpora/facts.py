"""Facts and a passkey in noise: what has to be carried to a question at the end of a long text."""

from collections.abc import Collection, Mapping, Sequence
from typing import get_args

import numpy as np

from memformer_pl.data.corpora.noise import Hidden, InNoise
from memformer_pl.data.corpora.worlds import LEAST_FACTS, WORDS, Task, chance, longest, story
from memformer_pl.errors import UsageError, require_sizes


class FactsInNoise(InNoise):
    """A small world in noise, as in the first five tasks of bAbI: sentences say what happens, a question asks for it.

    ====  ==========================================  ==========================
    task  sentences                                   question
    ====  ==========================================  ==========================
    qa1   Anna went to the attic.                     Where is Anna?
    qa2   also: Anna took the lamp.                   Where is the lamp?
    qa3   the same                                    Where was the lamp before the attic?
    qa4   The attic is north of the cellar.           What is north of the cellar?
    qa5   Anna gave the lamp to Bruno.                Who gave the lamp to Bruno?
    ====  ==========================================  ==========================

    The answer is one word. This is the axis of BABILong (Kuratov et al. 2024), accuracy against the length of the
    noise, but not its figures: worlds, words and sentences are our own, the noise is technical prose instead of novels,
    and models are trained from nothing.

    Worlds are small, so held-out documents have worlds that also occur in training, in noise that does not.

    Args:
        task: ``qa1`` to ``qa5``.
        facts: Most sentences of a world; each number from the task's least on is equally likely. ``qa4`` always has 2.
        trained, tested, examples, questions, seed: See :class:`~memformer_pl.data.corpora.noise.InNoise`.

    Raises:
        UsageError: A size is out of range, or a length is too short for the facts.
    """

    def __init__(
        self,
        *,
        task: Task = "qa1",
        facts: int = 3,
        trained: Sequence[int] = (128, 256),
        tested: Sequence[int] = (256, 1024, 4096, 16384),
        examples: int = 50_000,
        questions: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(trained=trained, tested=tested, examples=examples, questions=questions, seed=seed)
        if task not in get_args(Task):
            raise UsageError(f"task must be one of {', '.join(get_args(Task))}, got {task!r}")
        require_sizes(facts=facts, least=LEAST_FACTS[task], most=100)
        self.task: Task = task
        self.facts = facts
        self.require_lengths()

    @property
    def baselines(self) -> Mapping[str, float]:
        """Chance: one in all words of the kind that is asked for."""
        return {"chance": chance(self.task)}

    @property
    def words(self) -> Collection[str]:
        """Persons, places and objects."""
        return WORDS

    @property
    def needed(self) -> int:
        """Bytes that hold the facts, the question and the answer, whatever is drawn."""
        return longest(self.task, self.facts)

    def hide(self, random: np.random.Generator) -> Hidden:
        """Draw a world, and a question that has one answer."""
        return Hidden(*story(random, task=self.task, facts=self.facts))


class Passkey(InNoise):
    """A number in one sentence, anywhere in the noise, that is asked for at the end.

    This is the axis of the passkey task and of RULER's first needle in a haystack (Hsieh et al. 2024, S-NIAH-1), but
    not their figures: their noise is a few sentences repeated, ours is prose, and models are trained from nothing.

    Args:
        digits: Digits of the number.
        trained, tested, examples, questions, seed: See :class:`~memformer_pl.data.corpora.noise.InNoise`.

    Raises:
        UsageError: A size is out of range, or a length is too short for the sentence.
    """

    sentence, question = "The passkey is {}.", "What is the passkey?"

    def __init__(
        self,
        *,
        digits: int = 5,
        trained: Sequence[int] = (128, 256),
        tested: Sequence[int] = (256, 1024, 4096, 16384),
        examples: int = 50_000,
        questions: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(trained=trained, tested=tested, examples=examples, questions=questions, seed=seed)
        require_sizes(digits=digits)
        self.digits = digits
        self.require_lengths()

    @property
    def baselines(self) -> Mapping[str, float]:
        """Chance of all digits."""
        return {"chance": 10.0**-self.digits}

    @property
    def words(self) -> Collection[str]:
        """The word for the number."""
        return ("passkey",)

    @property
    def needed(self) -> int:
        """Bytes of the sentence, the question and the answer."""
        return Hidden([self.sentence.format("0" * self.digits)], self.question, "0" * self.digits).size

    def hide(self, random: np.random.Generator) -> Hidden:
        """Draw the number."""
        key = "".join(map(str, random.integers(10, size=self.digits)))
        return Hidden([self.sentence.format(key)], self.question, key)
