"""The random numbers of a step are a function of its seeds; without seeds, of one number of the default stream."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import LANES, LENGTH, SEEDED, full, irregular, losses_of, make_segment
from torch import Tensor

from memformer_pl.contract import Segment, SegmentModel, State, concat_segments, concat_states
from memformer_pl.layers import dropout
from memformer_pl.models import Memformer

Build = Callable[..., SegmentModel]


@pytest.fixture(params=SEEDED)
def model(request: pytest.FixtureRequest) -> SegmentModel:
    return SEEDED[request.param](dropout=0.2)


def seeded(segments: list[Segment], first: int = 100) -> list[Segment]:
    """The same segments with a seed each."""
    return [segment._replace(seeds=torch.tensor([first + t])) for t, segment in enumerate(segments)]


def test_losses_depend_on_the_seeds_alone_and_nothing_is_drawn(model: SegmentModel) -> None:
    losses, before = losses_of(model, seeded(irregular(3))), torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(losses_of(model, seeded(irregular(3))), losses, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert all(torch.equal(a, b) for a, b in zip(losses_of(model, seeded(irregular(3))), losses, strict=True))
    for a, b in zip(losses_of(model, seeded(irregular(3), first=200)), losses, strict=True):
        assert not torch.isclose(a, b)[a > 0].any()


def ways(model: SegmentModel) -> list[Callable[[Segment, State], Any]]:
    """Every way into a model."""
    return [model, model.advance, *([model.advance_and_encode] if isinstance(model, Memformer) else [])]


def test_without_seeds_each_way_draws_one_and_gives_what_that_seed_gives(model: SegmentModel) -> None:
    segment, state = make_segment([5, 3, 0, 4]), model.initial_state(LANES)
    before = torch.get_rng_state()
    seed = torch.randint(1 << 62, (1,))
    after = torch.get_rng_state()
    for way in ways(model):
        torch.set_rng_state(before)
        drawn = way(segment, state)
        assert torch.equal(torch.get_rng_state(), after)
        given = way(segment._replace(seeds=seed), state)
        for a, b in zip(tensors(drawn), tensors(given), strict=True):
            assert torch.equal(a, b)


def tensors(returned: Any) -> list[Tensor]:
    """All tensors of nested tuples."""
    return [returned] if isinstance(returned, Tensor) else [tensor for part in returned for tensor in tensors(part)]


def test_no_number_is_used_twice_in_a_step(model: SegmentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    used, plain = [], dropout.random_bits

    def noted(seeds: Tensor, *, first: int, count: int) -> Tensor:
        used.append((first, first + count))
        return plain(seeds, first=first, count=count)

    monkeypatch.setattr(dropout, "random_bits", noted)
    model(make_segment([5, 3, 0, 4]), model.initial_state(LANES))
    assert used
    assert all(stop <= first for (_, stop), (first, _) in pairwise(sorted(used)))


def test_segments_whose_lanes_are_concatenated_draw_what_each_draws_alone(model: SegmentModel) -> None:
    segments, states = seeded([make_segment([5, 3, 0, 4], seed=1), make_segment([5, 5, 2, 1], seed=2)]), []
    for t in range(2):
        _, state = model(seeded(full(1, lanes=LANES), first=t)[0], model.initial_state(LANES))
        states.append(state)
    apart = [model(segment, state) for segment, state in zip(segments, states, strict=True)]
    output, after = model(concat_segments(segments), concat_states(states) if states[0] else states[0])
    torch.testing.assert_close(
        output.token_losses, torch.cat([output.token_losses for output, _ in apart]), rtol=1e-12, atol=1e-13
    )
    expected = concat_states([state for _, state in apart]) if after else after
    torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-13)


def test_in_evaluation_seeds_change_nothing(model: SegmentModel) -> None:
    pair = losses_of(model.eval(), full(2)), losses_of(model, seeded(full(2)))
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


def test_concatenated_segments_have_the_seeds_of_all_or_none() -> None:
    first, second = seeded(full(2))
    seeds = concat_segments([first, second]).seeds
    assert seeds is not None
    assert seeds.tolist() == [100, 101]
    assert concat_segments([first, second._replace(seeds=None)]).seeds is None
    assert concat_segments(full(2)).seeds is None


@pytest.mark.parametrize("length", [1, LENGTH - 1])
def test_a_shorter_segment_of_the_same_seed_is_read_with_dropout(model: SegmentModel, length: int) -> None:
    segment = seeded(full(1))[0]
    short = Segment(
        segment.tokens[:, :length], segment.token_mask[:, :length], segment.document_start, seeds=segment.seeds
    )
    with_dropout = losses_of(model, [short])[0]
    assert not torch.equal(with_dropout, losses_of(model.eval(), [short])[0])
