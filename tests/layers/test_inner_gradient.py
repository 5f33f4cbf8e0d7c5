"""A memory that learns by gradient descent equals a loop that asks autograd for each gradient, in chunks of any length,
and so do the gradients through it."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from models import LargestTensor
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.layers.inner_gradient import Learned, Lessons, gelu_slope, learn, read_and_learn, read_within_chunk

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
LANES, HEADS, LENGTH, WIDTH = 2, 3, 7, 4


@pytest.fixture(params=[0, 5], ids=["a matrix", "two layers"])
def hidden(request: pytest.FixtureRequest) -> int:
    return int(request.param)


class Case(NamedTuple):
    learned: Learned
    queries: Tensor
    lessons: Lessons

    def fields(self) -> list[Tensor]:
        """All but which tokens exist."""
        return [*self.learned, self.queries, *self.lessons[:5]]

    def cut(self, first: int, last: int) -> "Case":
        """Some of the tokens."""
        lessons = Lessons(*(field[:, :, first:last] for field in self.lessons))
        return Case(self.learned, self.queries[:, :, first:last], lessons)


Results = tuple[Tensor, Learned]


def case(hidden: int, *, length: int = LENGTH, width: int = WIDTH) -> Case:
    """Random numbers with gradients."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(LANES, HEADS, *shape, dtype=torch.float64)

    shape = (2 if hidden else 1, width, hidden or width)
    queries, keys = (F.normalize(normal(length, width), dim=-1) for _ in range(2))
    theta, eta, kept = (normal(length, 1).sigmoid() for _ in range(3))
    lessons = Lessons(keys, normal(length, width), theta, eta.log(), kept.log(), torch.ones_like(theta))
    made = Case(Learned(normal(*shape), normal(*shape)), queries, lessons)
    for field in made.fields():
        field.requires_grad_()
    return made


def ask(weights: Tensor, x: Tensor) -> Tensor:
    """A memory as it is defined: weights ``[B, H, R, K, F]``, and ``x`` ``[B, H, K]``."""
    out = torch.einsum("bhk,bhkf->bhf", x, weights[:, :, 0])
    if weights.shape[2] == 1:
        return out
    hidden = 0.5 * out * (1 + torch.erf(out / 2**0.5)) / weights.shape[-1] ** 0.5
    return torch.einsum("bhf,bhkf->bhk", hidden, weights[:, :, 1])


def loop(made: Case, chunk: int) -> Results:
    """The recurrence as it is defined, token by token, with gradients by autograd."""
    (weights, momentum), read = made.learned, []
    first = weights
    for n in range(made.queries.shape[2]):
        key, value, theta, log_eta, log_kept = (field[:, :, n] for field in made.lessons[:5])
        first = weights if n % chunk == 0 else first
        loss = (ask(first, key) - value).square().sum()
        (surprise,) = torch.autograd.grad(loss, first, create_graph=True)
        momentum = log_eta.exp()[..., None, None] * momentum - theta[..., None, None] * surprise
        weights = log_kept.exp()[..., None, None] * weights + momentum
        read.append(ask(weights, made.queries[:, :, n]))
    return torch.stack(read, dim=2), Learned(weights, momentum)


def gradients(made: Case, results: Results) -> tuple[Tensor, ...]:
    """Of a sum in which every number counts differently."""
    read, learned = results
    torch.manual_seed(1)
    total = sum(((field * torch.randn_like(field)).sum() for field in learned), (read * torch.randn_like(read)).sum())
    return torch.autograd.grad(total, made.fields())


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 9])
def test_chunks_and_the_gradients_through_them_equal_the_loop_over_tokens(hidden: int, chunk: int) -> None:
    made = case(hidden)
    got, expected = read_and_learn(made.learned, made.queries, made.lessons, chunk=chunk), loop(made, chunk)
    close(got, expected)
    close(gradients(made, got), gradients(made, expected))


