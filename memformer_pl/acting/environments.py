"""Environments of POPGym (Morad et al. 2023, arXiv 2303.01859) whose observations and actions are tokens."""

from collections.abc import Sequence
from math import prod
from typing import Any

from memformer_pl.errors import UsageError, nearest


class TokenEnvironment:
    """An environment of POPGym: a token is an observation at even places of an episode, and an action at odd ones.

    A space of several parts is counted through, the last part fastest. An action is given by any token: by its number
    modulo the number of actions.

    Args:
        name: Class name of an environment, such as ``RepeatFirstHard``.

    Raises:
        UsageError: There is no such environment, its spaces are not discrete, or it does not say how long an episode
            may be.
        ModuleNotFoundError: popgym is not installed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.unwrapped: Any = environment_class(name)()
        self._observed = parts(self.unwrapped.observation_space, of=f"observations of {name}")
        self._acted = parts(self.unwrapped.action_space, of=f"actions of {name}")
        self.observations, self.actions = prod(self._observed), prod(self._acted)
        length = getattr(self.unwrapped, "max_episode_length", None)
        if length is None:
            raise UsageError(f"{name} does not say how long an episode may be: choose an environment that does")
        self.steps = int(length)
        """The most steps of an episode."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens: that of observations or of actions, whichever is larger."""
        return max(self.observations, self.actions)

    def reset(self, seed: int) -> int:
        """Begin an episode, which depends on ``seed`` and the actions alone; return the first observation."""
        observation, _ = self.unwrapped.reset(seed=seed)
        return number(observation, self._observed)

    def step(self, action: int) -> tuple[int, float, bool]:
        """Act; return the next observation, the reward, and whether the episode has ended.

        Args:
            action: Any token.
        """
        chosen = digits(action % self.actions, self._acted)
        given = chosen[0] if len(chosen) == 1 else chosen
        observation, reward, terminated, truncated, _ = self.unwrapped.step(given)
        return number(observation, self._observed), float(reward), bool(terminated or truncated)


def environment_class(name: str) -> type:
    """The class of an environment.

    Raises:
        UsageError: There is none of that name.
        ModuleNotFoundError: popgym is not installed.
    """
    try:
        from popgym.envs import ALL
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(f"acting needs popgym: pip install 'memformer-pl[acting]' ({missing})") from missing
    known: dict[str, type] = {kind.__name__: kind for kind in ALL}
    if name not in known:
        near = nearest(name, known)
        raise UsageError(f"there is no environment {name!r}" + (f". Did you mean {near}?" if near else ""))
    return known[name]


def parts(space: Any, *, of: str) -> list[int]:
    """How many values each part of a discrete space has.

    Raises:
        UsageError: A part is not discrete, or does not begin at 0.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Tuple):
        return [size for part in space.spaces for size in parts(part, of=of)]
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1 and not space.start.any():
        sizes = [int(size) for size in space.nvec]
    elif isinstance(space, spaces.Discrete) and space.start == 0:
        sizes = [int(space.n)]
    else:
        raise UsageError(f"{of} must be whole numbers from 0 on, got the space {space}")
    if prod(sizes) > 1 << 16:
        raise UsageError(f"{of} must be at most 65,536 in number, got {prod(sizes):,}")
    return sizes


def number(value: Any, sizes: Sequence[int]) -> int:
    """The number of a value among all values of its space, the last part fastest."""
    total = 0
    for digit, size in zip(flattened(value), sizes, strict=True):
        total = total * size + digit
    return total


def digits(total: int, sizes: Sequence[int]) -> list[int]:
    """The parts of the value with a number."""
    found = []
    for size in reversed(sizes):
        total, digit = divmod(total, size)
        found.append(digit)
    return found[::-1]


def flattened(value: Any) -> list[int]:
    """The parts of a value of any discrete space."""
    if isinstance(value, tuple | list):
        return [digit for part in value for digit in flattened(part)]
    flat: list[int] = [int(value)] if not getattr(value, "ndim", 0) else value.ravel().tolist()
    return flat
