"""Decoders run in groups: the gradient of whole steps, dropout included, in the memory of one group."""

from functools import partial
from typing import Any

import pytest
import torch
from models import (
    LENGTH,
    Case,
    Outcome,
    assert_same,
    in_groups,
    irregular,
    largest_relative_difference,
    memformer,
    outcome,
    outcome_in_groups,
    plain_loop,
    recurrent_memory,
    train_on,
)

from memformer_pl.contract import (
    Segment,
    SegmentModel,
    SegmentOutput,
    concat_segments,
    concat_states,
    detach,
)
from memformer_pl.gradients.rollout import check_gradient


def rollout(horizon: int, dropout: float = 0.2, **sizes: Any) -> Case:
    """Irregular segments, entered in the middle of documents, with a graph that leads out of the rollout."""
    model = memformer(dropout=dropout, **sizes)
    first, *rest = irregular(horizon + 1)
    return train_on(model, rest, model(first, model.initial_state(4))[1])


def grouped(group: int, horizon: int, dropout: float, **sizes: Any) -> Outcome:
    return outcome_in_groups(group, partial(rollout, horizon, dropout, **sizes))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("group", [2, 3, 7])
@pytest.mark.parametrize("horizon", [1, 2, 5, 6])
def test_groups_of_decoders_equal_a_plain_loop(horizon: int, group: int, dropout: float) -> None:
    assert_same(grouped(group, horizon, dropout), outcome(plain_loop, partial(rollout, horizon, dropout)))


def test_groups_count_only_the_tokens_of_the_loss_mask() -> None:
    def masked() -> Case:
        case = rollout(4)
        first, *rest = case.segments
        return case._replace(
            segments=[first, *(each._replace(loss_mask=torch.arange(LENGTH).expand(4, -1) > 1) for each in rest)]
        )

    expected = outcome(plain_loop, masked)
    assert_same(outcome_in_groups(3, masked), expected)
    assert expected.loss < outcome(plain_loop, partial(rollout, 4)).loss


def test_groups_equal_a_plain_loop_without_memory() -> None:
    expected = outcome(plain_loop, partial(rollout, 5, 0.2, slots=0))
    assert_same(grouped(2, 5, 0.2, slots=0), expected)


def test_each_group_is_decoded_once_and_never_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    case, lanes = rollout(6), []
    assert isinstance(case.module, SegmentModel)
    decoder_step = case.module.decoder_step

    def watched(segment: Segment, encoded: Any) -> SegmentOutput:
        lanes.append(len(segment.tokens))
        assert torch.is_grad_enabled()
        return decoder_step(segment, encoded)

    monkeypatch.setattr(case.module, "decoder_step", watched)
    in_groups(4, case)
    assert lanes == [16, 8]


def test_dropout_of_a_group_falls_on_each_segment_as_if_it_were_alone() -> None:
    model, segments = memformer(dropout=0.5), irregular(3)
    state, apart, encoded = model.initial_state(4), [], []
    for segment in segments:
        each, state = model.advance_and_encode(segment, state)
        encoded.append(each)
        apart.append(model.decoder_step(segment, each).token_losses)
    together = model.decoder_step(concat_segments(segments), concat_states(encoded)).token_losses
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-12, atol=1e-12)
    without = model.eval().decoder_step(segments[0], encoded[0]._replace(seeds=encoded[0].seeds[:0])).token_losses
    assert not torch.isclose(apart[0], without).all()


def test_under_autocast_groups_are_within_rounding_of_single_segments() -> None:
    kept = []
    for group in (1, 2):
        torch.manual_seed(0)
        model = memformer(dropout=0.2).float()
        case = train_on(model, irregular(5), detach(model.initial_state(4)))
        with torch.autocast("cpu", torch.bfloat16):
            in_groups(group, case)
        kept.append({name: p.grad for name, p in model.named_parameters()})
    alone, grouped = kept
    assert [name for name, grad in grouped.items() if grad is None or not grad.any()] == []
    assert largest_relative_difference(grouped, alone) < 2**-6


@pytest.mark.parametrize(
    ("model", "gradient", "group", "message"),
    [
        (memformer, "repaly", 1, "gradient must be one of replay, sparse_replay"),
        (memformer, "bptt", 2, "decoder_group > 1 needs gradient='replay' .*; got 2 with gradient='bptt'"),
        (recurrent_memory, "replay", 2, "got 2 with gradient='replay' and model RecurrentMemoryTransformer"),
        (memformer, "replay", 0, "decoder_group must be at least 1, got 0"),
    ],
)
def test_groups_without_a_separate_decoder_are_refused(model: Any, gradient: str, group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_gradient(model(), gradient=gradient, decoder_group=group)


def test_a_model_without_a_separate_decoder_says_so() -> None:
    model, segments = recurrent_memory(), irregular(1)
    with pytest.raises(TypeError, match="RecurrentMemoryTransformer has no separate decoder"):
        model.advance_and_encode(segments[0], model.initial_state(4))
    with pytest.raises(TypeError, match="has no separate decoder"):
        model.decoder_step(segments[0], ())
