"""The answer is what was shown that many segments before, and accuracy by distance is right for known predictors."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning import Trainer
from models import losses_of, memformer, transformer, transformer_xl
from torch import Tensor, nn

from memformer_pl.callbacks import AccuracyByDistance
from memformer_pl.contract import Segment, SegmentModel, SegmentOutput
from memformer_pl.data import AssociativeRecall, Bytes, Copy, LaneLoader, PackedDocuments, pack
from memformer_pl.data.datamodule import SegmentData
from memformer_pl.training.metrics import accuracy_by_group
from memformer_pl.training.task import SegmentTask

LENGTH, TESTED = 8, [2, 3, 7]
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


def corpus(**sizes: Any) -> Copy:
    return Copy(**{"tested": TESTED, "longest": 4, "examples": 60, "questions": 16, **sizes})


def packed(cache: Path) -> PackedDocuments:
    return pack(corpus(), Bytes(), validation=0.0, test=0.0, cache=cache).train


def segments_of(content: bytes, length: int) -> list[Segment]:
    parts = torch.tensor(list(content))[None].split(length, dim=1)
    return [Segment(part, torch.ones_like(part).bool(), torch.tensor([t == 0])) for t, part in enumerate(parts)]


@pytest.mark.parametrize("shown", [1, 4, 7])
def test_the_answer_is_what_was_shown_and_a_cue_stands_one_segment_before(shown: int) -> None:
    for document in corpus(shown=shown).documents():
        text = document.content.decode()
        segments = [text[start : start + LENGTH] for start in range(0, len(text), LENGTH)]
        first, *noise, cue, answer = segments
        # only the shown letters and the answer are letters
        assert re.fullmatch(rf"[a-p]{{{shown}}}\d*", first)
        assert all(re.fullmatch(r"\d{8}", segment) for segment in noise)
        assert re.fullmatch(rf"[a-p\d]{{{shown}}}\d{{{7 - shown}}}\?", cue)
        literal = [letter for letter in cue if letter.isalpha()]
        assert literal == [letter for position, letter in enumerate(answer) if cue[position].isalpha()]
        assert not literal or document.split == "train"
        assert answer == first[:shown]
        assert document.prompt_length == len(text) - shown == LENGTH * (len(segments) - 1)
        assert document.name.endswith(f" at distance {len(segments) - 1}")


def test_training_has_every_distance_and_held_out_documents_have_the_tested_ones() -> None:
    distances = {"train": [], "validation": []}
    for document in corpus().documents():
        distances[document.split].append(document.prompt_length // LENGTH)
    assert len(distances["train"]) == 60
    assert set(distances["train"]) == {2, 3, 4}
    assert distances["validation"] == [distance for distance in TESTED for _ in range(16)]


@pytest.mark.parametrize(("nearest", "longest", "distances"), [(1.0, 4, {2}), (0.0, 4, {3, 4}), (0.0, 2, {2})])
def test_a_share_of_the_training_documents_has_the_smallest_distance(
    nearest: float, longest: int, distances: set[int]
) -> None:
    documents = corpus(nearest=nearest, longest=longest).documents()
    assert {document.prompt_length // LENGTH for document in documents if document.split == "train"} == distances


def test_documents_depend_on_the_arguments_alone() -> None:
    assert list(corpus().documents()) == list(corpus().documents())
    assert list(corpus(seed=1).documents()) != list(corpus().documents())
    assert corpus(seed=1).identity() != corpus().identity() == corpus().identity()


def test_packs_of_an_earlier_revision_are_not_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = corpus().identity()
    monkeypatch.setattr(Copy, "revision", Copy.revision + 1)
    assert corpus().identity() != before


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"shown": 8}, "shown must be below segment_length=8, .*got shown=8"),
        ({"letters": 27}, "letters must be at most 26, got 27"),
        ({"longest": 1}, "longest must be at least 2, got 1"),
        ({"tested": [2, 1]}, r"tested\[1\] must be at least 2, got 1"),
        ({"nearest": 1.5}, r"nearest must be from 0 to 1, got 1.5"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_impossible_arguments_of_copy_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corpus(**sizes)


@pytest.mark.parametrize(
    ("build", "reached"),
    [
        (partial(memformer, slots=3), {2, 3, 7, 32}),
        (partial(memformer, slots=0), set()),
        (partial(transformer, layers=2), set()),
        (partial(transformer_xl, layers=2, memory_length=LENGTH), {2}),  # a layer reaches one segment further back
        (partial(transformer_xl, layers=2, memory_length=3 * LENGTH), {2, 3}),
    ],
)
def test_an_answer_depends_on_what_was_shown_only_at_distances_that_a_model_can_reach(
    build: Callable[..., SegmentModel], reached: set[int]
) -> None:
    model, found = build(vocab_size=256, segment_length=LENGTH), set()
    for distance in (2, 3, 7, 32):
        *_, document = corpus(tested=[distance]).documents()
        answers = []
        for content in (document.content, b"aaaa" + document.content[4:]):
            answers.append(losses_of(model, segments_of(content, LENGTH))[-1])
        if not torch.equal(*answers):
            found.add(distance)
    assert found == reached


def lookup(**sizes: Any) -> AssociativeRecall:
    return AssociativeRecall(**{"tested": [3, 7], "longest": 4, "examples": 400, "questions": 100, **sizes})


@pytest.mark.parametrize(("segment_length", "pairs"), [(4, 4), (4, 2), (8, 3)])
def test_every_answer_is_the_value_of_its_key(segment_length: int, pairs: int) -> None:
    literals, in_order, few, pairs_at, positions = [], [], [], defaultdict(set), set()
    shortest = 1 + math.ceil(2 * pairs / segment_length)
    for document in lookup(segment_length=segment_length, pairs=pairs).documents():
        text = document.content.decode()
        *shown_segments, question, answer = [
            text[at : at + segment_length] for at in range(0, len(text), segment_length)
        ]
        assert len(shown_segments) + 1 == document.prompt_length // segment_length
        shown = "".join(shown_segments)
        training = document.split == "train"
        assert re.fullmatch(r"(?:[A-P][a-p]|\d\d)*" if training else r"(?:[A-P][a-p])*\d*", shown)
        found = dict(re.findall("([A-P])([a-p])", shown))
        assert len(found) == len(answer)
        if training:
            pairs_at[len(shown_segments) + 1].add(len(found))
            positions.update(position // 2 for position, letter in enumerate(shown) if letter.isupper())
            if len(shown_segments) + 1 == shortest:
                few.append(set(re.sub(r"\d", "", shown).lower()) <= set("abcdefgh"))
        else:
            assert len(found) == pairs
        asked, rest = question[: len(answer)], question[len(answer) :]
        assert re.fullmatch(r"\d*\?" if rest else "", rest)
        assert "".join(found.get(letter, letter) for letter in asked) == answer
        if training:
            literals.extend(letter.islower() for letter in asked)
        else:
            assert set(asked) == set(found)
            in_order.append(list(asked) == list(found))
    assert sum(literals) / len(literals) == pytest.approx(0.5, abs=0.06)
    assert 0 < sum(in_order) / len(in_order) < 2 / math.factorial(pairs)
    assert sum(few) / len(few) == pytest.approx(0.75, abs=0.1)
    assert set(pairs_at) == set(range(shortest, 5))
    assert all(numbers == set(range(2, pairs + 1)) for numbers in pairs_at.values())
    assert positions == set(range((shortest - 1) * segment_length // 2))


def test_the_baseline_of_values_without_their_keys_agrees_with_a_simulation() -> None:
    assert AssociativeRecall(pairs=1).values_only == 1
    # two values of two letters are the same half of the time: (3/4 + 1) / 2
    assert AssociativeRecall(pairs=2, values=2, few=2).values_only == pytest.approx(7 / 8)
    right = []
    for document in lookup(questions=2000, examples=1, tested=[3]).documents():
        left = list(document.content.decode()[-4:])
        for letter in left.copy():
            right.append(letter == max(sorted(set(left)), key=left.count))
            left.remove(letter)
    assert sum(right) / len(right) == pytest.approx(AssociativeRecall().values_only, abs=0.02)
    assert AssociativeRecall().baselines == {
        "chance": 1 / 16,
        "values without their keys": AssociativeRecall().values_only,
    }


def test_all_pairs_of_answers_are_equally_likely() -> None:
    after = Counter(
        document.content.decode()[-2:]
        for document in lookup(questions=8000, values=4, few=4, tested=[3]).documents()
        if document.split != "train"
    )
    assert len(after) == 16
    assert all(count / 8000 == pytest.approx(1 / 16, abs=0.012) for count in after.values())


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (partial(memformer, slots=3, associative=True), True),
        (partial(memformer, slots=0, associative=True), False),
        (partial(transformer, layers=2), False),
    ],
)
def test_only_a_model_with_memory_depends_on_the_values(build: Callable[..., SegmentModel], found: bool) -> None:
    model = build(vocab_size=256, segment_length=4)
    for distance in (3, 7):
        *_, document = lookup(tested=[distance]).documents()
        others = bytes(ord("a") if chr(letter).islower() else letter for letter in document.content[:8])
        a, b = (
            losses_of(model, segments_of(content, 4))[-1]
            for content in (document.content, others + document.content[8:])
        )
        assert torch.equal(a, b) is not found


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"segment_length": 5}, "segment_length must be even, so that no pair crosses a border of segments, got 5"),
        ({"pairs": 5}, "pairs must be at most 4, got 5"),
        ({"keys": 27}, "keys must be at most 26, got 27"),
        ({"few": 17}, "few must be at most 16, got 17"),
        ({"few": 3}, "few must be at least 4, got 3"),
        ({"longest": 2}, "longest must be at least 3, got 2"),
        ({"tested": [2]}, r"distance 2 is too short to show pairs=4, got tested=\[2\]"),
        ({"literal": 1.0}, "literal must be at least 0 and below 1, got 1.0"),
    ],
)
def test_impossible_arguments_of_associative_recall_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lookup(**sizes)


def answers(loader: LaneLoader) -> list[list[tuple[int, str]]]:
    """For each rollout, the document and the text of every answer."""
    return [
        [
            (int(document), bytes(segment.tokens[lane][segment.target_mask[lane]].tolist()).decode())
            for segment, documents in zip(rollout.segments, rollout.documents, strict=True)
            for lane, document in enumerate(documents)
            if segment.target_mask[lane].any()
        ]
        for rollout in loader
    ]


def test_a_pass_predicts_every_answer_once_and_nothing_else(tmp_path: Path) -> None:
    documents = packed(tmp_path)
    loader = LaneLoader(documents, batch_size=4, segment_length=LENGTH, horizon=3, shuffle=False)
    expected = [(number, documents.document(number)[-4:].tobytes().decode()) for number in range(len(documents))]
    assert sorted(answer for rollout in answers(loader) for answer in rollout) == expected


def test_ranks_share_the_answers_and_a_resumed_loader_continues_with_them(tmp_path: Path) -> None:
    sizes = {"batch_size": 4, "segment_length": LENGTH, "horizon": 3, "seed": 5}
    documents = packed(tmp_path)
    whole, *parts = (
        answers(LaneLoader(documents, **sizes, rank=rank, world_size=size)) for rank, size in ((0, 1), (0, 2), (1, 2))
    )
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(rollout) for rollout in whole]
    begun, resumed = LaneLoader(documents, **sizes), LaneLoader(documents, **sizes)
    for _, rollout in zip(range(2), begun, strict=False):
        assert rollout.segments[0].loss_mask is not None
    resumed.load_state_dict(begun.state_dict())
    assert answers(resumed) == whole[2:]


def test_accuracy_by_group_by_hand() -> None:
    nats, tokens, correct = [1.0, 1.0, 1.0, 1.0], [4.0, 6.0, 2.0, 0.0], [1.0, 4.0, 2.0, 0.0]
    found = accuracy_by_group(torch.tensor([nats, tokens, correct]).double(), torch.tensor([7, 7, 2, 9]))
    assert list(found) == [2, 7, 9]
    assert (found[2], found[7]) == (1.0, 0.5)
    assert found[9] != found[9]  # no token was predicted


class Shown(NamedTuple):
    tokens: Tensor


class Planted(SegmentModel[Shown]):
    """Predicts that the first segment of a document comes again, if it ``remembers``, or always ``aaaa``."""

    def __init__(self, *, vocab_size: int, segment_length: int, remembers: bool) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        self.remembers, self.weight = remembers, nn.Parameter(torch.zeros(1))

    def initial_state(self, lanes: int) -> Shown:
        return Shown(torch.full((lanes, self.segment_length), -1))

    def step(self, segment: Segment, state: Shown) -> tuple[SegmentOutput, Shown]:
        known = state.tokens if self.remembers else torch.full_like(state.tokens, ord("a"))
        correct = (known == segment.tokens) & segment.target_mask
        losses = torch.where(segment.target_mask & ~correct, 1.0, 0.0) + 0 * self.weight
        return SegmentOutput(losses, correct, losses.new_zeros(())), Shown(
            state.tokens.where(state.tokens >= 0, segment.tokens)
        )


def validate(folder: Path, *, remembers: bool = True, lanes: int = 8, segment_length: int = LENGTH) -> dict[int, float]:
    sizes: dict[str, Any] = {"batch_size": lanes, "horizon": 3, "validation": 0.0, "test": 0.0, "cache": folder}
    data = SegmentData(corpus=corpus(letters=16), tokenizer=Bytes(), segment_length=segment_length, **sizes)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[AccuracyByDistance()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Planted(vocab_size=256, segment_length=segment_length, remembers=remembers)
    trainer.validate(SegmentTask(model=model), datamodule=data, verbose=False)
    metrics = {name.partition("/"): float(value) for name, value in trainer.callback_metrics.items()}
    return {int(name): value for (kind, _, name), value in metrics.items() if kind == "distance"}


def test_a_model_that_remembers_is_always_right_and_one_that_guesses_is_at_chance(tmp_path: Path) -> None:
    assert validate(tmp_path) == dict.fromkeys(TESTED, 1.0)
    guessed = validate(tmp_path, remembers=False)
    letters = "".join(document.content.decode()[-4:] for document in corpus().documents() if document.split != "train")
    assert guessed == {d: letters[64 * n : 64 * (n + 1)].count("a") / 64 for n, d in enumerate(TESTED)}
    assert 0.0 < sum(guessed.values()) / 3 < 2 / 16


def test_the_batch_size_does_not_change_the_accuracy(tmp_path: Path) -> None:
    a, b = (validate(tmp_path, remembers=False, lanes=lanes) for lanes in (1, 5))
    assert a == b


def test_segments_of_another_length_than_the_corpus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="with prompts of whole segments of 6 tokens: give "):
        validate(tmp_path, segment_length=6)
