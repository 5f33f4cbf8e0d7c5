"""The share of asked values that B'MOJO sees follows from its window and from what it stores."""

from pathlib import Path
from typing import Any

import pytest

from memformer_pl.data.corpora.mqar import MQAR
from memformer_pl.models import BMojo

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXPERIMENTS / "recall" / "mqar" / "stored")
    import seen

    return seen


def share(seen: Any, **options: Any) -> float:
    """Of four values in 64 tokens, for a small model."""
    model = BMojo(vocab_size=128, dim=8, heads=2, layers=2, ffn_dim=8, segment_length=32, dropout=0.0, **options)
    found: float = seen.share_seen(model.eval(), length=64, pairs=4)
    return found


def test_a_question_and_its_value_are_found_among_the_pairs(seen: Any) -> None:
    tokens, asked, shown = seen.questions(MQAR(trained=[(4, 1, 1)], tested=[(64, 4, 8)], vocab_size=128))
    for distance in (0, 1):  # the value, and the key before it
        there, here = tokens.take_along_dim(shown - distance, dim=1), tokens.take_along_dim(asked - distance, dim=1)
        assert (there == here).all()
    assert (shown < 8).all()
    assert (asked >= 8).all()


@pytest.mark.parametrize(("window", "expected"), [(1, 0.0), (64, 1.0)])
def test_a_window_alone_sees_all_or_nothing(seen: Any, window: int, expected: float) -> None:
    assert share(seen, window=window, stored=0) == expected


@pytest.mark.parametrize(("stored", "values"), [(2, 0), (3, 1), (4, 1), (5, 2), (9, 4)])
def test_the_first_tokens_hold_as_many_values_as_fit_behind_the_start(seen: Any, stored: int, values: int) -> None:
    assert share(seen, window=1, stored=stored, picks="first") == values / 4


def test_the_last_tokens_that_left_a_window_are_a_longer_window(seen: Any) -> None:
    both = share(seen, window=4, stored=12, picks="recent")
    assert both == share(seen, window=16, stored=0)
    assert 0 < both < 1
