"""Memory replay gives the gradient of a plain loop, for any step in plain torch, in the memory of one segment."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from models import (
    STARTS,
    Case,
    assert_same,
    irregular,
    largest_relative_difference,
    memformer,
    outcome,
    plain_loop,
    train_on,
)
from torch import Tensor, nn

from memformer_pl.contract import State
from memformer_pl.gradients.replay import replay_backward, sparse_replay_backward
from memformer_pl.gradients.rollout import Gradient


class Recurrent(nn.Module):
    """An LSTM of two layers with dropout between them; lanes are ragged, start anew and have nothing to read."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, dropout=dropout, batch_first=True)
        self.out = nn.Linear(4, 3)
        self.began = nn.Parameter(torch.randn(2, 2, 4, 4))

    def step(self, segment: tuple[Tensor, Tensor, Tensor], state: State) -> tuple[Tensor, State]:
        inputs, token_mask, document_start = segment
        entering = tuple(torch.where(document_start[:, None], 0.0, field) for field in state)
        outputs, next_state = self.lstm(inputs, entering)
        wrong = (self.out(outputs) - inputs.flip(1)).square().sum(-1)
        reads = token_mask.any(1)[:, None]
        return (wrong * token_mask).sum(), tuple(
            torch.where(reads, a, b) for a, b in zip(next_state, entering, strict=True)
        )


def lstm(horizon: int, dropout: float, graph: bool) -> Case:
    module = Recurrent(dropout).double()
    segments = [
        (torch.randn(4, 5, 3).double(), segment.token_mask, segment.document_start) for segment in irregular(horizon)
    ]
    state = tuple(field.tanh() for field in module.began)
    return Case(module, module.step, segments, state if graph else tuple(field.detach() for field in state))


class Carried(NamedTuple):
    content: Tensor
    count: Tensor
    rough: Tensor


