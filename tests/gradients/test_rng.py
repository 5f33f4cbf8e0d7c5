"""Random streams can be put back."""

import torch
from torch import Tensor

from memformer_pl.gradients.rng import RandomState


def draws() -> Tensor:
    return torch.randn(5)


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
