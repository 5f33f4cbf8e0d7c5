"""A buffer of fixed size whose entries are drawn by weight; the oldest leave first."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from memformer_pl.errors import UsageError, require_sizes

Rule = Callable[[float, float | None], float | None]
"""The weight of an entry, given its value now and at the last visit, if there was one; None if it takes both."""

RULES: dict[str, Rule] = {
    "loss_difference": lambda now, before: None if before is None else abs(now - before),
    "loss": lambda now, before: now,
    "uniform": lambda now, before: 1.0,
}
"""How a visit sets the weight of an entry. A value is a mean loss in nats."""


class WeightedBuffer:
    """The latest entries, each drawn with the probability ``weight / sum of all weights``.

    An entry whose rule needs two visits has, after the first, the largest weight that any entry ever had, at first 1.
    An entry of weight 0 is not drawn again, unless all weights are 0: then all entries are equally likely.

    Source: Transformer with Memory Replay (Liu and Mozafari, arXiv 2205.09869), of which we know the two rules of the
    weights, one of them the difference of losses, but not the text. Ours: what leaves (first in, first out), the
    weight of an entry that is new, and the rules ``loss`` and ``uniform``.

    Args:
        size: Most entries.
        priority: A key of :data:`RULES`.

    Raises:
        UsageError: The size is below 1, or there is no such rule.
    """

    def __init__(self, *, size: int, priority: str) -> None:
        require_sizes(size=size)
        if priority not in RULES:
            raise UsageError(f"priority must be one of {', '.join(RULES)}, got {priority!r}")
        self.size, self.priority = size, priority
        self._largest = 1.0
        self._entries: dict[int, tuple[float, float]] = {}  # weight and last value of each, oldest first
        self._ready: tuple[np.ndarray, np.ndarray | None] | None = None  # for draws, until a weight changes

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def weights(self) -> dict[int, float]:
        """The weight of each entry, oldest first."""
        return {key: weight for key, (weight, _) in self._entries.items()}

    def write(self, key: int, value: float) -> None:
        """Put an entry in as the latest one; if it is there, visit it first."""
        visited = self._visited(key, value)
        self._entries.pop(key, None)
        self._entries[key] = visited
        if len(self._entries) > self.size:
            del self._entries[next(iter(self._entries))]

    def visit(self, key: int, value: float) -> None:
        """Set the weight of an entry; nothing happens if it has left the buffer."""
        if key in self._entries:
            self._entries[key] = self._visited(key, value)

    def draw(self, count: int, random: np.random.Generator) -> Int64[np.ndarray, " count"]:
        """Draw entries, each anew from all of them. There must be one."""
        if self._ready is None:
            weights = np.array([weight for weight, _ in self._entries.values()])
            total = weights.sum()
            self._ready = np.array(list(self._entries)), weights / total if total > 0 else None
        keys, shares = self._ready
        drawn: Int64[np.ndarray, " count"] = random.choice(keys, size=count, p=shares)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """All entries, as tensors and numbers."""
        keys, rows = list(self._entries), list(self._entries.values())
        entries = torch.tensor(rows, dtype=torch.float64).view(-1, 2)
        return {"keys": torch.tensor(keys, dtype=torch.int64), "entries": entries, "largest": self._largest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the entries of a buffer of the same size and priority."""
        self._ready = None
        rows = map(tuple, state["entries"].tolist())
        self._entries = dict(zip(state["keys"].tolist(), rows, strict=True))
        self._largest = float(state["largest"])

    def _visited(self, key: int, value: float) -> tuple[float, float]:
        self._ready = None
        before = self._entries.get(key)
        weight = RULES[self.priority](value, None if before is None else before[1])
        weight = self._largest if weight is None else weight
        if weight < 0:
            raise UsageError(
                f"priority {self.priority!r} takes losses of at least 0 as weights, got {weight}: use loss_difference"
            )
        self._largest = max(self._largest, weight)
        return weight, value
