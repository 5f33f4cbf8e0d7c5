"""Random streams can be put back, and a stream of its own leaves no trace in the default one."""

import pytest
import torch
from torch import Tensor

from memformer_pl.gradients.rng import RandomState, draw_seed, own_stream


def draws() -> Tensor:
    return torch.randn(5)


def draws_of(seed: int) -> Tensor:
    with own_stream(seed, torch.zeros(1)):
        return draws()


def test_a_restored_stream_repeats_its_numbers() -> None:
    stream = RandomState.capture(torch.zeros(1))
    first, second = draws(), draws()
    stream.restore()
    assert torch.equal(draws(), first)
    assert not torch.equal(first, second)


def test_capturing_draws_nothing() -> None:
    before = torch.get_rng_state()
    RandomState.capture((torch.zeros(1), [torch.zeros(1)]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_the_default_stream_stands_where_it_stood_however_much_an_own_stream_draws(count: int) -> None:
    before = torch.get_rng_state()
    with own_stream(7, torch.zeros(1)):
        torch.randn(count)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_stream_stands_where_it_stood_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), own_stream(7, torch.zeros(1)):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_an_own_stream_depends_on_its_seed_alone() -> None:
    first = draws_of(7)
    draws()
    assert torch.equal(draws_of(7), first)
    assert not torch.equal(draws_of(8), first)


def test_own_streams_can_be_nested() -> None:
    with own_stream(7, torch.zeros(1)):
        inner = draws_of(8)
        outer = draws()
    assert torch.equal(outer, draws_of(7))
    assert torch.equal(inner, draws_of(8))


def test_seeds_come_from_the_default_stream_and_differ() -> None:
    torch.manual_seed(0)
    seeds = [draw_seed() for _ in range(100)]
    torch.manual_seed(0)
    assert [draw_seed() for _ in range(100)] == seeds
    assert len(set(seeds)) == 100
