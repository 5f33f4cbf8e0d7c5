"""A state of complex numbers, as of a diagonal recurrence, is learned through, watched and saved like any other."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from models import LANES, LENGTH, VOCAB, Case, assert_same, irregular, outcome, plain_loop, train_on
from torch import Tensor, nn

from memformer_pl.analysis.ablation import ways_for
from memformer_pl.analysis.through_time import gradient_norms
from memformer_pl.contract import Segment, SegmentModel, SegmentOutput, detach
from memformer_pl.gradients.grouped import replay_in_groups
from memformer_pl.gradients.rollout import GRADIENTS
from memformer_pl.inference import Session
from memformer_pl.training.nonfinite import reset_nonfinite

EXACT = ["replay", "sparse_replay", "bptt", "checkpointed"]


class Turning(NamedTuple):
    z: Tensor
    rough: Tensor
    count: Tensor


class Spiral(nn.Module):
    """A linear recurrence of complex numbers, beside one of real numbers in single precision and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.angle, self.enter = nn.Parameter(torch.randn(6)), nn.Linear(4, 6)
        self.turned = nn.Parameter(torch.randn(3, 6, dtype=torch.complex128))
        self.drop = nn.Dropout(0.2)

    def encode(self, x: Tensor, state: Turning) -> tuple[Turning, Turning]:
        into = torch.complex(self.drop(self.enter(x)), x.sum(1, keepdim=True).expand(-1, 6))
        z = torch.polar(torch.sigmoid(self.angle), self.angle) * state.z + into
        next_state = Turning(z.conj(), 0.5 * state.rough + z.real.float(), state.count + 1)
        return next_state._replace(z=z * self.angle), next_state

    def decode(self, _: object, encoded: list[Turning]) -> Tensor:
        return torch.stack([(e.z.abs().square() + e.z.imag).sum() + e.rough.sum() for e in encoded]).sum()

    def step(self, x: Tensor, state: Turning) -> tuple[Tensor, Turning]:
        encoded, next_state = self.encode(x, state)
        return self.decode([x], [encoded]), next_state


def spiral(horizon: int, *, graph: bool = True) -> Case:
    module = Spiral().double()
    z = module.turned * 2 if graph else module.turned.detach()
    state = Turning(z, torch.zeros(3, 6), torch.zeros(3, dtype=torch.int64))
    return Case(module, module.step, list(torch.randn(horizon, 3, 4).double()), state)


@pytest.mark.parametrize("graph", [False, True], ids=["state without graph", "state with graph"])
@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("name", EXACT)
def test_the_exact_gradients_flow_through_complex_numbers(name: str, horizon: int, graph: bool) -> None:
    build = partial(spiral, horizon, graph=graph)
    assert_same(outcome(GRADIENTS[name], build), outcome(plain_loop, build))


@pytest.mark.parametrize("group", [1, 2, 7])
@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_groups_pass_on_the_gradient_of_what_is_complex(horizon: int, group: int) -> None:
    built: list[Case] = []

    def build() -> Case:
        built.append(spiral(horizon))
        return built[0]

    def grouped(*_: object, **__: object) -> tuple[Tensor, Turning]:
        _, _, segments, state, _ = built[0]
        return replay_in_groups(built[0].module.encode, built[0].module.decode, segments, state, group=group)

    assert_same(outcome(grouped, build), outcome(plain_loop, partial(spiral, horizon)))


class Diagonal(SegmentModel[tuple[Tensor]]):
    """Carries complex numbers alone."""

    def __init__(self, *, vocab_size: int = VOCAB, segment_length: int = LENGTH) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        self.table, self.out = nn.Embedding(vocab_size, 6), nn.Linear(6, vocab_size)
        self.angle, self.began = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6, 2))

    def initial_state(self, lanes: int) -> tuple[Tensor]:
        return (torch.view_as_complex(self.began).expand(lanes, -1),)

    def step(self, segment: Segment, state: tuple[Tensor]) -> tuple[SegmentOutput, tuple[Tensor]]:
        logits = self.out(state[0].real)[:, None].expand(-1, segment.tokens.shape[1], -1)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), segment.tokens, reduction="none")
        read = (self.table(segment.tokens) * segment.token_mask[..., None]).sum(1)
        turned = torch.polar(torch.sigmoid(self.angle), self.angle) * state[0] + torch.complex(read, read.sin())
        losses = losses * segment.target_mask
        return SegmentOutput(losses, torch.zeros_like(segment.token_mask), losses.new_zeros(())), (turned,)


