"""The LSTM: its step by hand, what a border of segments is to it, and what its gradient reaches."""

from typing import Any

import pytest
import torch
from models import (
    LANES,
    LENGTH,
    VOCAB,
    Case,
    assert_same,
    full,
    irregular,
    largest_relative_difference,
    losses_of,
    lstm,
    make_segment,
    outcome,
    plain_loop,
    train_on,
    untouched,
)
from torch import nn
from torch.nn import functional as F

from memformer_pl.contract import ABSENT, Segment, state_bytes
from memformer_pl.gradients.rollout import GRADIENTS
from memformer_pl.models import LSTM

close = torch.testing.assert_close


def test_two_tokens_by_the_equations_of_its_gates() -> None:
    model, segment = lstm(), make_segment([2], document_start=[1])
    x_LD = model.embedding(segment.tokens[:, :-1])[0]
    hidden, cell = torch.zeros(2, 8).double(), torch.zeros(2, 8).double()
    logits = []
    for x in x_LD[:2]:
        for n, layer in enumerate(model.blocks):
            entering = layer.weight_ih_l0 @ x + layer.bias_ih_l0 + layer.weight_hh_l0 @ hidden[n] + layer.bias_hh_l0
            let_in, keep, new, let_out = entering.chunk(4)
            cell[n] = keep.sigmoid() * cell[n] + let_in.sigmoid() * new.tanh()
            hidden[n] = x = let_out.sigmoid() * cell[n].tanh()
        logits.append(F.layer_norm(x, (8,), bias=model.embedding.norm.bias) @ model.embedding.tokens.weight.T)
    output, state = model(segment, model.initial_state(1))
    close(output.token_losses[0, :2], F.cross_entropy(torch.stack(logits), segment.tokens[0, :2], reduction="none"))
    close(state.hidden[0], hidden)
    close(state.cell[0], cell)
    assert state.last.tolist() == [segment.tokens[0, 1]]


def test_a_document_in_segments_costs_what_it_does_in_one_pass() -> None:
    segments = full(4)
    whole = Segment(*(torch.cat([s[n] for s in segments], dim=1) for n in range(2)), segments[0].document_start)
    (together,) = losses_of(lstm(segment_length=4 * LENGTH), [whole])
    close(torch.cat(losses_of(lstm(), segments), dim=1), together, rtol=1e-12, atol=0)


def test_what_is_carried_is_the_state_behind_the_last_token_that_is_there() -> None:
    model, ragged = lstm(), make_segment([5, 1, 3, 4])
    next_state = model.advance(ragged, model.initial_state(LANES))
    for lane, length in enumerate((5, 1, 3, 4)):
        tokens = ragged.tokens[lane : lane + 1, :length]
        alone = Segment(tokens, torch.ones_like(tokens).bool(), torch.tensor([True]))
        for got, expected in zip(next_state, model.advance(alone, model.initial_state(1)), strict=True):
            close(got[lane], expected[0], rtol=1e-12, atol=0)


def test_it_is_carried_in_two_vectors_for_each_layer_and_a_token() -> None:
    assert state_bytes(lstm(layers=3).initial_state(2)) == 2 * 3 * 8 * 8 + 8


def test_a_reset_lane_goes_on_as_if_a_document_had_begun_with_its_last_token() -> None:
    model, begun = lstm(), lstm()
    state = model.initial_state(1)
    assert state.last.tolist() == [ABSENT]
    for segment in full(2, lanes=1):
        state = model.advance(segment, state)
    reset, segment = model.reset_memory(state), full(3, lanes=1)[2]
    assert torch.equal(reset.last, state.last)
    with torch.no_grad():
        begun.embedding.start.copy_(begun.embedding.vectors(state.last[:, None])[0, 0])
    (without,), (fresh,) = losses_of(model, [segment], reset), losses_of(begun, [segment])
    close(without, fresh, rtol=1e-12, atol=0)
    assert (without != losses_of(model, [segment], state)[0]).all()


def test_a_token_is_known_for_as_long_as_the_state_is_carried() -> None:
    assert untouched(lstm(), changed=0) == [False] * 5
    assert untouched(lstm(), changed=2, token=LENGTH - 1) == [True, True, False, False, False]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("gradient", sorted(GRADIENTS))
def test_every_gradient_but_truncated_gives_the_same(gradient: str, dropout: float) -> None:
    def case() -> Case:
        model = lstm(dropout=dropout)
        return train_on(model, irregular(7), model.initial_state(LANES))

    got, expected = outcome(GRADIENTS[gradient], case), outcome(plain_loop, case)
    if gradient == "truncated":
        assert torch.equal(got.loss, expected.loss)
        assert not torch.allclose(got.grads["blocks.0.weight_hh_l0"], expected.grads["blocks.0.weight_hh_l0"])
    else:
        assert_same(got, expected)


def test_replay_in_float32_is_off_by_rounding_where_kernels_with_and_without_a_gradient_are_not_the_same() -> None:
    # full lanes in float32: oneDNN's kernels
    def case() -> Case:
        model = LSTM(vocab_size=VOCAB, dim=64, layers=2, segment_length=LENGTH, dropout=0.0)
        return train_on(model, full(7), model.initial_state(2))

    got, expected = outcome(GRADIENTS["replay"], case), outcome(plain_loop, case)
    assert largest_relative_difference(got.grads, expected.grads) < 1e-5


def test_an_untrained_layer_keeps_most_of_what_it_has() -> None:
    (layer,) = LSTM(vocab_size=5, dim=4, layers=1).blocks
    nothing, cell = torch.zeros(1, 4), torch.full((1, 4), 2.0)
    close(layer.step(nothing, nothing, cell)[1], 2.0 * torch.ones(1, 4).sigmoid())


def test_dropout_falls_on_what_enters_each_layer_and_not_on_what_leaves_the_last() -> None:
    model, entering, next_state = lstm(dropout=0.5, layers=3), [], []

    def note(layer: nn.Module, args: Any, out: Any) -> None:
        entering.append(args[0].data)
        next_state.append(out[0].data)

    for layer in model.blocks:
        layer.register_forward_hook(note)
    losses_of(model, full(1))
    assert [0.3 < float((x == 0).double().mean()) < 0.7 for x in entering] == [True] * 3
    assert next_state[-1].all()


def test_a_gradient_can_be_asked_for_in_evaluation() -> None:
    # cuDNN has one only for layers in training mode
    model = lstm(dropout=0.2)
    for mode in (False, True):
        model.train(mode)
        assert model.training == mode
        assert all(layer.training for layer in model.blocks)


def test_ragged_lanes_in_mixed_precision_carry_what_they_carried_in_single() -> None:
    exact, mixed = lstm(), lstm().float()
    state, rounded = exact.initial_state(LANES), mixed.initial_state(LANES)
    for segment in irregular(5):
        state = exact.advance(segment, state)
        with torch.autocast("cpu", torch.bfloat16):
            output, rounded = mixed(segment, rounded)
        assert output.token_losses.dtype is rounded.hidden.dtype is rounded.cell.dtype is torch.float32
    close(rounded.hidden.double(), state.hidden, rtol=0, atol=0.02)
    output.token_losses.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mixed.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_a_bad_size_is_refused_with_its_name_and_value(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lstm(**bad)