@pytest.mark.parametrize("chunk", [2, 3])
def test_the_chunk_changes_what_is_learned(hidden: int, chunk: int) -> None:
    made = case(hidden)
    at_once, one_by_one = (learn(made.learned, made.lessons, chunk=n).weights for n in (chunk, 1))
    assert not torch.isclose(at_once, one_by_one, rtol=1e-3).all(-1).any()


def test_a_chunk_read_in_pieces_is_the_chunk(hidden: int) -> None:
    made = case(hidden)
    expected = read_and_learn(made.learned, made.queries, made.lessons, chunk=LENGTH)
    read, learned = [], made.learned
    for first, last in ((0, 1), (1, 2), (2, 5), (5, LENGTH)):
        piece = made.cut(first, last)
        found, learned = read_within_chunk(made.learned.weights, learned, piece.queries, piece.lessons)
        read.append(found)
    close((torch.cat(read, dim=2), learned), expected)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_learning_without_reading_is_the_same_bit_for_bit(hidden: int, chunk: int) -> None:
    made = case(hidden)
    _, expected = read_and_learn(made.learned, made.queries, made.lessons, chunk=chunk)
    got = learn(made.learned, made.lessons, chunk=chunk)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("chunk", "momentum", "weight"), [(1, 2.0, 3.8), (2, 3.0, 4.8)])
def test_a_memory_of_one_number_by_hand(chunk: int, momentum: float, weight: float) -> None:
    """(k, v) = (1, 4) twice, with theta 1/4, eta 1/2, alpha 1/10. At first the gradient is -8, so S = W = 2. At W = 2
    it is -4: S = 1 + 1, W = 1.8 + 2; at the weights before both tokens -8 again: S = 1 + 2, W = 1.8 + 3."""
    one = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    zero = torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)
    lessons = Lessons(one, 4 * one, 0.25 * one, (0.5 * one).log(), (0.9 * one).log(), one)
    read, learned = read_and_learn(Learned(zero, zero), one, lessons, chunk=chunk)
    assert read.flatten().tolist() == pytest.approx([2.0, weight], rel=1e-15)
    assert learned.momentum.item() == pytest.approx(momentum, rel=1e-15)
    assert learned.weights.item() == pytest.approx(weight, rel=1e-15)


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("length", [0, 1, 5])
def test_absent_tokens_leave_weights_and_momentum_as_they_are(hidden: int, chunk: int, length: int) -> None:
    """The momentum is not zero: a token that only had no gradient would still add it to the weights."""
    made = case(hidden)
    token_mask = (torch.arange(LENGTH) < length).expand(LANES, -1)
    got = learn(made.learned, made.lessons.masked(token_mask), chunk=chunk)
    expected = learn(made.learned, made.cut(0, length).lessons, chunk=chunk) if length else made.learned
    close(got, expected)


def test_the_slope_of_gelu_is_that_of_autograd() -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.gelu(x).sum(), x, create_graph=True)
    close(gelu_slope(x), slope)
    close(*(torch.autograd.grad(s.sum(), x, retain_graph=True)[0] for s in (gelu_slope(x), slope)))


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_gates_that_are_wide_open_or_shut_give_finite_gradients(hidden: int, chunk: int) -> None:
    made = case(hidden)
    for sign in (-1, 1):
        gate = torch.full((LANES, HEADS, LENGTH, 1), 200.0 * sign, dtype=torch.float64, requires_grad=True)
        gates = (gate.sigmoid() / 10, F.logsigmoid(gate), F.logsigmoid(-gate))
        lessons = Lessons(*made.lessons[:2], *gates, made.lessons.exists)
        read, learned = read_and_learn(made.learned, made.queries, lessons, chunk=chunk)
        total = read.sum() + learned.weights.sum() + learned.momentum.sum()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(total, [gate, *made.learned, made.queries]))


def test_the_weights_after_each_token_are_never_made() -> None:
    made = case(40, length=16, width=16)
    weights = made.learned.weights.numel()
    with LargestTensor() as largest:
        read, learned = read_and_learn(made.learned, made.queries, made.lessons, chunk=16)
        (read.sum() + learned.weights.sum()).backward()
    assert weights <= largest.entries < 2 * weights
