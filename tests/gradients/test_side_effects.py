"""Buffers that change in a forward pass see every segment once and in order, whatever computes the gradient."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import Case, assert_same, irregular, memformer, outcome, plain_loop, train_on
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from memformer_pl.contract import State, detach
from memformer_pl.data.lanes import Rollout
from memformer_pl.gradients.replay import replay_backward
from memformer_pl.gradients.rng import RandomState
from memformer_pl.gradients.rollout import GRADIENTS, Gradient
from memformer_pl.gradients.side_effects import CONTAINER, SideEffects, modules_of
from memformer_pl.training.nonfinite import RolloutRecord, run_again

SECOND_PASS = ["replay", "sparse_replay", "checkpointed"]


class Averaged(nn.Module):
    """Takes off a running mean, which it replaces, beside buffers that are counted, expanded, absent, or constant."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.ones(1).expand(50))
        self.register_buffer("absent", None)
        self.register_buffer("table", torch.zeros(1000))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self.mean
        self.count += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return centred


class Codebook(Averaged):
    """Writes into its buffer behind torch's back."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self.mean
        self.mean.data.lerp_(x.detach().mean(0), 0.1)
        return centred


CHANGING: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(6),
    "cumulative batch norm": lambda: nn.BatchNorm1d(6, momentum=None),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(1)
    ),
    "spectral norm": lambda: spectral_norm(nn.Linear(6, 6)),
    "a buffer that is replaced": Averaged,
    "a buffer that is written to": Codebook,
}


def case(kind: str, horizon: int = 5) -> Case:
    module = nn.Sequential(nn.Linear(4, 6), CHANGING[kind]()).double()

    def step(x: Tensor, state: State) -> tuple[Tensor, State]:
        h = torch.tanh(module[1](module[0](x) + state[0]))
        return h.square().sum() + h.sum(), (h,)

    return Case(module, step, list(torch.randn(horizon, 8, 4).double()), (torch.zeros(8, 6).double(),))


def twice(gradient: Gradient, case: Case) -> tuple[Tensor, State]:
    """Two rollouts, the second from where the first ends."""
    _, state = gradient(case.step, case.segments, case.state)
    return gradient(case.step, case.segments, state)


def buffers_after(gradient: Gradient, build: Callable[[], Case]) -> tuple[Any, dict[str, Tensor]]:
    built: list[Case] = []

    def kept() -> Case:
        built.append(build())
        return built[0]

    found = outcome(lambda step, segments, state, **_: twice(gradient, built[0]), kept)
    return found, dict(built[0].module.named_buffers())


@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("kind", CHANGING)
@pytest.mark.parametrize("name", SECOND_PASS)
def test_buffers_and_gradients_are_those_of_a_plain_loop(name: str, kind: str, horizon: int) -> None:
    found, buffers = buffers_after(GRADIENTS[name], partial(case, kind, horizon))
    expected, wanted = buffers_after(plain_loop, partial(case, kind, horizon))
    assert_same(found, expected)
    assert list(buffers) == list(wanted)
    assert all(torch.equal(buffers[at], wanted[at]) for at in wanted)


def test_a_batch_norm_that_is_thawed_later_counts_from_there() -> None:
    frozen = case("batch norm")
    frozen.module.eval()
    replay_backward(frozen.step, frozen.segments, frozen.state)
    assert int(frozen.module[1].num_batches_tracked) == 0
    frozen.module.train()
    for count in (5, 10):
        replay_backward(frozen.step, frozen.segments, frozen.state)
        assert int(frozen.module[1].num_batches_tracked) == count


def test_a_constant_is_copied_in_its_first_rollout_alone_and_once() -> None:
    copies = []
    case_ = case("a buffer that is replaced")
    for _ in range(2):
        side_effects = SideEffects(case_.step)
        captured = [side_effects.buffers() for _ in range(3)]
        copies.append({buffer.value.data_ptr() for found in captured for buffer in found if buffer.name == "table"})
        case_.step(case_.segments[0], case_.state)
        side_effects.end_rollout()
    assert [len(of) for of in copies] == [1, 0]
    assert [buffer.name for buffer in SideEffects(case_.step).buffers()] == ["mean", "count"]


def test_a_constant_that_is_written_to_after_all_is_looked_at_again() -> None:
    case_ = case("a buffer that is replaced")
    replay_backward(case_.step, case_.segments, case_.state)
    assert "table" not in {buffer.name for buffer in SideEffects(case_.step).buffers()}
    case_.module[1].table.add_(1)
    assert "table" in {buffer.name for buffer in SideEffects(case_.step).buffers()}


def test_buffers_inside_a_model_of_segments_are_found() -> None:
    def build() -> Case:
        model = memformer()
        model.norm_ = nn.BatchNorm1d(8).double()
        write = model.writer.forward

        def through(memory: Tensor, *rest: Any) -> Any:
            return write(model.norm_(memory.transpose(1, 2)).transpose(1, 2), *rest)

        model.writer.forward = through
        return train_on(model, irregular(4), detach(model.initial_state(4)))

    for name in SECOND_PASS:
        found, buffers = buffers_after(GRADIENTS[name], build)
        expected, wanted = buffers_after(plain_loop, build)
        assert_same(found, expected)
        assert wanted["norm_.num_batches_tracked"] > 0
        assert all(torch.equal(buffers[at], wanted[at]) for at in wanted)


def test_a_skipped_rollout_that_is_run_again_moves_no_running_average() -> None:
    model, initial = memformer(), memformer().initial_state(4)
    model.watched = nn.BatchNorm1d(8).double()
    model.writer.register_forward_pre_hook(lambda module, args: [model.watched(args[0].flatten(0, 1))].clear())
    segments = tuple(irregular(3))
    rollout = Rollout(segments, torch.zeros(3, 4).long(), torch.zeros(3, 4).long(), 0)
    model(segments[0], initial)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before["watched.num_batches_tracked"] > 0
    run_again(model, RolloutRecord(0, rollout, detach(initial), RandomState.capture(initial), torch.zeros(())))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class Trainer:
    def __init__(self, net: nn.Module) -> None:
        self.parts = {"net": net}
        self.agent = Agent(net)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self.parts["net"](x).sum(), state


class Agent:
    def __init__(self, net: nn.Module) -> None:
        self.nets = [net]

    def __call__(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self.nets[0](x).sum(), state


NET = nn.BatchNorm1d(4)


def by_a_global(x: Tensor, state: State) -> tuple[Tensor, State]:
    return NET(x).sum(), state


def by_another_function(x: Tensor, state: State) -> tuple[Tensor, State]:
    return (lambda: by_a_global(x, state))()


def by_an_argument(net: nn.Module, x: Tensor, state: State) -> tuple[Tensor, State]:
    return net(x).sum(), state


def by_a_default(x: Tensor, state: State, *, net: nn.Module = NET) -> tuple[Tensor, State]:
    return net(x).sum(), state


@functools.wraps(by_a_global)
def wrapped(*args: Any) -> Any:
    return by_a_global(*args)


@pytest.mark.parametrize(
    "step",
    [
        by_a_global,
        by_another_function,
        by_a_default,
        wrapped,
        partial(by_an_argument, NET),
        Trainer(NET).step,
        Agent(NET),
        torch.autocast("cpu", enabled=False)(by_a_global),
        lambda x, state: Trainer(NET).step(x, state),
    ],
)
def test_a_module_is_found_by_whatever_way_a_step_refers_to_it(step: Any) -> None:
    assert modules_of(step) == [NET]
    before = int(NET.num_batches_tracked)
    replay_backward(step, list(torch.randn(4, 3, 4)), (torch.zeros(2),))
    assert int(NET.num_batches_tracked) == before + 4


def test_data_that_a_step_holds_is_not_searched() -> None:
    data = [NET] * (CONTAINER + 1)

    def step(x: Tensor, state: State) -> tuple[Tensor, State]:
        return x.sum() * len(data), state

    assert modules_of(step) == []
    assert modules_of(torch.nn.functional.mse_loss, len, None, torch) == []
