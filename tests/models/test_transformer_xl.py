"""Transformer-XL layer by layer over several segments at once: the same as segment by segment."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from models import (
    LANES,
    LENGTH,
    VOCAB,
    Case,
    Outcome,
    compressive,
    cost,
    full,
    irregular,
    largest_relative_difference,
    make_segment,
    outcome,
    train_on,
    transformer_xl,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memformer_pl.contract import Segment, SegmentOutput, State, detach
from memformer_pl.gradients import truncated
from memformer_pl.gradients.replay import Step
from memformer_pl.gradients.rollout import Gradient, add_gradient, check_gradient
from memformer_pl.models import TransformerXL

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def in_groups(group: int) -> Gradient:
    """``truncated`` that reads ``group`` segments at once."""

    def gradient(
        step: Step, segments: Sequence[Any], state: State, *, advance: Callable[..., State] | None = None
    ) -> tuple[Tensor, State]:
        model = advance.__self__  # type: ignore[union-attr]
        return add_gradient(model, cost, segments, state, gradient="truncated", decoder_group=group)

    return gradient


def rollout(segments: Sequence[Segment], **sizes: Any) -> Case:
    """A rollout that is entered in the middle of documents."""
    model = transformer_xl(**{"layers": 3, "dropout": 0.2, **sizes})
    first, *rest = segments
    return train_on(model, rest, detach(model(first, model.initial_state(len(first.tokens)))[1]))


def assert_same_to_rounding(got: Outcome, expected: Outcome) -> None:
    """Gradients, losses and the floating-point part of the state to twelve digits; everything else to the bit."""
    assert largest_relative_difference(got.grads, expected.grads) < 1e-12
    assert expected.loss > 0
    close(got.loss, expected.loss)
    assert type(got.state) is type(expected.state)
    close(got.state[0], expected.state[0])
    assert all(torch.equal(a, b) for a, b in zip(got.state[1:], expected.state[1:], strict=True))
    assert torch.equal(got.stream, expected.stream)


def seeded(segments: Sequence[Segment]) -> list[Segment]:
    return [segment._replace(seeds=torch.tensor([7 + t])) for t, segment in enumerate(segments)]


def masked(segments: Sequence[Segment]) -> list[Segment]:
    return [
        segment._replace(loss_mask=torch.arange(LENGTH).expand(LANES, -1) > t % 3) for t, segment in enumerate(segments)
    ]


@pytest.mark.parametrize("memory_length", [0, 1, 3, 7, 40])
@pytest.mark.parametrize("group", [2, 3, 6, 9])
def test_groups_equal_single_segments(group: int, memory_length: int) -> None:
    build = partial(rollout, irregular(7), memory_length=memory_length)
    assert_same_to_rounding(outcome(in_groups(group), build), outcome(truncated, build))


@pytest.mark.parametrize(
    "segments",
    [
        full(7, lanes=LANES),
        [segment._replace(continues=t > 0) for t, segment in enumerate(full(7, lanes=LANES))],
        seeded(irregular(7)),
        [*seeded(irregular(4)), *irregular(7)[4:]],
        masked(irregular(7)),
        [masked(irregular(7))[0], *irregular(7)[1:4], *masked(irregular(7))[4:]],
        [make_segment([3, 5, 0, 1]), make_segment([0, 0, 0, 0], document_start=[0, 1, 0, 1]), *irregular(4)],
        irregular(2),
    ],
    ids=["full", "known to continue", "seeded", "some seeded", "masked", "some masked", "starts without tokens", "one"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_groups_equal_single_segments_of_every_kind(segments: list[Segment], dropout: float) -> None:
    build = partial(rollout, segments, dropout=dropout)
    assert_same_to_rounding(outcome(in_groups(4), build), outcome(truncated, build))


def outputs(model: TransformerXL, segments: Sequence[Segment], state: State) -> tuple[SegmentOutput, State]:
    """The outputs of single segments, concatenated, and the last state."""
    read = []
    for segment in segments:
        output, state = model(segment, state)
        read.append(output)
    losses, correct, auxiliary = zip(*read, strict=True)
    return SegmentOutput(torch.cat(losses), torch.cat(correct), torch.stack(auxiliary).sum()), state


@pytest.mark.parametrize("memory_length", [0, 3, 40])
def test_each_token_costs_what_it_costs_segment_by_segment(memory_length: int) -> None:
    model, segments = transformer_xl(dropout=0.2, memory_length=memory_length), seeded(irregular(6))
    expected, last = outputs(model, segments, model.initial_state(LANES))
    output, state = model.forward_rollout(segments, model.initial_state(LANES))
    close(output.token_losses, expected.token_losses)
    assert torch.equal(output.correct, expected.correct)
    assert output.auxiliary_loss == expected.auxiliary_loss
    close(state.cache, last.cache)
    assert torch.equal(state.cache == 0, last.cache == 0)


def test_the_next_rollout_goes_on_from_it() -> None:
    model, segments = transformer_xl(memory_length=8), irregular(10)
    expected, _ = outputs(model, segments, model.initial_state(LANES))
    first, state = model.forward_rollout(segments[:4], model.initial_state(LANES))
    second, _ = model.forward_rollout(segments[4:], state)
    close(torch.cat((first.token_losses, second.token_losses)), expected.token_losses)


def test_no_gradient_reaches_what_entered_a_layer_in_an_earlier_segment() -> None:
    model, embedded, segments = transformer_xl(), [], full(3)
    model.embedding.register_forward_hook(lambda table, args, x: embedded.append(x))
    losses = model.forward_rollout(segments, model.initial_state(2))[0].token_losses.view(3, 2, LENGTH)
    (reached,) = torch.autograd.grad(losses[2].sum(), embedded)
    assert reached.view(3, 2, -1).any(-1).tolist() == [[False] * 2, [False] * 2, [True] * 2]
    other = [segments[0]._replace(tokens=(segments[0].tokens + 1) % VOCAB), *segments[1:]]
    changed = model.forward_rollout(other, model.initial_state(2))[0].token_losses.view(3, 2, LENGTH)
    assert (changed[2] != losses[2]).all()


def test_each_block_runs_once_for_a_group() -> None:
    case, lanes = rollout(irregular(8)), []
    for block in case.module.blocks:  # type: ignore[union-attr]
        assert isinstance(block, nn.Module)
        block.register_forward_hook(lambda block, args, out: lanes.append(len(out)))
    in_groups(4)(case.step, case.segments, case.state, advance=case.advance)
    assert lanes == [4 * LANES] * 3 + [3 * LANES] * 3


class Waits(TorchDispatchMode):
    """Refuses operations for which the host would wait for a device."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(self.REFUSED), name
        indices = args[1] if name in ("index", "index_put_") else ()
        assert not any(index is not None and index.dtype == torch.bool for index in indices), name
        return func(*args, **(kwargs or {}))