class Mixed(nn.Module):
    """Carries double precision, whole numbers and single precision; its loss takes more than its next state does."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.mix, self.out, self.drop = nn.Linear(8, 4), nn.Linear(4, 4), nn.Dropout(dropout)
        self.gain, self.began = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 3, 4))

    def advance(self, inputs: Tensor, state: State) -> State:
        content, count, rough = state
        mixed = torch.tanh(self.mix(torch.cat((inputs, content), dim=1)) * self.gain[count % 3])
        fields = self.drop(mixed), count + 1, 0.5 * rough + content.float()
        return Carried(*fields) if isinstance(state, Carried) else fields

    def step(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        next_state = self.advance(inputs, state)
        return (self.out(next_state[0]) - inputs).square().sum() + (next_state[2].double() * inputs).sum(), next_state


def mixed(horizon: int, dropout: float, graph: bool, *, kind: Callable[..., State]) -> Case:
    module = Mixed(dropout).double()
    content, rough = module.began.tanh() if graph else module.began.detach().tanh()
    state = kind((content, torch.tensor([0, 1, 5]), rough.float()))
    return Case(module, module.step, list(torch.randn(horizon, 3, 4).double()), state, module.advance)


def stateless(horizon: int, dropout: float, graph: bool) -> Case:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(dropout), nn.Linear(4, 1)).double()

    def step(inputs: Tensor, state: State) -> tuple[Tensor, State]:
        return module(inputs).square().sum(), state

    return Case(module, step, list(torch.randn(horizon, 3, 4).double()), (), lambda inputs, state: step(inputs, ())[1])


CASES: dict[str, Callable[[int, float, bool], Case]] = {
    "lstm": lstm,
    "mixed types in a named tuple": partial(mixed, kind=Carried._make),
    "mixed types in a plain tuple": partial(mixed, kind=tuple),
    "no state": stateless,
}


@pytest.mark.parametrize("graph", [False, True], ids=["state without graph", "state with graph"])
@pytest.mark.parametrize("with_advance", [False, True], ids=["whole step", "advance"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("name", CASES)
def test_replay_equals_a_plain_loop(name: str, horizon: int, dropout: float, with_advance: bool, graph: bool) -> None:
    build = partial(CASES[name], horizon, dropout, graph)
    assert_same(outcome(replay_backward, build, with_advance=with_advance), outcome(plain_loop, build))


@pytest.mark.parametrize("with_advance", [False, True], ids=["whole step", "advance"])
@pytest.mark.parametrize("horizon", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("name", CASES)
def test_sparse_replay_equals_a_plain_loop(name: str, horizon: int, with_advance: bool) -> None:
    build = partial(CASES[name], horizon, 0.2, True)
    assert_same(outcome(sparse_replay_backward, build, with_advance=with_advance), outcome(plain_loop, build))


def test_the_gradient_flows_on_into_what_made_the_entering_state_save_in_lanes_that_start_anew() -> None:
    without, began = (outcome(replay_backward, partial(lstm, 3, 0.0, graph)).grads["began"] for graph in (False, True))
    assert without is None
    assert began is not None
    assert (began != 0).all((0, 1, 3)).tolist() == [not start for start in STARTS[0]]


def test_early_segments_learn_from_a_loss_that_only_the_last_one_has() -> None:
    def only_the_last(case: Case) -> Case:
        def step(segment: tuple[int, Tensor], state: State) -> tuple[Tensor, State]:
            t, inputs = segment
            loss, next_state = case.step(inputs, state)
            return (loss if t == 3 else torch.zeros(())), next_state

        return case._replace(step=step, segments=list(enumerate(case.segments)), advance=None)

    def build() -> Case:
        return only_the_last(mixed(4, 0.2, True, kind=tuple))

    assert_same(outcome(replay_backward, build), outcome(plain_loop, build))


def in_bfloat16(function: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*args, **kwargs)

    return inside


@pytest.mark.parametrize("around_the_rollout", [True, False])
@pytest.mark.parametrize("slots", [0, 3])
def test_under_autocast_every_parameter_gets_a_gradient_that_is_right_to_rounding(
    slots: int, around_the_rollout: bool
) -> None:
    def build(seed: int) -> Case:
        torch.manual_seed(seed)
        model = memformer(slots=slots, dropout=0.2).float()
        return train_on(model, irregular(4), model.initial_state(4))

    def rounded(seed: int) -> Case:
        case = build(seed)
        return (
            case
            if around_the_rollout
            else case._replace(step=in_bfloat16(case.step), advance=in_bfloat16(case.advance))
        )

    for seed in range(5):
        replayed, expected = (
            outcome(in_bfloat16(gradient) if around_the_rollout else gradient, partial(rounded, seed)).grads
            for gradient in (replay_backward, plain_loop)
        )
        without = [name for name, grad in replayed.items() if grad is None or not grad.any()]
        assert without == ([] if slots else ["memory_norm.anchors"])  # which is empty then
        # Around each step both add up in single precision. Around the rollout the plain loop adds up
        # in bfloat16, and replay may differ from it by half of what that is off itself.
        bound = 1e-6
        if around_the_rollout:
            bound = largest_relative_difference(expected, outcome(plain_loop, partial(build, seed)).grads) / 2
        assert largest_relative_difference(replayed, expected) < bound


def test_frozen_parameters_get_no_gradient_and_the_others_the_same() -> None:
    def build() -> Case:
        case = lstm(3, 0.2, True)
        case.module.lstm.requires_grad_(False)
        return case

    replayed = outcome(replay_backward, build)
    assert all((grad is None) == name.startswith("lstm.") for name, grad in replayed.grads.items())
    assert_same(replayed, outcome(plain_loop, build))


def test_gradients_are_added_to_those_that_are_there() -> None:
    def build() -> Case:
        case = lstm(3, 0.0, True)
        for parameter in case.module.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        return case

    added = outcome(replay_backward, build).grads
    alone = outcome(plain_loop, partial(lstm, 3, 0.0, True)).grads
    assert largest_relative_difference({name: grad - 0.5 for name, grad in added.items()}, alone) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_replay_edits_no_argument_and_returns_no_graph(name: str) -> None:
    case = CASES[name](3, 0.2, False)
    tensors = [*case.state, *(tensor for segment in case.segments for tensor in segment)]
    before = [tensor.clone() for tensor in tensors]
    loss, state = replay_backward(case.step, case.segments, case.state)
    assert len(case.segments) == 3
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(tensors, before, strict=True))
    assert not any(tensor.requires_grad for tensor in (loss, *state))


def test_a_given_advance_is_all_that_runs_without_gradient() -> None:
    case = mixed(4, 0.0, False, kind=Carried._make)
    calls: list[tuple[str, bool]] = []

    def step(inputs: Tensor, state: State) -> tuple[Tensor, State]:
        calls.append(("step", torch.is_grad_enabled()))
        return case.step(inputs, state)

    def advance(inputs: Tensor, state: State) -> State:
        calls.append(("advance", torch.is_grad_enabled()))
        return case.advance(inputs, state)

    replay_backward(step, case.segments, case.state, advance=advance)
    assert calls == [("advance", False)] * 3 + [("step", True)] * 4


class SavedBytes:
    """Counts the bytes that graphs hold for their backward pass, and the most that they ever held at once."""

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> "SavedBytes.Held":
        held, size = self.Held(tensor), tensor.numel() * tensor.element_size()
        weakref.finalize(held, self.free, size)
        self.now += size
        self.peak = max(self.peak, self.now)
        return held

    def free(self, size: int) -> None:
        self.now -= size


def peak_of(gradient: Gradient, horizon: int) -> int:
    case, saved = lstm(horizon, 0.2, False), SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        gradient(case.step, case.segments, case.state)
    assert saved.now == 0
    return saved.peak


def test_replay_holds_the_graph_of_one_segment_at_a_time() -> None:
    of_a_segment = peak_of(replay_backward, 2)
    assert peak_of(replay_backward, 8) == of_a_segment
    assert peak_of(plain_loop, 8) == peak_of(plain_loop, 2) + 6 * of_a_segment


@pytest.mark.parametrize(("horizon", "most"), [(4, 4), (100, 20), (400, 40)])
def test_sparse_replay_holds_two_square_roots_of_all_states_and_the_graph_of_one_segment(
    horizon: int, most: int
) -> None:
    case = mixed(horizon, 0.2, False, kind=tuple)
    held, counts = set[int](), []

    def advance(inputs: Tensor, state: State) -> State:
        next_state = case.advance(inputs, state)
        weakref.finalize(next_state[0], held.discard, len(counts))
        held.add(len(counts))
        counts.append(len(held))
        return next_state

    sparse_replay_backward(case.step, case.segments, case.state, advance=advance)
    assert max(counts) <= most
    assert len(counts) < 2 * horizon
    assert not held
    assert peak_of(sparse_replay_backward, horizon) == peak_of(replay_backward, 2)