@pytest.fixture
def model() -> Diagonal:
    return Diagonal().double()


@pytest.mark.parametrize("name", EXACT)
def test_a_model_of_complex_state_learns_through_ragged_lanes_and_new_documents(name: str) -> None:
    def build() -> Case:
        model = Diagonal().double()
        return train_on(model, irregular(5), model.initial_state(LANES))

    assert_same(outcome(GRADIENTS[name], build), outcome(plain_loop, build))


def test_complex_numbers_are_a_memory(model: Diagonal) -> None:
    assert model.has_memory()
    assert ways_for(model, lanes=2) == ["on", "reset", "frozen", "shuffled"]


@pytest.mark.parametrize("broken", [complex(float("nan"), 0), complex(0, float("inf"))])
def test_a_lane_that_is_not_finite_in_either_part_is_reset(model: Diagonal, broken: complex) -> None:
    initial = detach(model.initial_state(3))
    next_state = (torch.ones(3, 6, dtype=torch.complex128),)
    next_state[0][1, 2] = broken
    (healed,), lost = reset_nonfinite(model, next_state, initial, like=torch.zeros(3).bool())
    assert lost == 1
    assert torch.equal(healed[::2], next_state[0][::2])
    assert torch.equal(healed[1], initial[0][1])


def test_the_gradient_with_regard_to_an_earlier_complex_state_is_measured(model: Diagonal) -> None:
    segments = [segment._replace(document_start=torch.zeros(LANES).bool()) for segment in irregular(3)]
    norms = gradient_norms(model, segments, model.initial_state(LANES))
    (z,) = entered = tuple(field.detach().requires_grad_() for field in model.initial_state(LANES))
    output, _ = model(segments[0], entered)
    (output.token_losses.sum(1) / segments[0].target_mask.sum(1).clamp(min=1)).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(torch.tensor(norms[:, 0, 0]), z.grad.abs().square().sum(1).sqrt(), rtol=1e-6, atol=0)
    assert (norms[0, 2] > 0).all()


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_a_session_saves_and_opens_complex_numbers_bit_for_bit(
    model: Diagonal, precision: torch.dtype, tmp_path: Path
) -> None:
    model = model.to(precision).eval()
    session = Session(model, lanes=2)
    session.feed(torch.arange(2 * (2 * LENGTH + 3)).view(2, -1) % VOCAB)
    session.save(tmp_path / "memory")
    opened = Session.load(model, tmp_path / "memory")
    assert session._position.state[0].is_complex()
    assert torch.equal(opened._position.state[0], session._position.state[0])
    assert torch.equal(opened.tokens_read, session.tokens_read)


def viewed(horizon: int) -> Case:
    """Carries views: an expanded field, a transposed one, and the same tensor twice; one loses its graph."""
    module = nn.Linear(4, 4).double()

    def step(x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        a, b, c, d = state
        h = torch.tanh(module(x) + a + b.mT + c * d)
        return (h * x).sum(), (h[:1].expand(4, -1), h.mT, h, h.detach())

    zero = torch.zeros(1, 1).double().expand(4, 4)
    return Case(module, step, list(torch.randn(horizon, 4, 4).double()), (zero, zero, zero, zero))


@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("name", EXACT)
def test_fields_that_share_their_memory_keep_their_gradient(name: str, horizon: int) -> None:
    assert_same(outcome(GRADIENTS[name], partial(viewed, horizon)), outcome(plain_loop, partial(viewed, horizon)))
