"""Worlds with persons, places and objects: what happens in them, and questions that have one answer."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

Task = Literal["qa1", "qa2", "qa3", "qa4", "qa5"]
PERSONS = ("Anna", "Bruno", "Clara", "Denis")
PLACES = ("attic", "cellar", "garden", "kitchen", "orchard", "pantry")
OBJECTS = ("coin", "kettle", "lamp", "rope")
DIRECTIONS = ("north", "south", "east", "west")
WORDS = tuple(word.lower() for word in (*PERSONS, *PLACES, *OBJECTS))
LEAST_FACTS: dict[Task, int] = {"qa1": 1, "qa2": 2, "qa3": 3, "qa4": 2, "qa5": 1}
"""Sentences that a question of each task takes at least."""
KINDS: dict[Task, tuple[str, ...]] = {"qa1": PLACES, "qa2": PLACES, "qa3": PLACES, "qa4": PLACES, "qa5": PERSONS}
"""Answers; ``qa5`` also asks for objects, of which there are as many as persons."""


class Story(NamedTuple):
    """Sentences, a question, and its answer."""

    facts: list[str]
    question: str
    answer: str


def story(random: np.random.Generator, *, task: Task, facts: int) -> Story:
    """Draw a world, and one of the questions that it answers.

    Args:
        random: Stream of random numbers.
        task: What happens, and what is asked.
        facts: Most sentences.
    """
    if task == "qa4":
        return _neighbours(random)
    count = int(random.integers(LEAST_FACTS[task], facts, endpoint=True))
    while True:  # a short world may answer nothing: draw it again with as many sentences
        world = World()
        for _ in range(count):
            world.happen(random, task)
        if found := list(dict.fromkeys(world.questions(task))):
            question, answer = found[random.integers(len(found))]
            return Story(world.facts, question, answer)


def chance(task: Task) -> float:
    """Share of right answers of a guess among all words of the kind that is asked for."""
    return 1 / len(KINDS[task])


def longest(task: Task, facts: int) -> int:
    """Bytes that hold any story of a task: sentences, question and answer, a space between them and a full stop."""
    person, place, thing = (max(words, key=len) for words in (PERSONS, PLACES, OBJECTS))
    sentence, question = {
        "qa1": (_went(person, place), f"Where is {person}?"),
        "qa2": (_went(person, place), f"Where is the {thing}?"),
        "qa3": (_went(person, place), f"Where was the {thing} before the {place}?"),
        "qa4": (_is_of(place, "north", place), f"What is the {place} north of?"),
        "qa5": (_gave(person, thing, person), f"To whom did {person} give the {thing}?"),
    }[task]
    count = 2 if task == "qa4" else facts
    return (len(sentence) + 1) * count + len(question) + 1 + max(map(len, (place, person, thing))) + 1


class World:
    """Who is where, who holds what, and where each object has been."""

    def __init__(self) -> None:
        self.facts: list[str] = []
        self.places: dict[str, str] = {}
        self.holders: dict[str, str] = {}
        self.been: dict[str, list[str]] = {}
        self.gifts: list[tuple[str, str, str]] = []

    def happen(self, random: np.random.Generator, task: Task) -> None:
        """Let something happen that a task tells of, and that is possible."""
        if task == "qa5":
            self._give(random)
            return
        events = [("go", person, "") for person in PERSONS]
        if task != "qa1":
            events += [("drop", person, thing) for thing, person in self.holders.items()]
            pairs = [(person, thing) for person in self.places for thing in OBJECTS]
            events += [("take", person, thing) for person, thing in pairs if self._lies(thing, person)]
        # each kind is equally likely, so that objects are moved although there are more persons to go
        kinds = sorted({kind for kind, _, _ in events})
        kind = kinds[random.integers(len(kinds))]
        chosen = [event for event in events if event[0] == kind]
        _, person, thing = chosen[random.integers(len(chosen))]
        if kind == "go":
            self._go(person, str(random.choice([place for place in PLACES if place != self.places.get(person)])))
        elif kind == "take":
            self.facts.append(f"{person} took the {thing}.")
            self.holders[thing] = person
            self.been.setdefault(thing, [self.places[person]])
        else:
            self.facts.append(f"{person} left the {thing}.")
            del self.holders[thing]

    def questions(self, task: Task) -> Iterator[tuple[str, str]]:
        """Questions and answers; each question has one answer."""
        if task == "qa1":
            yield from ((f"Where is {person}?", place) for person, place in self.places.items())
        elif task == "qa2":
            yield from ((f"Where is the {thing}?", places[-1]) for thing, places in self.been.items())
        elif task == "qa3":
            for thing, places in self.been.items():
                for before, place in pairwise(places):
                    if places.count(place) == 1:
                        yield f"Where was the {thing} before the {place}?", before
        else:
            for giver, thing, taker in self.gifts:
                others = [gift for gift in self.gifts if gift != (giver, thing, taker)]
                if not any((o, t) == (thing, taker) for _, o, t in others):
                    yield f"Who gave the {thing} to {taker}?", giver
                if not any((g, t) == (giver, taker) for g, _, t in others):
                    yield f"What did {giver} give to {taker}?", thing
                if not any((g, o) == (giver, thing) for g, o, _ in others):
                    yield f"To whom did {giver} give the {thing}?", taker

    def _lies(self, thing: str, person: str) -> bool:
        """Whether an object lies where a person is; one that was never seen may lie anywhere."""
        return thing not in self.holders and (thing not in self.been or self.been[thing][-1] == self.places[person])

    def _go(self, person: str, place: str) -> None:
        self.facts.append(_went(person, place))
        self.places[person] = place
        for thing, holder in self.holders.items():
            if holder == person:
                self.been[thing].append(place)

    def _give(self, random: np.random.Generator) -> None:
        thing = str(random.choice(OBJECTS))
        giver = self.holders.get(thing) or str(random.choice(PERSONS))
        taker = str(random.choice([person for person in PERSONS if person != giver]))
        self.facts.append(_gave(giver, thing, taker))
        self.gifts.append((giver, thing, taker))
        self.holders[thing] = taker


def _neighbours(random: np.random.Generator) -> Story:
    """Three places in a row, told in any order; the one in the middle is asked about."""
    first, middle, last = map(str, random.choice(PLACES, 3, replace=False))
    direction = str(random.choice(DIRECTIONS))
    facts = [_is_of(first, direction, middle), _is_of(middle, direction, last)]
    facts = [facts[number] for number in random.permutation(2)]
    if random.random() < 0.5:
        return Story(facts, f"What is {direction} of the {middle}?", first)
    return Story(facts, f"What is the {middle} {direction} of?", last)


def _went(person: str, place: str) -> str:
    return f"{person} went to the {place}."


def _is_of(place: str, direction: str, other: str) -> str:
    return f"The {place} is {direction} of the {other}."


def _gave(giver: str, thing: str, taker: str) -> str:
    return f"{giver} gave the {thing} to {taker}."
