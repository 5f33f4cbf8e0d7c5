"""Remember and Rewrite: what a document shows and asks, that only value and end are predicted, and the capacity."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Outcome

from memformer_pl.callbacks.accuracy_by_distance import distances
from memformer_pl.data import Bytes, LaneLoader, Remember, Rewrite, pack
from memformer_pl.data.corpora.remember import capacity

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
KINDS = [Remember, Rewrite]


def corpus(kind: type[Remember] = Remember, **sizes: Any) -> Remember:
    return kind(**{"pairs": 6, "tested": [1, 7, 16], "examples": 60, "questions": 20, **sizes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("key_length", "value_length"), [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_dictionary_answers_everything_right(
    kind: type[Remember], key_length: int, value_length: int, seed: int
) -> None:
    made, shown_again, changed = corpus(kind, key_length=key_length, value_length=value_length, seed=seed), 0, 0
    unit = key_length + value_length + 2
    assert made.segment_length == unit
    for document in made.documents():
        text = document.content.decode()
        *shown, question = [text[at : at + unit] for at in range(0, len(text), unit)]
        pairs = [(part[:key_length], part[key_length + 1 : -1]) for part in shown]
        assert all(part == f"{key}:{value}," for part, (key, value) in zip(shown, pairs, strict=True))
        assert set("".join(key + value for key, value in pairs)) <= set("0123456789abcdef")
        asked, known = question[:key_length], dict(pairs)
        ((begin, end),) = document.answers
        assert text[begin:end] == f"{known[asked]},"
        assert question == f"{asked}-{text[begin:end]}"
        assert (document.prompt_length, end) == (len(shown) * unit, len(text))
        first = dict(reversed(pairs))
        changed += first[asked] != known[asked]
        shown_again += len(pairs) - len(known)
    # with one symbol there are 16 keys: 16 draws show about 6 of them again
    assert (shown_again > 100 and changed > 0) if (kind, key_length) == (Rewrite, 1) else shown_again < 60
    assert kind is Rewrite or shown_again == changed == 0


@pytest.mark.parametrize("kind", KINDS)
def test_each_number_of_pairs_is_trained_and_the_given_ones_are_tested(kind: type[Remember]) -> None:
    train, held_out = (
        [document for document in corpus(kind, examples=600).documents() if document.split == split]
        for split in ("train", "validation")
    )
    counts = np.bincount([document.prompt_length // 4 for document in train], minlength=7)
    assert counts[0] == 0
    assert all(60 < count < 140 for count in counts[1:])  # 100 each, four standard errors
    assert [document.prompt_length // 4 for document in held_out] == [1] * 20 + [7] * 20 + [16] * 20


def test_every_key_that_occurs_is_asked_for_equally_often() -> None:
    """Where two of three pairs share a key, that key is asked for in half of the documents, not in two thirds."""
    asked_twice = []
    for document in corpus(Rewrite, tested=[3], questions=12_000, examples=1).documents():
        *keys, asked = document.content[::4].decode()
        if len(keys) == 3 and len(set(keys)) == 2:
            asked_twice.append(keys.count(asked) == 2)
    assert len(asked_twice) > 1500
    assert np.mean(asked_twice) == pytest.approx(0.5, abs=0.05)  # four standard errors


def test_documents_depend_on_the_arguments_alone_and_held_out_ones_not_on_training() -> None:
    assert list(corpus().documents()) == list(corpus().documents()) != list(corpus(Rewrite).documents())
    assert list(corpus(seed=1).documents()) != list(corpus().documents())
    assert corpus(seed=1).identity() != corpus().identity() == corpus().identity() != corpus(Rewrite).identity()
    held_out, others = (
        [document for document in each.documents() if document.split == "validation"]
        for each in (corpus(), corpus(pairs=2, examples=3))
    )
    assert held_out == others


@pytest.mark.parametrize("kind", KINDS)
def test_the_data_predicts_value_and_end_alone_and_a_distance_is_the_number_of_pairs(
    kind: type[Remember], tmp_path: Path
) -> None:
    made = corpus(kind, value_length=2)
    documents = pack(made, Bytes(), validation=0.0, test=0.0, cache=tmp_path).validation
    loader = LaneLoader(documents, batch_size=4, segment_length=5, horizon=3, shuffle=False)
    predicted: dict[int, str] = {}
    for rollout in loader:
        for segment, read in zip(rollout.segments, rollout.documents, strict=True):
            for lane, at in segment.target_mask.nonzero().tolist():
                document = int(read[lane])
                predicted[document] = predicted.get(document, "") + chr(int(segment.tokens[lane, at]))
    held_out = [document for document in made.documents() if document.split == "validation"]
    assert predicted == {n: document.content[-3:].decode() for n, document in enumerate(held_out)}
    assert distances(loader).tolist() == [1] * 20 + [7] * 20 + [16] * 20


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pairs": 17}, "pairs must be at most 16, .* with key_length=1, got 17: use a key_length of 2"),
        ({"tested": [3, 300], "key_length": 2}, r"tested\[1\] must be at most 256, .* got 300: use a key_length of 3"),
        ({"tested": [0]}, r"tested\[0\] must be at least 1, got 0"),
        ({"pairs": 0}, "pairs must be at least 1, got 0"),
        ({"key_length": 9}, "key_length must be at most 8, got 9"),
        ({"value_length": 0}, "value_length must be at least 1, got 0"),
        ({"examples": 0}, "examples must be at least 1"),
        ({"questions": 0}, "questions must be at least 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_impossible_arguments_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        corpus(**sizes)


def test_rewrite_has_more_pairs_than_keys() -> None:
    lengths = {len(document.content) for document in corpus(Rewrite, pairs=1, tested=[100]).documents()}
    assert lengths == {8, 404}


def test_capacity_by_hand() -> None:
    assert capacity(pairs=10, accuracy=1.0) == 10
    assert capacity(pairs=10, accuracy=1 / 16) == 0
    # 8 of 10 pairs known, the others guessed: 0.8 + 0.2 / 16
    assert capacity(pairs=10, accuracy=0.8 + 0.2 / 16) == pytest.approx(8)
    assert capacity(pairs=10, accuracy=0.8 + 0.2 / 256, value_length=2) == pytest.approx(8)
    assert corpus(value_length=2).baselines == {"chance": 1 / 256}


def test_the_experiment_takes_a_step(command: Callable[..., Outcome], tmp_path: Path, pack_cache: Path) -> None:
    small = ["--data.batch_size=2", "--model.model.init_args.dim=16", "--model.model.init_args.heads=2"]
    documents = ["--data.corpus.examples=20", "--data.corpus.questions=2"]
    steps = ["--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.num_sanity_val_steps=0"]
    where = [f"--data.cache={pack_cache}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    quietly = ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
    outcome = command(
        "fit", f"--config={EXPERIMENTS / 'remember' / 'base.yaml'}", *small, *documents, *steps, *quietly, *where
    )
    assert outcome.code == 0
    found = [line.split() for line in outcome.output.splitlines() if "│" in line and "." in line]
    assert [row[1] for row in found[-3:]] == ["1", "2", "3"]
