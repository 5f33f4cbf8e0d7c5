"""Dropout that draws for a segment of a batch what it would draw for the segment alone."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memformer_pl.gradients.rng import by_stream

PARTS = 1 << 16
"""On a CPU a probability is rounded to a multiple of ``1 / PARTS``."""


class Dropout(nn.Dropout):
    """Torch's dropout, but each of several segments in one batch draws from a random stream of its own, if there
    is one (:func:`~memformer_pl.gradients.rng.own_streams`).

    A CPU draws random numbers one by one, which takes a fifth of a forward pass. Here each number decides four entries.
    Entries that stay are divided by the rounded probability of staying, so the mean does not change.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``input`` with some entries set to zero and the others scaled up."""
        return by_stream(self._drop, input)

    def _drop(self, x: Tensor) -> Tensor:
        if not (self.training and 0 < self.p < 1 and x.device.type == "cpu"):
            out: Tensor = super().forward(x)
            return out
        return x * scaled_mask(x, dropped=min(round(self.p * PARTS), PARTS - 1))


def scaled_mask(like: Float[Tensor, "*any"], *, dropped: int) -> Float[Tensor, "*any"]:
    """A mask of zeros, each with probability ``dropped / PARTS``, and of the number that makes its mean one."""
    numbers = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    sixteen_bits = numbers.view(torch.int16)[: like.numel()].view_as(like)
    # straight into floating point: twice as fast as by way of booleans
    ones = torch.ge(sixteen_bits, dropped - PARTS // 2, out=torch.empty_like(sixteen_bits, dtype=like.dtype))
    return ones.mul_(PARTS / (PARTS - dropped))
