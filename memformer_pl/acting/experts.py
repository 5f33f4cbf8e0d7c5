"""Scripted policies: what is best in an environment, and an action at random."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import numpy as np

from memformer_pl.acting.environments import TokenEnvironment
from memformer_pl.errors import UsageError

PolicyName = Literal["expert", "random"]
Policy = Callable[[Sequence[int]], int]
"""From all observations of an episode so far to an action, both as tokens."""


class Scripted(NamedTuple):
    """An episode of a scripted policy."""

    observations: list[int]
    """One for each step, as tokens."""
    actions: list[int]
    rewards: list[float]


def follow(act: Policy, environment: TokenEnvironment, *, seed: int) -> Scripted:
    """Play an episode.

    Args:
        act: The policy.
        environment: The environment.
        seed: Of the environment.
    """
    played, observation, ended = Scripted([], [], []), environment.reset(seed), False
    while not ended:
        played.observations.append(observation)
        played.actions.append(act(played.observations))
        observation, reward, ended = environment.step(played.actions[-1])
        played.rewards.append(reward)
    return played


def scripted_policy(name: PolicyName, environment: TokenEnvironment, random: np.random.Generator) -> Policy:
    """A scripted policy of an environment.

    Args:
        name: ``expert`` for the best policy, ``random`` for actions that are equally likely.
        environment: The environment.
        random: Stream of the random policy.

    Raises:
        UsageError: There is no such policy, or no expert of this environment.
    """
    if name not in get_args(PolicyName):
        raise UsageError(f"policy must be one of {', '.join(get_args(PolicyName))}, got {name!r}")
    if name == "expert":
        return expert(environment)
    return lambda observations: int(random.integers(environment.actions))


def expert(environment: TokenEnvironment) -> Policy:
    """The best policy of an environment.

    Raises:
        UsageError: None is written down here.
    """
    from popgym.envs.autoencode import Autoencode
    from popgym.envs.repeat_first import RepeatFirst
    from popgym.envs.repeat_previous import RepeatPrevious

    if isinstance(environment.unwrapped, RepeatFirst):
        return first
    if isinstance(environment.unwrapped, RepeatPrevious):
        return partial(previous, back=environment.unwrapped.k)
    if isinstance(environment.unwrapped, Autoencode):
        return partial(backwards, suits=environment.actions)
    raise UsageError(f"no expert of {environment.name} is known: take policy=random")


def first(observations: Sequence[int]) -> int:
    """The first observation: the best in RepeatFirst."""
    return observations[0]


def previous(observations: Sequence[int], *, back: int) -> int:
    """The last but ``back - 1`` observation, or the first: the best in RepeatPrevious."""
    return observations[max(len(observations) - back, 0)]


def backwards(observations: Sequence[int], *, suits: int) -> int:
    """The cards that were shown, the last one first: the best in Autoencode.

    The number of an observation is ``suits`` or more while cards are shown. The last card is shown with the first
    observation below it, at which the agent plays for the first time.
    """
    shown = next((n for n, card in enumerate(observations) if card < suits), len(observations))
    played = len(observations) - shown
    return observations[shown + 1 - played] % suits if played else 0
