"""Sampling: probabilities by hand, and random streams that are never shared."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from memformer_pl.contract import ABSENT
from memformer_pl.inference.sampling import Sampling

PROBS = [0.1, 0.4, 0.2, 0.3]


def log_probs_of(*probs: float) -> Tensor:
    return torch.tensor([probs or PROBS]).log()


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({}, PROBS),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"temperature": 0.0}, [0.0, 1.0, 0.0, 0.0]),
        ({"temperature": 1e-9}, [0.0, 1.0, 0.0, 0.0]),
        ({"temperature": 1e9}, [0.25] * 4),
        ({"top_k": 1}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_k": 2}, [0.0, 4 / 7, 0.0, 3 / 7]),
        ({"top_k": 9}, PROBS),
        ({"top_p": 1e-6}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 0.39}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_p": 0.41}, [0.0, 4 / 7, 0.0, 3 / 7]),
        ({"top_p": 0.71}, [0.0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1.0}, PROBS),
        # top_p sees the tokens of top_k renormalised
        ({"top_k": 2, "top_p": 0.5}, [0.0, 1.0, 0.0, 0.0]),
        ({"top_k": 3, "top_p": 0.75}, [0.0, 4 / 7, 0.0, 3 / 7]),
        # temperature before both: 1, 16, 4, 9 of 30
        ({"temperature": 0.5, "top_p": 0.53}, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_probabilities_by_hand(sizes: dict[str, Any], wanted: list[float]) -> None:
    probs = Sampling(**sizes).probs(log_probs_of())[0]
    torch.testing.assert_close(probs, torch.tensor(wanted).double(), rtol=1e-6, atol=1e-8)


def test_recent_tokens_are_penalised_before_all_else() -> None:
    recent = torch.tensor([[ABSENT, 1, 3, 1]])
    squared = [0.1, 0.4**2, 0.2, 0.3**2]
    wanted = torch.tensor([squared]).double() / sum(squared)
    torch.testing.assert_close(
        Sampling(repetition_penalty=2.0).probs(log_probs_of(), recent), wanted, rtol=1e-6, atol=0
    )
    assert Sampling(repetition_penalty=2.0, temperature=0.0)(log_probs_of(), recent).tolist() == [2]
    assert Sampling(repetition_penalty=2.0, temperature=0.0)(log_probs_of(), torch.full((1, 3), ABSENT)).tolist() == [1]
    assert Sampling(temperature=0.0)(log_probs_of(), recent).tolist() == [1]


def test_tokens_are_drawn_by_their_probabilities() -> None:
    count = 20_000
    for sizes in ({}, {"top_p": 0.71}, {"temperature": 0.5}, {"top_k": 2}):
        sampling = Sampling(**sizes)
        drawn = sampling(log_probs_of().expand(count, -1)).bincount(minlength=4) / count
        # five standard deviations
        assert (drawn - sampling.probs(log_probs_of())[0]).abs().max() < 5 * 0.5 / math.sqrt(count)


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    sampling = Sampling()
    log_probs = log_probs_of(0.0, 0.5, 0.0, 0.5, 0.0).expand(10_000, -1)
    assert set(sampling(log_probs).tolist()) == {1, 3}


def test_the_same_seed_draws_the_same_and_streams_are_apart() -> None:
    before = torch.get_rng_state()
    first, second, other = Sampling(seed=1), Sampling(seed=1), Sampling(seed=2)
    drawn = [[sampling(log_probs_of().expand(40, -1)).tolist() for sampling in (first, other)] for _ in range(3)]
    again = [second(log_probs_of().expand(40, -1)).tolist() for _ in range(3)]
    assert [one for one, _ in drawn] == again
    assert [another for _, another in drawn] != again
    assert again[0] != again[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_lanes_draw_each_for_itself() -> None:
    drawn = Sampling()(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).log())
    assert drawn.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be 0 \(the most likely token\) or more, got -0.1"),
        ({"temperature": math.nan}, r"temperature must be 0 \(the most likely token\) or more, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0: leave it out to draw from all tokens"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0: leave it out to draw from all tokens"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0.0: 1 switches it off"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be above 0, got -1.0: 1 switches it off"),
        ({"top_k": 2.5}, "top_k must be a whole number, got 2.5"),
        ({"top_k": math.nan}, "top_k must be a whole number, got nan"),
        ({"top_k": math.inf}, "top_k must be a whole number, got inf"),
        ({"seed": 2**64}, f"seed must be a whole number from {-(2**63)} to {2**64 - 1}, got {2**64}"),
        ({"seed": 2**70}, f"got {2**70}"),
        ({"seed": -(2**63) - 1}, f"seed must be a whole number from {-(2**63)} to .*, got {-(2**63) - 1}"),
        ({"seed": 0.5}, "seed must be a whole number from .*, got 0.5"),
        ({"seed": math.nan}, "seed must be a whole number from .*, got nan"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_a_bad_option_is_refused_with_its_name_and_value(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**sizes)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63, 2**64 - 1])
def test_all_seeds_that_torch_takes_are_taken(seed: int) -> None:
    drawn = [Sampling(seed=seed)(log_probs_of().expand(20, -1)).tolist() for _ in range(2)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("shape", [(4,), (2, 0), (0, 4), (1, 2, 4)])
@pytest.mark.usefixtures("no_type_checks")
def test_log_probs_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"log_probs must have the shape \[lanes, vocabulary\], got \["):
        Sampling()(torch.zeros(shape))


def test_nan_is_refused() -> None:
    with pytest.raises(FloatingPointError, match="the probabilities of the next token are NaN"):
        Sampling()(torch.full((1, 4), math.nan))
