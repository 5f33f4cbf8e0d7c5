"""How the next token is chosen from what a model says about it.

B  lanes     V  vocabulary     T  tokens
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memformer_pl.contract import ABSENT
from memformer_pl.errors import NonFiniteError, UsageError

LEAST_SEED, GREATEST_SEED = -(2**63), 2**64 - 1
"""What torch takes."""


class Sampling:
    """Draws a token for each lane; from a random stream of its own, so that two of them never share anything.

    In this order: repetition penalty, temperature, ``top_k``, ``top_p``. The numbers are drawn on the CPU, one for each
    lane, whatever the device, and each picks the token at its share of the probability, the likeliest token first
    where some are left out.

    Args:
        temperature: Divides the logarithms of the chances. Below 1, likely tokens become likelier still; at 0 the
            likeliest is taken.
        top_k: Only so many of the likeliest tokens can be drawn; by default all.
        top_p: Only the likeliest tokens that have this chance together; by default all. The likeliest always can.
        repetition_penalty: The logarithm of the chance of a token that was read lately is multiplied by it (after
            Keskar et al. 2019, who take unnormalised scores): above 1 it becomes unlikelier. What is lately is said by
            who calls; a session shows the last ``segment_length`` tokens that it has read, its own included.
        seed: Of the random stream.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= temperature < math.inf:
            raise UsageError(f"temperature must be 0 (the likeliest token) or more, got {temperature}")
        if top_k is not None and top_k < 1:
            raise UsageError(f"top_k must be at least 1, got {top_k}: leave it out to draw from all tokens")
        if top_k is not None and top_k % 1 != 0:
            raise UsageError(f"top_k must be a whole number, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {top_p}: leave it out to draw from all tokens")
        if not 0 < repetition_penalty < math.inf:
            raise UsageError(f"repetition_penalty must be above 0, got {repetition_penalty}: 1 is without")
        if not LEAST_SEED <= seed <= GREATEST_SEED or seed % 1 != 0:
            raise UsageError(f"seed must be a whole number from {LEAST_SEED} to {GREATEST_SEED}, got {seed}")
        self.temperature, self.top_k, self.top_p = temperature, None if top_k is None else int(top_k), top_p
        self.repetition_penalty, self.seed = repetition_penalty, seed
        self._stream = torch.Generator().manual_seed(int(seed))

    def __call__(self, log_probs: Float[Tensor, "B V"], recent: Int[Tensor, "B T"] | None = None) -> Int[Tensor, " B"]:
        """Draw the next token of each lane.

        Args:
            log_probs: What the model says.
            recent: Tokens that each lane has read lately, ``ABSENT`` where there is none.

        Raises:
            NonFiniteError: The model says nothing that is a number.
            UsageError: ``log_probs`` is of another shape.
        """
        chances, tokens = self._candidates(log_probs, recent)
        at = torch.rand(len(chances), 1, generator=self._stream, dtype=torch.float64).to(chances.device)
        below = chances.cumsum(-1)
        place = (below <= at * below[:, -1:]).sum(-1, keepdim=True)
        return tokens.gather(1, place)[:, 0]

    def chances(
        self, log_probs: Float[Tensor, "B V"], recent: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B V"]:
        """The chance that each token is drawn with."""
        chances, tokens = self._candidates(log_probs, recent)
        return torch.zeros(log_probs.shape, dtype=chances.dtype, device=chances.device).scatter(1, tokens, chances)

    def _candidates(
        self, log_probs: Float[Tensor, "B V"], recent: Int[Tensor, "B T"] | None
    ) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """The chances of the tokens that can be drawn, and which these are."""
        if log_probs.dim() != 2 or not log_probs.numel():
            raise UsageError(f"log_probs must have the shape [lanes, vocabulary], got {list(log_probs.shape)}")
        if log_probs.isnan().any():
            raise NonFiniteError("the chances of the next token are no numbers: the model's weights are not finite")
        scores = self._penalised(log_probs.double(), recent)
        top_k = 1 if self.temperature == 0 else min(self.top_k or scores.shape[1], scores.shape[1])
        if top_k < scores.shape[1] or self.top_p is not None:
            scores, tokens = scores.topk(top_k)
        else:
            tokens = torch.arange(top_k, device=scores.device).expand_as(scores)
        chances = ((scores - scores.amax(1, keepdim=True)) / (self.temperature or 1.0)).softmax(-1)
        if self.top_p is not None:
            likelier = chances.cumsum(-1) - chances
            chances = chances.masked_fill(likelier >= self.top_p, 0.0)
            chances = chances / chances.sum(-1, keepdim=True)
        return chances, tokens

    def _penalised(self, log_probs: Float[Tensor, "B V"], recent: Int[Tensor, "B T"] | None) -> Float[Tensor, "B V"]:
        if recent is None or self.repetition_penalty == 1:
            return log_probs
        # one column more, for what is absent
        read = torch.zeros(len(log_probs), log_probs.shape[1] + 1, dtype=torch.bool, device=log_probs.device)
        tokens = recent.to(log_probs.device)
        read = read.scatter(1, tokens.masked_fill(tokens == ABSENT, log_probs.shape[1]), True)[:, :-1]
        return torch.where(read, log_probs * self.repetition_penalty, log_probs)
