"""Sampling of the next token from the log-probabilities of a model.

B  lanes     V  vocabulary     T  tokens
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memformer_pl.contract import ABSENT
from memformer_pl.errors import NonFiniteError, UsageError

LEAST_SEED, GREATEST_SEED = -(2**63), 2**64 - 1
"""The range of seeds of a torch generator."""


class Sampling:
    """Draws a token for each lane, from a random stream of its own.

    Applies repetition penalty, temperature, ``top_k`` and ``top_p``, in this order. One number for each lane is drawn
    on the CPU, whatever the device, and inverts the cumulative distribution; with ``top_k`` or ``top_p`` the tokens are
    sorted first.

    Args:
        temperature: Divides log-probabilities. Below 1, likely tokens become more likely; 0 takes the most likely one.
        top_k: Draw only from this number of the most likely tokens; by default from all.
        top_p: Draw only from the most likely tokens that reach this probability together; by default from all. The
            most likely token always stays.
        repetition_penalty: Multiplies the log-probability of recent tokens (after Keskar et al. 2019, who use
            unnormalised scores): above 1 they become less likely. The caller passes the recent tokens; a session
            passes the last ``segment_length`` tokens that it has read or drawn.
        seed: Seed of the random stream.
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
            raise UsageError(f"temperature must be 0 (the most likely token) or more, got {temperature}")
        if top_k is not None and top_k < 1:
            raise UsageError(f"top_k must be at least 1, got {top_k}: leave it out to draw from all tokens")
        if top_k is not None and top_k % 1 != 0:
            raise UsageError(f"top_k must be a whole number, got {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {top_p}: leave it out to draw from all tokens")
        if not 0 < repetition_penalty < math.inf:
            raise UsageError(f"repetition_penalty must be above 0, got {repetition_penalty}: 1 switches it off")
        if not LEAST_SEED <= seed <= GREATEST_SEED or seed % 1 != 0:
            raise UsageError(f"seed must be a whole number from {LEAST_SEED} to {GREATEST_SEED}, got {seed}")
        self.temperature, self.top_k, self.top_p = temperature, None if top_k is None else int(top_k), top_p
        self.repetition_penalty, self.seed = repetition_penalty, seed
        self._stream = torch.Generator().manual_seed(int(seed))

    def __call__(self, log_probs: Float[Tensor, "B V"], recent: Int[Tensor, "B T"] | None = None) -> Int[Tensor, " B"]:
        """Draw the next token of each lane.

        Args:
            log_probs: Log-probabilities of the next token.
            recent: Recent tokens of each lane; ``ABSENT`` where there is none.

        Raises:
            NonFiniteError: ``log_probs`` holds NaN.
            UsageError: ``log_probs`` has another shape.
        """
        probs, tokens = self._candidates(log_probs, recent)
        drawn = torch.rand(len(probs), 1, generator=self._stream, dtype=torch.float64).to(probs.device)
        cumulative = probs.cumsum(-1)
        index = (cumulative <= drawn * cumulative[:, -1:]).sum(-1, keepdim=True)
        return tokens.gather(1, index)[:, 0]

    def probs(self, log_probs: Float[Tensor, "B V"], recent: Int[Tensor, "B T"] | None = None) -> Float[Tensor, "B V"]:
        """The probability with which each token is drawn."""
        probs, tokens = self._candidates(log_probs, recent)
        return torch.zeros(log_probs.shape, dtype=probs.dtype, device=probs.device).scatter(1, tokens, probs)

    def _candidates(
        self, log_probs: Float[Tensor, "B V"], recent: Int[Tensor, "B T"] | None
    ) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """The tokens that can be drawn, and their probabilities."""
        if log_probs.dim() != 2 or not log_probs.numel():
            raise UsageError(f"log_probs must have the shape [lanes, vocabulary], got {list(log_probs.shape)}")
        if log_probs.isnan().any():
            raise NonFiniteError("the probabilities of the next token are NaN: the model's weights are not finite")
        scores = self._penalised(log_probs.double(), recent)
        top_k = 1 if self.temperature == 0 else min(self.top_k or scores.shape[1], scores.shape[1])
        if top_k < scores.shape[1] or self.top_p is not None:
            scores, tokens = scores.topk(top_k)
        else:
            tokens = torch.arange(top_k, device=scores.device).expand_as(scores)
        probs = ((scores - scores.amax(1, keepdim=True)) / (self.temperature or 1.0)).softmax(-1)
        if self.top_p is not None:
            more_likely = probs.cumsum(-1) - probs
            probs = probs.masked_fill(more_likely >= self.top_p, 0.0)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs, tokens

    def _penalised(self, log_probs: Float[Tensor, "B V"], recent: Int[Tensor, "B T"] | None) -> Float[Tensor, "B V"]:
        if recent is None or self.repetition_penalty == 1:
            return log_probs
        # one more column, for absent tokens
        penalised = torch.zeros(len(log_probs), log_probs.shape[1] + 1, dtype=torch.bool, device=log_probs.device)
        tokens = recent.to(log_probs.device)
        penalised = penalised.scatter(1, tokens.masked_fill(tokens == ABSENT, log_probs.shape[1]), True)[:, :-1]
        return torch.where(penalised, log_probs * self.repetition_penalty, log_probs)
