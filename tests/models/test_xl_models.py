"""Transformer-XL and the other models with a cache: no gradient across segments, reach, content of the cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    LANES,
    LENGTH,
    VOCAB,
    assert_same,
    compressive,
    full,
    irregular,
    lamemo,
    losses_of,
    make_segment,
    outcome,
    small,
    train_on,
    transformer_xl,
)
from torch import Tensor

from memformer_pl.contract import ABSENT, Segment, SegmentModel, detach
from memformer_pl.gradients import bptt, truncated
from memformer_pl.models import Transformer

CACHED = {"transformer xl": transformer_xl, "compressive transformer": compressive, "lamemo": lamemo}


@pytest.fixture(params=CACHED)
def build(request: pytest.FixtureRequest) -> Callable[..., SegmentModel]:
    return CACHED[request.param]


def pieces(document: Tensor, *lengths: int) -> list[Segment]:
    """One document ``[B, L]`` in segments of these lengths."""
    parts = document.split(lengths, dim=1)
    starts = [torch.full((len(document),), n == 0) for n in range(len(parts))]
    return [Segment(part, torch.ones_like(part).bool(), start) for part, start in zip(parts, starts, strict=True)]


def test_without_memory_each_is_a_transformer_with_relative_positions(build: Callable[..., SegmentModel]) -> None:
    sizes = {"compressed_length": 0} if build is compressive else {}
    model, other = build(memory_length=0, **sizes), small(Transformer, layers=2, positions="relative")
    shared = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("ahead_bias")}
    other.load_state_dict(shared)
    for a, b in zip(losses_of(model, irregular(5)), losses_of(other, irregular(5)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("lengths", [(5, 5, 5, 3), (1, 5, 2, 5, 5), (2,) * 9])
def test_a_document_in_segments_costs_what_one_pass_does_where_the_cache_holds_it(lengths: tuple[int, ...]) -> None:
    document = torch.cat([segment.tokens for segment in full(4)], dim=1)[:, :18]
    model = transformer_xl(memory_length=17, layers=3)
    whole = small(Transformer, layers=3, positions="relative", segment_length=18)
    whole.load_state_dict(model.state_dict())
    in_segments = torch.cat(losses_of(model, pieces(document, *lengths)), dim=1)
    torch.testing.assert_close(in_segments, losses_of(whole, pieces(document, 18))[0], rtol=1e-12, atol=0)
    short = transformer_xl(memory_length=3, layers=3)
    assert not torch.allclose(torch.cat(losses_of(short, pieces(document, *lengths)), dim=1), in_segments)


def test_no_gradient_crosses_a_border_although_values_do(build: Callable[..., SegmentModel]) -> None:
    model, embedded, segments = build(), [], full(2)
    model.embedding.register_forward_hook(lambda table, args, x: embedded.append(x))
    _, state = model(segments[0], model.initial_state(2))
    loss = model(segments[1], state)[0].token_losses.sum()
    assert torch.autograd.grad(loss, embedded[:1], allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(loss, embedded[1:])[0].any()
    assert not torch.equal(losses_of(model, segments)[1], losses_of(model, segments[1:])[0])


def test_truncation_at_borders_gives_the_same_gradient(build: Callable[..., SegmentModel]) -> None:
    def case():  # type: ignore[no-untyped-def]
        model = build(dropout=0.2)
        return train_on(model, irregular(4), detach(model.initial_state(LANES)))

    assert_same(outcome(truncated, case), outcome(bptt, case))


def test_each_layer_reaches_one_cache_further_back() -> None:
    # Two layers and M = L: segment 4 knows what entered the first layer from segment 2 on. That begins with the last
    # token of segment 1, from which the first of segment 2 is predicted.
    model, segments = transformer_xl(memory_length=LENGTH), full(5)
    before = losses_of(model, segments)[4]
    for place, reaches in ((LENGTH - 1, True), (LENGTH - 2, False)):
        tokens = segments[1].tokens.clone()
        tokens[:, place] = (tokens[:, place] + 1) % VOCAB
        changed = losses_of(model, [segments[0], segments[1]._replace(tokens=tokens), *segments[2:]])[4]
        assert (changed != before).all() if reaches else torch.equal(changed, before)


def test_a_cache_holds_the_tokens_that_were_present() -> None:
    model = transformer_xl()
    _, state = model(make_segment([5, 3, 0, 1]), model.initial_state(LANES))
    assert state.filled.tolist() == [5, 3, 0, 1]
    tokens = make_segment([5, 3, 0, 1]).tokens
    assert state.last.tolist() == [tokens[0, 4], tokens[1, 2], ABSENT, tokens[3, 0]]
    _, state = model(make_segment([5, 2, 0, 5], document_start=[0, 1, 0, 0]), state)
    assert state.filled.tolist() == [7, 2, 0, 6]


def test_a_reset_empties_the_cache_and_keeps_the_token_to_be_read(build: Callable[..., SegmentModel]) -> None:
    model, segments = build(), full(3)
    state = model.initial_state(2)
    for segment in segments[:2]:
        _, state = model(segment, state)
    reset, empty = model.reset_memory(state), model.initial_state(2)
    assert torch.equal(reset.last, segments[1].tokens[:, -1])
    assert all(torch.equal(a, b) for a, b in zip(reset[:-1], empty[:-1], strict=True))
    assert not torch.equal(losses_of(model, segments[2:], reset)[0], losses_of(model, segments[2:], state)[0])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"memory_length": -1}, r"memory_length must be at least 0, got -1"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"heads": 3}, "heads must divide dim, got heads=3 and dim=8"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dim": 9, "heads": 3}, "relative positions need an even dim, got dim=9"),
    ],
)
def test_a_bad_size_is_refused_with_its_name_and_value(
    build: Callable[..., SegmentModel], bad: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(**bad)


def test_unknown_positions_are_refused(no_type_checks: None) -> None:
    for chunk in (None, 2):
        with pytest.raises(ValueError, match="positions must be rotary or relative, got 'rotery'"):
            small(Transformer, layers=2, positions="rotery", chunk=chunk)


def test_relative_positions_are_not_computed_in_chunks() -> None:
    with pytest.raises(ValueError, match="chunk needs positions='rotary', got chunk=2 and positions='relative'"):
        small(Transformer, layers=2, positions="relative", chunk=2)
