"""A segment that is known to continue in every lane: the same numbers without masks, and refused where it is wrong."""

from collections.abc import Callable

import pytest
import torch
from models import (
    LANES,
    LENGTH,
    MODELS,
    Case,
    Outcome,
    assert_same,
    full,
    largest_relative_difference,
    losses_of,
    make_segment,
    outcome,
    train_on,
)

from memformer_pl.contract import Segment, SegmentModel, State, concat_segments, detach
from memformer_pl.errors import UsageError
from memformer_pl.gradients.replay import replay_backward
from memformer_pl.models import Memformer

Build = Callable[..., SegmentModel]


@pytest.fixture(params=MODELS)
def build(request: pytest.FixtureRequest) -> Build:
    return MODELS[request.param]


def known(segments: list[Segment]) -> list[Segment]:
    """The same segments, with the knowledge that they continue."""
    return [segment._replace(continues=True) for segment in segments]


def middle() -> list[Segment]:
    """Three segments in the middle of documents, each after a full one; in the last, lanes end."""
    return [*full(3, lanes=LANES)[1:], make_segment([5, 3, 1, 4], seed=3)]


def entered(model: SegmentModel) -> State:
    """The state after a first full segment, without a graph."""
    first = full(1, lanes=LANES)[0]
    return detach(model.eval().advance(first, model.initial_state(LANES)))


def trained(build: Build, segments: list[Segment], dropout: float) -> Outcome:
    def case() -> Case:
        model = build(dropout=dropout)
        state = entered(model)
        return train_on(model.train(), segments, state)

    return outcome(replay_backward, case)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_losses_gradients_and_states_are_the_same(build: Build, dropout: float) -> None:
    plain, hinted = (trained(build, segments, dropout) for segments in (middle(), known(middle())))
    if isinstance(build(), Memformer):  # without a mask, attention runs another kernel, which rounds differently
        assert largest_relative_difference(hinted.grads, plain.grads) < 1e-12
        torch.testing.assert_close(hinted.loss, plain.loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(hinted.state, plain.state, rtol=1e-12, atol=1e-13)
        assert torch.equal(hinted.stream, plain.stream)
    else:
        assert_same(hinted, plain)
        assert largest_relative_difference(hinted.grads, plain.grads) == 0


def test_segments_that_are_shorter_than_the_longest_are_read_all_the_same(build: Build) -> None:
    model = build(segment_length=LENGTH + 2).eval()
    state = entered(model)
    for plain, hinted in zip(*(losses_of(model, each, state) for each in (middle(), known(middle()))), strict=True):
        assert torch.equal(plain, hinted)


@pytest.mark.parametrize("precision", ["autocast", "throughout"])
def test_in_bfloat16_a_state_keeps_its_types(build: Build, precision: str) -> None:
    model = build().to(torch.float32 if precision == "autocast" else torch.bfloat16)
    initial = state = model.initial_state(LANES)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        for segment in (full(1, lanes=LANES)[0], *known(middle())):
            _, state = model(segment, state)
    assert [field.dtype for field in state] == [field.dtype for field in initial]


def test_a_plain_tuple_is_a_state_here_too(build: Build) -> None:
    model, segment = build().eval(), known(middle())[0]
    state = entered(model)
    assert torch.equal(losses_of(model, [segment], tuple(state))[0], losses_of(model, [segment], state)[0])


def ways(model: SegmentModel) -> list[Callable[[Segment, State], object]]:
    """Every way into a model."""
    return [model, model.advance, *([model.advance_and_encode] if isinstance(model, Memformer) else [])]


@pytest.mark.parametrize(
    "wrong",
    [
        make_segment([5] * LANES, document_start=[0, 1, 0, 0]),
        make_segment([5, 5, 0, 5]),
        make_segment([5] * LANES, document_start=[1] * LANES),
    ],
    ids=["a lane starts", "a lane is empty", "all lanes start"],
)
def test_a_segment_that_does_not_continue_in_every_lane_is_refused(build: Build, wrong: Segment) -> None:
    model = build().eval()
    state = entered(model)
    for way in ways(model):
        way(wrong, state)
        with pytest.raises(UsageError, match=r"segment.continues is True, but a lane starts.*: leave it False"):
            way(wrong._replace(continues=True), state)


def test_concatenated_segments_continue_if_all_of_them_do() -> None:
    first, second, third = full(3)
    assert not concat_segments([first, second]).continues
    assert not concat_segments([first, *known([second])]).continues
    assert concat_segments(known([second, third])).continues
