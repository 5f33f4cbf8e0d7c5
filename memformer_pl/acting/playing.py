"""Play episodes with a model: a session reads observations, and draws actions.

B  lanes     T  steps of an episode
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl.acting.environments import TokenEnvironment
from memformer_pl.contract import SegmentModel
from memformer_pl.inference.session import Session


class Played(NamedTuple):
    """Episodes that were played side by side, on the CPU."""

    tokens: Int[Tensor, "B 2*T"]
    """Observations at even places, actions at odd ones; 0 behind the end of an episode."""
    rewards: Float[Tensor, "B T"]
    """0 behind the end of an episode; NaN where the model had no probabilities to draw from."""
    acted: Bool[Tensor, "B T"]
    """Which steps there were."""
    surprise: Float[Tensor, "B T"]
    """Nats of each action when it was drawn; 0 behind the end of an episode."""

    @property
    def returns(self) -> Float[Tensor, " B"]:
        """The sum of the rewards of each episode."""
        return self.rewards.sum(1)


def play(
    model: SegmentModel, environments: Sequence[TokenEnvironment], seeds: Sequence[int], uniform: Float[Tensor, "B T"]
) -> Played:
    """Play an episode in each lane, by drawing from the probabilities of the model.

    Args:
        model: In evaluation mode.
        environments: One for each lane, all of the same name.
        seeds: The environment's seed in each lane.
        uniform: Numbers from 0 to 1, of which each draws an action.
    """
    lanes, steps = uniform.shape
    tokens = torch.zeros(lanes, 2 * steps, dtype=torch.int64)
    rewards, acted = torch.zeros(lanes, steps, dtype=torch.float64), torch.zeros(lanes, steps, dtype=torch.bool)
    surprise = torch.zeros_like(rewards)
    session, alive = Session(model, lanes=lanes), torch.ones(lanes, dtype=torch.bool)
    tokens[:, 0] = torch.tensor([env.reset(seed) for env, seed in zip(environments, seeds, strict=True)])
    for t in range(steps):
        first = max(2 * t - 1, 0)  # the last action, and the observation after it
        session.feed(tokens[:, first : 2 * t + 1], alive[:, None].expand(-1, 2 * t + 1 - first))
        log_probs = session.log_probs.cpu()
        drawn = inverted(log_probs, uniform[:, t])
        acted[:, t], tokens[:, 2 * t + 1] = alive, drawn.where(alive, 0)
        surprise[:, t] = -log_probs.gather(1, drawn[:, None])[:, 0].where(alive, 0.0)
        at = alive.nonzero()[:, 0]
        actions = zip(at.tolist(), drawn[at].tolist(), strict=True)
        stepped = [environments[lane].step(action) for lane, action in actions]
        observations, gained, ended = zip(*stepped, strict=True)
        rewards[at, t], alive[at] = torch.tensor(gained, dtype=torch.float64), ~torch.tensor(ended)
        if not alive.any():
            break
        tokens[at, 2 * t + 2] = torch.tensor(observations).where(alive[at], 0)
    return Played(tokens, rewards.masked_fill(surprise.isnan(), math.nan), acted, surprise)


def inverted(log_probs: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token at which the cumulative probability of each lane passes its number."""
    summed = log_probs.double().exp().cumsum(1)
    return (summed <= uniform[:, None] * summed[:, -1:]).sum(1).clamp(max=log_probs.shape[1] - 1)
