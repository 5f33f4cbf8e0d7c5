"""Losses of tokens: logits in pieces give the numbers of all at once, for every model and every gradient."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from models import (
    LANES,
    MODELS,
    VOCAB,
    Case,
    LargestTensor,
    assert_same,
    irregular,
    make_segment,
    memformer,
    outcome,
    plain_loop,
    train_on,
)
from torch import Tensor

from memformer_pl.contract import SegmentModel, SegmentOutput, State, detach
from memformer_pl.gradients.rollout import GRADIENTS, add_gradient
from memformer_pl.layers import cross_entropy, output_from_table

close = torch.testing.assert_close


@pytest.fixture(params=[1, VOCAB, 3 * VOCAB, 19 * VOCAB + 5], ids=lambda logits: f"{logits} logits")
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it splits all later logits into pieces of one row (also where less than one fits), 3 and 19."""
    return partial(monkeypatch.setattr, cross_entropy, "LARGEST", request.param)


def graded(x: Tensor, table: Tensor, *, dtype: torch.dtype | None = None) -> tuple[SegmentOutput, Tensor, Tensor]:
    """The output for an irregular segment, and both gradients of a loss that weighs each token otherwise."""
    x, table = x.detach().requires_grad_(), table.detach().requires_grad_()
    segment = make_segment([5, 3, 0, 5])
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        output = output_from_table(x, table, segment)
        (output.token_losses * torch.arange(1, 6)).sum().backward()
    assert x.grad is not None
    assert table.grad is not None
    return output, x.grad, table.grad


def test_pieces_are_the_whole_to_the_last_digits(pieces: Callable[[], None]) -> None:
    x, table = torch.randn(LANES, 5, 8).double(), torch.randn(VOCAB, 8).double()
    whole = graded(x, table)
    assert whole[0].correct.any()
    pieces()
    split = graded(x, table)
    assert torch.equal(split[0].correct, whole[0].correct)
    close((split[0].token_losses, *split[1:]), (whole[0].token_losses, *whole[1:]), rtol=1e-12, atol=1e-14)


def test_a_token_by_hand_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    # Logits log 1, log 2, log 5: the chances are 1/8, 2/8, 5/8, and the slope is each less one at the token.
    monkeypatch.setattr(cross_entropy, "LARGEST", 3)
    x = torch.ones(1, 2, 1).double().requires_grad_()
    table = torch.tensor([[1.0], [2.0], [5.0]]).double().log().requires_grad_()
    segment = make_segment([2])
    segment = segment._replace(tokens=torch.tensor([[1, 2]]), token_mask=segment.token_mask[:, :2])
    output = output_from_table(x, table, segment)
    output.token_losses.sum().backward()
    close(output.token_losses, torch.tensor([[4.0, 8 / 5]]).double().log())
    assert output.correct.tolist() == [[False, True]]
    close(table.grad, torch.tensor([[2 / 8], [4 / 8 - 1], [10 / 8 - 1]]).double())


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "throughout"])
def test_pieces_in_bfloat16_are_as_near_the_truth_as_the_whole(pieces: Callable[[], None], whole: bool) -> None:
    x, table = torch.randn(LANES, 5, 8).bfloat16(), torch.randn(VOCAB, 8).bfloat16()
    exact = graded(x.double(), table.double())
    given = (x, table) if whole else (x.float(), table.float())
    dtype = None if whole else torch.bfloat16
    at_once = graded(*given, dtype=dtype)
    pieces()
    split = graded(*given, dtype=dtype)
    assert [part.dtype for part in (split[0].token_losses, *split[1:])] == [
        torch.float32,
        given[0].dtype,
        given[1].dtype,
    ]
    for n in range(3):
        got, other, truth = ((output.token_losses, *grads)[n] for output, *grads in (split, at_once, exact))
        assert (got - truth).norm() < 1.2 * (other - truth).norm()


def test_autocast_keeps_no_table_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "LARGEST", VOCAB)
    table, x = torch.randn(VOCAB, 8, requires_grad=True), torch.randn(LANES, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            output_from_table(x, table, make_segment([5, 3, 0, 5]))
        torch.nn.functional.linear(x, table).sum().backward()
    assert table.grad is not None


def rollout(build: Callable[..., SegmentModel]) -> Case:
    model = build(dropout=0.2)
    return train_on(model, irregular(5), model.initial_state(LANES))


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_every_models_gradient_in_pieces_is_that_of_the_whole(
    build: Callable[..., SegmentModel], pieces: Callable[[], None]
) -> None:
    whole = outcome(plain_loop, partial(rollout, build))
    pieces()
    assert_same(outcome(plain_loop, partial(rollout, build)), whole)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_every_gradient_works_in_pieces(gradient: str, pieces: Callable[[], None]) -> None:
    whole = outcome(GRADIENTS[gradient], partial(rollout, memformer))
    pieces()
    assert_same(outcome(GRADIENTS[gradient], partial(rollout, memformer)), whole)


def test_groups_of_decoders_work_in_pieces(pieces: Callable[[], None]) -> None:
    def case() -> Case:
        model = memformer(dropout=0.2)
        return train_on(model, irregular(5), detach(model.initial_state(LANES)))

    built: list[Case] = []

    def grouped(*_: object, **__: object) -> tuple[Tensor, State]:
        model, _, segments, state, _ = built[0]
        assert isinstance(model, SegmentModel)
        return add_gradient(
            model, lambda output: output.token_losses.sum(), segments, state, gradient="replay", decoder_group=3
        )

    whole = outcome(plain_loop, case)
    pieces()
    assert_same(outcome(grouped, lambda: (built.append(case()), built[0])[1]), whole)


def test_no_more_logits_are_there_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    x, table = torch.randn(LANES, 5, 2), torch.randn(VOCAB, 2)
    monkeypatch.setattr(cross_entropy, "LARGEST", 4 * VOCAB)
    with LargestTensor() as largest:
        graded(x, table)
    assert largest.entries == 4 * VOCAB
    monkeypatch.setattr(cross_entropy, "LARGEST", LANES * 5 * VOCAB)
    with LargestTensor() as largest:
        graded(x, table)
    assert largest.entries == LANES * 5 * VOCAB


def test_a_token_that_is_not_in_the_table_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "LARGEST", VOCAB)
    segment = make_segment([5])
    segment.tokens[0, 2] = VOCAB
    with pytest.raises(IndexError, match="out of bounds"):
        output_from_table(torch.randn(1, 5, 8), torch.randn(VOCAB, 8), segment)
