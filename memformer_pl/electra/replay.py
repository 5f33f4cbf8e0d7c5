"""The buffer of corrupted examples, and the weights by which they are drawn."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from memformer_pl.data.weighted_buffer import WeightedBuffer
from memformer_pl.electra.model import Corrupted, bit_losses
from memformer_pl.errors import DivergedError, UsageError, require_sizes

RULES = {"loss_difference": "loss_difference", "gradient_norm": "loss", "uniform": "uniform"}
"""The rule of :class:`WeightedBuffer` for each priority: a norm is a weight as it stands, as a loss would be."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Let the discriminator read corrupted examples again, drawn by weight from the latest ones.

    Source: Transformer with Memory Replay (Liu and Mozafari, arXiv 2205.09869): a buffer of fixed size between
    generator and discriminator, and the two rules. We have not seen its text. Ours: how the rules are computed, the
    rule ``uniform``, what leaves the buffer (first in, first out) and all numbers.

    Args:
        share: Share of the discriminator's batch that comes from the buffer, from 0 up to but not including 1. The
            generator's batch is the rest, so each step has the generator passes of a run without replay.
        size: Examples of the buffer; at least as many as are drawn in a step.
        priority: What the weight of an example is. ``loss_difference``: by how much the mean loss of its tokens differs
            from that of the visit before; after the first, the largest weight so far, at first 1.
            ``gradient_norm``: the norm of the gradient of that loss in the discriminator's logits, which bounds that in
            the weights up to a factor. ``uniform``: 1. An example of weight 0 is not drawn again.

    Raises:
        UsageError: A value is out of range.
    """

    share: float = 0.5
    size: int = 4096
    priority: Literal["loss_difference", "gradient_norm", "uniform"] = "loss_difference"

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UsageError(f"replay.share must be at least 0 and below 1, got {self.share}")
        require_sizes(**{"replay.size": self.size})
        if self.priority not in RULES:
            raise UsageError(f"replay.priority must be one of {', '.join(RULES)}, got {self.priority!r}")

    def drawn(self, batch_size: int) -> int:
        """Examples that are drawn beside ``batch_size`` new ones.

        Raises:
            UsageError: The share gives no whole number, or more than the buffer holds.
        """
        wanted = self.share * batch_size / (1 - self.share)
        count = round(wanted)
        if abs(count - wanted) > 1e-6:
            raise UsageError(
                f"replay.share {self.share} beside batch_size {batch_size} is {wanted:g} examples: choose a share that "
                "gives a whole number, such as 0.5"
            )
        if self.size < count:
            raise UsageError(f"replay.size must be at least the {count} examples that a step draws, got {self.size}")
        return count


class Drawn(NamedTuple):
    """Examples from the buffer."""

    keys: Int64[np.ndarray, " B"]
    examples: Corrupted


class ReplayBuffer:
    """The latest corrupted examples: four bytes for a token and one for its bit.

    Args:
        replay: Options.
        length: Tokens of an example.
    """

    def __init__(self, replay: Replay, *, length: int) -> None:
        self._weighted = WeightedBuffer(size=replay.size, priority=RULES[replay.priority])
        self._tokens = torch.zeros(replay.size, length, dtype=torch.int32)
        self._bits = torch.zeros(replay.size, length, dtype=torch.bool)
        self._written = 0

    def __len__(self) -> int:
        return len(self._weighted)

    @property
    def nbytes(self) -> int:
        """Bytes of the examples."""
        return self._tokens.nbytes + self._bits.nbytes

    @property
    def weights(self) -> dict[int, float]:
        """The weight of each example, oldest first; its key is its number."""
        return self._weighted.weights

    def write(self, examples: Corrupted, values: Float[Tensor, " B"]) -> None:
        """Put examples in, with the value of their first visit."""
        for tokens, bits, value in zip(*examples, finite(values), strict=True):
            row = self._written % len(self._tokens)
            self._tokens[row], self._bits[row] = tokens, bits
            self._weighted.write(self._written, value)
            self._written += 1

    def visit(self, keys: Int64[np.ndarray, " B"], values: Float[Tensor, " B"]) -> None:
        """Weigh examples anew; one that was drawn twice in a step is visited once."""
        for key, value in dict(zip(keys.tolist(), finite(values), strict=True)).items():
            self._weighted.visit(key, value)

    def draw(self, count: int, random: np.random.Generator, *, device: torch.device) -> Drawn:
        """Draw examples, each anew from all of them. There must be one."""
        keys = self._weighted.draw(count, random)
        rows = torch.from_numpy(keys % len(self._tokens))
        return Drawn(keys, Corrupted(self._tokens[rows].long().to(device), self._bits[rows].to(device)))

    def state_dict(self) -> dict[str, Any]:
        """The examples and their weights, as tensors and numbers."""
        weighted = self._weighted.state_dict()
        return {"weighted": weighted, "tokens": self._tokens, "bits": self._bits, "written": self._written}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a buffer of the same options."""
        self._weighted.load_state_dict(state["weighted"])
        self._tokens, self._bits = state["tokens"].clone(), state["bits"].clone()
        self._written = int(state["written"])


def finite(values: Float[Tensor, " B"]) -> list[float]:
    """The values, on the host.

    Raises:
        DivergedError: One is not finite.
    """
    found: list[float] = values.tolist()
    if not np.isfinite(found).all():
        raise DivergedError("the loss of an example is not finite: train again with a lower learning rate")
    return found


def measure(logits: Float[Tensor, "B L"], bits: Bool[Tensor, "B L"], *, priority: str) -> Float[Tensor, " B"]:
    """What the weight of each example follows from: its mean loss in nats, or the norm of the gradient of that."""
    if priority == "gradient_norm":
        norm_B: Tensor = (logits.sigmoid() - bits.to(logits)).norm(dim=1)
        return norm_B / logits.shape[1]
    return bit_losses(logits, bits).mean(1)