def test_the_host_does_not_wait_for_the_device() -> None:
    model, segments = transformer_xl(dropout=0.2), irregular(5)
    with Waits():
        output, _ = model.rollout_step(segments, model.initial_state(LANES))
        cost(output).backward()
    with pytest.raises(AssertionError, match="nonzero"), Waits():
        output.token_losses.nonzero()


@pytest.mark.parametrize("group", [2, 5])
def test_under_autocast_groups_are_within_rounding_of_single_segments(group: int) -> None:
    def build() -> Case:
        model = transformer_xl(dropout=0.2).float()
        return train_on(model, irregular(5), detach(model.initial_state(LANES)))

    with torch.autocast("cpu", torch.bfloat16):
        alone, grouped = (outcome(gradient, build) for gradient in (truncated, in_groups(group)))
    assert [name for name, grad in grouped.grads.items() if grad is None or not grad.any()] == []
    assert largest_relative_difference(grouped.grads, alone.grads) < 2**-6
    torch.testing.assert_close(grouped.loss, alone.loss, rtol=2**-8, atol=0)
    assert grouped.state.cache.dtype == alone.state.cache.dtype == torch.float32


def test_the_distances_are_computed_once_for_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from memformer_pl.layers import relative_attention

    calls, sinusoid = [], relative_attention.sinusoid

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return sinusoid(*args, **kwargs)

    monkeypatch.setattr(relative_attention, "sinusoid", counted)
    model = transformer_xl(layers=4)
    model(full(1)[0], model.initial_state(2))
    assert len(calls) == 1


def test_segments_of_different_shapes_are_refused() -> None:
    model, (first, second) = transformer_xl(), full(2)
    short = Segment(second.tokens[:, :3], second.token_mask[:, :3], second.document_start)
    with pytest.raises(ValueError, match=r"must have the same shape, got \[\[2, 5\], \[2, 3\]\]"):
        model.forward_rollout([first, short], model.initial_state(2))


@pytest.mark.parametrize("place", [0, 2])
def test_each_segment_is_checked(place: int) -> None:
    model, segments = transformer_xl(), full(3)
    segments[place].tokens[0, 0] = VOCAB
    with pytest.raises(ValueError, match=f"below vocab_size={VOCAB}, got {VOCAB}"):
        model.forward_rollout(segments, model.initial_state(2))


def test_the_state_is_checked() -> None:
    with pytest.raises(ValueError, match="the segment has 2 lanes, and field cache of the state"):
        transformer_xl().forward_rollout(full(2), transformer_xl().initial_state(3))


def test_other_models_read_one_segment_after_another() -> None:
    with pytest.raises(TypeError, match="CompressiveTransformer reads one segment after another"):
        compressive().forward_rollout(full(2), compressive().initial_state(2))


@pytest.mark.parametrize(
    ("build", "gradient"), [(compressive, "truncated"), (transformer_xl, "replay"), (transformer_xl, "bptt")]
)
def test_groups_are_refused_where_layers_cannot_read_them(build: Callable[..., Any], gradient: str) -> None:
    with pytest.raises(ValueError, match=f"or gradient='truncated' .*; got 2 with gradient='{gradient}'"):
        check_gradient(build(), gradient=gradient, decoder_group=2)
    check_gradient(transformer_xl(), gradient="truncated", decoder_group=2)
