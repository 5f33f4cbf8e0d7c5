"""Dropout that falls on a segment as it would if the segment were read alone."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memformer_pl.gradients.rng import by_stream

PARTS = 1 << 16
"""On a CPU a chance is rounded to so many parts."""


class Dropout(nn.Dropout):
    """Torch's, save that of several segments in one batch each is drawn from its own random stream, where it has one
    (:func:`~memformer_pl.gradients.rng.own_streams`).

    A CPU draws random numbers one by one, a fifth of a forward pass. Here each of them decides about four entries. What
    is left is divided by the rounded chance, so that the mean of an entry is what it was.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``input`` with some entries at zero and the others as much larger."""
        return by_stream(self._drop, input)

    def _drop(self, x: Tensor) -> Tensor:
        if not (self.training and 0 < self.p < 1 and x.device.type == "cpu"):
            out: Tensor = super().forward(x)
            return out
        return x * kept(x, dropped=min(round(self.p * PARTS), PARTS - 1))


def kept(like: Float[Tensor, "*any"], *, dropped: int) -> Float[Tensor, "*any"]:
    """Zeros, each by a chance of ``dropped / PARTS``; elsewhere the number that brings the mean to one."""
    numbers = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    sixteen_bits = numbers.view(torch.int16)[: like.numel()].view_as(like)
    # straight into floating point: twice as fast as by way of booleans
    ones = torch.ge(sixteen_bits, dropped - PARTS // 2, out=torch.empty_like(sixteen_bits, dtype=like.dtype))
    return ones.mul_(PARTS / (PARTS - dropped))
