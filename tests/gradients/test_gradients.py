"""Every method in GRADIENTS: one signature, the same random numbers, and what each promises."""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from models import (
    Case,
    assert_same,
    full,
    irregular,
    largest_relative_difference,
    memformer,
    outcome,
    plain_loop,
    train_on,
)
from torch import Tensor

from memformer_pl.contract import State, detach
from memformer_pl.gradients.replay import Step, replay_backward
from memformer_pl.gradients.rollout import GRADIENTS

EXACT = ["replay", "sparse_replay", "bptt", "checkpointed"]


def rollout(dropout: float = 0.2) -> Case:
    """Three segments, entered in the middle of documents, with a graph that leads out of the rollout."""
    model = memformer(dropout=dropout)
    first, *rest = irregular(4)
    return train_on(model, rest, model(first, model.initial_state(4))[1])


def segment_by_segment(step: Step, segments: Sequence[Any], state: State, **_: object) -> tuple[Tensor, State]:
    """The gradient inside each segment, added up over segments."""
    total = torch.zeros((), dtype=torch.float64)
    for segment in segments:
        loss, next_state = step(segment, detach(state))
        loss.backward()
        total, state = total + loss.detach(), next_state
    return total, detach(state)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", EXACT)
def test_the_exact_ones_equal_a_plain_loop(name: str, dropout: float) -> None:
    build = partial(rollout, dropout)
    assert_same(outcome(GRADIENTS[name], build), outcome(plain_loop, build))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_truncated_is_the_gradient_inside_each_segment(dropout: float) -> None:
    build = partial(rollout, dropout)
    assert_same(outcome(GRADIENTS["truncated"], build), outcome(segment_by_segment, build))


def test_truncated_never_trains_the_writer_since_memory_is_read_one_segment_later() -> None:
    inside, exact = (outcome(GRADIENTS[name], rollout).grads for name in ("truncated", "bptt"))
    trained = {name for name, grad in exact.items() if grad is not None and grad.any()}
    assert trained - {name for name, grad in inside.items() if grad is not None and grad.any()} == {
        name for name in exact if name.startswith("writer.")
    }


def test_truncated_differs_where_memory_carries_a_gradient_and_only_there() -> None:
    def difference(slots: int) -> float:
        def build() -> Case:
            model = memformer(slots=slots)
            return train_on(model, full(3), model.initial_state(2))

        inside, exact = (outcome(GRADIENTS[name], build).grads for name in ("truncated", "bptt"))
        reached = [name for name, grad in inside.items() if grad is not None]
        return largest_relative_difference({n: inside[n] for n in reached}, {n: exact[n] for n in reached})

    assert difference(slots=0) < 1e-12
    assert difference(slots=3) > 1e-3


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_random_stream_is_left_where_a_plain_loop_leaves_it(name: str) -> None:
    stream = outcome(GRADIENTS[name], rollout).stream
    assert torch.equal(stream, outcome(plain_loop, rollout).stream)
    assert not torch.equal(stream, outcome(plain_loop, partial(rollout, 0.0)).stream)


@pytest.mark.parametrize("name", GRADIENTS)
def test_all_are_called_alike(name: str) -> None:
    assert str(inspect.signature(GRADIENTS[name])) == str(inspect.signature(replay_backward))


@pytest.mark.parametrize("name", GRADIENTS)
def test_no_graph_is_returned_and_no_argument_edited(name: str) -> None:
    model = memformer(dropout=0.2)
    case = train_on(model, irregular(3), detach(model(irregular(1)[0], model.initial_state(4))[1]))
    tensors = [*case.state, *(tensor for segment in case.segments for tensor in segment if isinstance(tensor, Tensor))]
    before = [tensor.clone() for tensor in tensors]
    loss, state = GRADIENTS[name](case.step, case.segments, case.state, advance=case.advance)
    assert not any(tensor.requires_grad for tensor in (loss, *state))
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("name", GRADIENTS)
def test_without_a_parameter_to_train_nothing_happens(name: str) -> None:
    case = rollout(0.0)
    case.module.requires_grad_(False)
    loss, _ = GRADIENTS[name](case.step, case.segments, detach(case.state), advance=case.advance)
    torch.testing.assert_close(loss, outcome(GRADIENTS[name], partial(rollout, 0.0)).loss)
    assert all(parameter.grad is None for parameter in case.module.parameters())


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_rollout_without_segments_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="segments is empty"):
        GRADIENTS[name](rollout().step, [], ())
