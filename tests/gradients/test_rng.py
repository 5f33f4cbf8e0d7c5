"""Random streams can be put back."""

import pytest
import torch
from torch import Tensor, nn

from memformer_pl.gradients import GRADIENTS, rng
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


@pytest.mark.parametrize("name", ["replay", "sparse_replay"])
def test_the_stream_of_a_modules_device_is_captured_though_no_input_is_on_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a step moves its segments to a GPU, and the first state is None."""
    asked: list[object] = []

    def spy(*given: object) -> tuple[list[int], list[Tensor]]:
        asked.extend(given)
        return [], []

    monkeypatch.setattr(rng, "get_device_states", spy)
    layer = nn.Linear(3, 3)

    def step(number: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        state = layer(torch.full((3,), float(number)) if state is None else state)
        return state.square().sum(), state

    GRADIENTS[name](step, [1, 2], None)
    assert any(tensor is parameter for tensor in asked for parameter in layer.parameters())
