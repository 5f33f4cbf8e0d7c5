"""Facts in noise: an oracle that reads the sentences answers every question, and all else is prose."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from memformer_pl.callbacks.accuracy_by_distance import distances
from memformer_pl.data import Bytes, Document, FactsInNoise, LaneLoader, Passkey, pack
from memformer_pl.data.corpora.noise import InNoise, enough, sentences
from memformer_pl.data.corpora.worlds import OBJECTS, PERSONS, PLACES, WORDS, Task

TASKS = get_args(Task)
PERSON, PLACE, THING = ("|".join(words) for words in (PERSONS, PLACES, OBJECTS))
FACT = re.compile(
    rf"({PERSON}) (went to) the ({PLACE})\.|({PERSON}) (took|left) the ({THING})\.|"
    rf"The ({PLACE}) (is \w+ of) the ({PLACE})\.|({PERSON}) (gave) the ({THING}) to ({PERSON})\."
)


def corpus(task: str = "qa1", **sizes: Any) -> FactsInNoise:
    given = {"facts": 8, "trained": [320, 400], "tested": [320, 640, 1280], "examples": 150, "questions": 10}
    return FactsInNoise(**{"task": task, **given, **sizes})


def passkey(**sizes: Any) -> Passkey:
    return Passkey(**{"trained": [64, 130], "tested": [64, 256, 1024], "examples": 60, "questions": 10, **sizes})


def split_up(document: Document) -> tuple[str, str, str]:
    """Text, question and answer of a document."""
    text, ((begin, end),) = document.content.decode(), document.answers
    body, question = re.fullmatch(r"(.*?)([A-Z][^.]*\?) ", text[:begin], flags=re.DOTALL).groups()  # type: ignore[union-attr]
    assert (end, document.prompt_length) == (len(text), begin)
    assert text.endswith(".")
    return body, question, text[begin : end - 1]


def facts_in(text: str) -> list[list[str]]:
    return [[part for part in found.groups() if part] for found in FACT.finditer(text)]


def oracle(text: str, question: str) -> list[str]:
    """All answers that the sentences allow."""
    at: dict[str, str] = {}
    held: dict[str, str] = {}
    been: dict[str, list[str]] = {}
    relations, gifts = [], []
    for first, verb, *rest in facts_in(text):
        if verb == "went to":
            at[first] = rest[0]
            for thing in (thing for thing, holder in held.items() if holder == first):
                been[thing].append(rest[0])
        elif verb == "took":
            assert rest[0] not in held
            assert been.setdefault(rest[0], [at[first]])[-1] == at[first]  # it lies where the person is
            held[rest[0]] = first
        elif verb == "left":
            assert held.pop(rest[0]) == first
        elif verb == "gave":
            assert held.get(rest[0], first) == first != rest[1]
            held[rest[0]] = rest[1]
            gifts.append((first, *rest))
        else:
            relations.append((first, verb.split()[1], rest[0]))
    if found := re.fullmatch(rf"Where is ({PERSON})\?", question):
        return [at[found[1]]]
    if found := re.fullmatch(rf"Where is the ({THING})\?", question):
        return [been[found[1]][-1]]
    if found := re.fullmatch(rf"Where was the ({THING}) before the ({PLACE})\?", question):
        return [before for before, place in pairwise(been[found[1]]) if place == found[2]]
    if found := re.fullmatch(rf"What is (\w+) of the ({PLACE})\?", question):
        return [a for a, direction, b in relations if (direction, b) == (found[1], found[2])]
    if found := re.fullmatch(rf"What is the ({PLACE}) (\w+) of\?", question):
        return [b for a, direction, b in relations if (a, direction) == (found[1], found[2])]
    if found := re.fullmatch(rf"Who gave the ({THING}) to ({PERSON})\?", question):
        return sorted({giver for giver, thing, taker in gifts if (thing, taker) == (found[1], found[2])})
    if found := re.fullmatch(rf"What did ({PERSON}) give to ({PERSON})\?", question):
        return sorted({thing for giver, thing, taker in gifts if (giver, taker) == (found[1], found[2])})
    found = re.fullmatch(rf"To whom did ({PERSON}) give the ({THING})\?", question)
    assert found, question
    return sorted({taker for giver, thing, taker in gifts if (giver, thing) == (found[1], found[2])})


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_an_oracle_that_reads_the_sentences_answers_every_question(task: str, seed: int) -> None:
    answers, counts = set(), set()
    for document in corpus(task, seed=seed).documents():
        text, question, answer = split_up(document)
        assert oracle(text, question) == [answer]
        assert re.fullmatch(r"[A-Za-z]+", answer)
        answers.add(answer)
        counts.add(len(facts_in(text)))
    assert answers == {*(PLACES if task != "qa5" else (*PERSONS, *OBJECTS))}
    least = {"qa1": 1, "qa2": 2, "qa3": 3, "qa5": 1}
    assert counts == ({2} if task == "qa4" else set(range(least[task], 9)))


def noise_of(text: str) -> Iterator[str]:
    """The stretches between facts, or between the sentences of a passkey."""
    yield from re.split(rf"{FACT.pattern.replace('(', '(?:')} ?|The passkey is \d+\. ", text)


@pytest.mark.parametrize("made", [corpus("qa2"), corpus("qa5"), passkey()], ids=["qa2", "qa5", "passkey"])
def test_documents_have_their_length_and_all_else_is_consecutive_prose_of_their_split(made: InNoise) -> None:
    lengths = {"train": made.trained, "validation": made.tested}
    prose = {split: sentences(split=split, without=frozenset(made.words)) for split in lengths}
    circle = {split: " ".join([*found, *found]) for split, found in prose.items()}
    seen = set()
    for document in made.documents():
        text, _, _ = split_up(document)
        assert len(document.content) in lengths[document.split]
        seen.add(len(document.content))
        noise = " ".join(part.strip() for part in noise_of(text) if part.strip())
        assert noise in circle[document.split]
    assert seen == {*made.trained, *made.tested}


def test_the_noise_of_held_out_documents_is_from_other_topics_and_has_no_word_of_a_world() -> None:
    train, held_out = (sentences(split=split, without=frozenset(WORDS)) for split in ("train", "validation"))
    assert not set(train) & set(held_out)
    assert min(len(train), len(held_out)) > 300
    assert min(map(len, train)) > 30
    assert not set(re.findall(r"\w+", " ".join(train + held_out).lower())) & set(WORDS)
    word = re.findall(r"\w+", train[5].lower())[2]
    assert train[5] not in sentences(split="train", without=frozenset([*WORDS, word]))


@pytest.mark.parametrize("room", [0, 1, 2, 40, 41, 42, 43, 82, 83, 300])
def test_noise_takes_exactly_its_room_and_only_the_first_sentence_is_cut(room: int) -> None:
    noise = ["A" * 40 + ".", "B" * 40 + ".", "C" * 40 + "."]
    taken = enough(noise, room, last=0)
    assert sum(len(sentence) + 1 for sentence in taken) == room
    assert all(sentence in noise for sentence in taken[1:])
    assert not taken or any(sentence.endswith(taken[0]) for sentence in noise)
    assert not taken or taken[-1] == "" or taken[-1][-2:] in ("A.", ".")


def test_facts_lie_anywhere() -> None:
    """The place of a passkey in a long document is spread evenly: in every fifth of it lies a fifth of them."""
    made = passkey(tested=[16384], questions=1000)
    found = [document.content.find(b"The passkey") for document in made.documents() if document.split == "validation"]
    shares = np.histogram(found, bins=5, range=(0, 16384))[0] / 1000
    assert np.allclose(shares, 0.2, atol=0.05)  # four standard errors


def test_a_passkey_is_what_the_sentence_says() -> None:
    keys = set()
    for document in passkey(digits=3).documents():
        text, question, answer = split_up(document)
        assert question == "What is the passkey?"
        assert re.findall(r"The passkey is (\d{3})\. ", text) == [answer]
        keys.add(answer)
    assert len(keys) > 60
    assert passkey(digits=3).baselines == {"chance": pytest.approx(0.001)}


def test_chance_is_one_in_all_words_that_may_be_the_answer() -> None:
    assert [corpus(task).baselines["chance"] for task in TASKS] == [1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 4]


@pytest.mark.parametrize("make", [corpus, passkey])
def test_documents_depend_on_the_arguments_alone_and_held_out_ones_not_on_training(make: Any) -> None:
    assert list(make().documents()) == list(make().documents()) != list(make(seed=1).documents())
    assert make().identity() == make().identity() != make(seed=1).identity()
    assert make().identity()["noise"]["python"]
    held_out, others = (
        [document for document in each.documents() if document.split == "validation"]
        for each in (make(), make(trained=[330], examples=3))
    )
    assert held_out == others


@pytest.mark.parametrize("make", [corpus, passkey])
def test_only_the_answer_is_predicted_and_its_distance_is_the_length_in_segments(make: Any, tmp_path: Path) -> None:
    made = make(tested=[320, 640])
    documents = pack(made, Bytes(), validation=0.0, test=0.0, cache=tmp_path).validation
    loader = LaneLoader(documents, batch_size=4, segment_length=32, horizon=3, shuffle=False)
    predicted: dict[int, str] = {}
    for rollout in loader:
        for segment, read in zip(rollout.segments, rollout.documents, strict=True):
            for lane, at in segment.target_mask.nonzero().tolist():
                document = int(read[lane])
                predicted[document] = predicted.get(document, "") + chr(int(segment.tokens[lane, at]))
    held_out = [document for document in made.documents() if document.split == "validation"]
    assert predicted == {n: f"{split_up(document)[2]}." for n, document in enumerate(held_out)}
    assert distances(loader).tolist() == [9] * 10 + [19] * 10


@pytest.mark.parametrize("task", TASKS)
def test_the_shortest_length_that_is_allowed_holds_every_document(task: str) -> None:
    with pytest.raises(ValueError, match=r"trained\[1\] is too short") as refused:
        corpus(task, trained=[10_000, 20])
    least = int(re.findall(r"at least (\d+) bytes", str(refused.value))[0])
    assert all(len(d.content) == least for d in corpus(task, trained=[least], tested=[least], examples=300).documents())
    with pytest.raises(ValueError, match=rf"tested\[0\] is too short .* at least {least} bytes, got {least - 1}"):
        corpus(task, tested=[least - 1])


@pytest.mark.usefixtures("no_type_checks")
@pytest.mark.parametrize(
    ("make", "sizes", "message"),
    [
        (corpus, {"task": "qa6"}, "task must be one of qa1, qa2, qa3, qa4, qa5, got 'qa6'"),
        (corpus, {"task": "qa3", "facts": 2}, "facts must be at least 3, got 2"),
        (corpus, {"facts": 101}, "facts must be at most 100, got 101"),
        (corpus, {"trained": []}, "trained must have at least one length, got none"),
        (corpus, {"examples": 0}, "examples must be at least 1"),
        (corpus, {"questions": 0}, "questions must be at least 1"),
        (corpus, {"seed": -1}, "seed must be at least 0, got -1"),
        (passkey, {"digits": 0}, "digits must be at least 1, got 0"),
        (passkey, {"trained": [48]}, r"trained\[0\] is too short for the sentences, .*: use at least 49 bytes, got 48"),
    ],
)
def test_impossible_arguments_are_refused(make: Any, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**sizes)


def test_more_noise_than_there_is_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"only \d+ bytes of noise for the validation documents, got a length of 1000000"
    ):
        list(passkey(tested=[1_000_000]).documents())
