"""Facts to be known by heart: what a document is, that only the value is predicted, and which facts are validated."""

from pathlib import Path

import pytest

from memformer_pl.data import Bytes, KeyedFacts, LaneLoader, pack
from memformer_pl.errors import UsageError


def test_a_document_is_a_key_of_three_bytes_and_a_value() -> None:
    documents = list(KeyedFacts(facts=500).documents())
    keys = {document.content[:3] for document in documents}
    assert len(keys) == 500
    assert {len(document.content) for document in documents} == {4}
    assert len({document.content[3] for document in documents}) > 200
    assert {document.prompt_length for document in documents} == {3}


def test_the_facts_of_validation_are_those_of_training() -> None:
    documents = list(KeyedFacts(facts=50).documents())
    split = [[each.content for each in documents if each.split == name] for name in ("train", "validation")]
    assert split[0] == split[1]
    assert len(split[0]) * 2 == len(documents)


def test_the_seed_decides_keys_and_values() -> None:
    contents = [[each.content for each in KeyedFacts(facts=20, seed=seed).documents()] for seed in (0, 0, 1)]
    assert contents[0] == contents[1]
    assert not set(contents[0]) & set(contents[2])


def test_only_the_value_is_predicted(tmp_path: Path) -> None:
    packed = pack(KeyedFacts(facts=6), Bytes(), validation=0.0, test=0.0, cache=tmp_path)
    loader = LaneLoader(packed.validation, batch_size=6, segment_length=4, horizon=1, shuffle=False)
    (rollout,) = loader
    (segment,) = rollout.segments
    assert segment.target_mask.tolist() == [[False] * 3 + [True]] * 6
    assert segment.document_start.all()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"facts": 0}, "facts must be at least 1, got 0"),
        ({"facts": 1 << 21}, "facts must be at most 1,048,576, got 2097152"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        KeyedFacts(**sizes)
