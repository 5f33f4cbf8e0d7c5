"""A short causal convolution of each channel, whose last inputs are carried.

B  lanes     L  tokens     C  channels     P  inputs before the first token
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

TAPS = 4
"""Tokens that a convolution sees, the present one included: that of the papers that use it."""


class ShortConvolution(nn.Module):
    """Mix each channel over the last ``TAPS`` tokens, those before the segment included, and apply SiLU.

    A sum of shifted inputs: torch has no fast grouped convolution in double precision.

    Args:
        channels: Number of channels.
    """

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(TAPS, channels) * TAPS**-0.5)

    def forward(
        self, x: Float[Tensor, "B L C"], before: Float[Tensor, "B P C"], arrived: Int[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B L C"], Float[Tensor, "B P C"]]:
        """Mix the inputs.

        Args:
            x: Inputs of each lane; those that exist are at the left.
            before: The last inputs before them; zeros where there were none.
            arrived: Number of inputs that exist.

        Returns:
            The mixed inputs, and the last inputs that exist, with gradient.
        """
        length, inputs = x.shape[1], torch.cat((before, x), dim=1)
        mixed = self.weight[0] * inputs[:, :length]
        for n in range(1, TAPS):
            mixed = torch.addcmul(mixed, self.weight[n], inputs[:, n : n + length])
        index_BP = torch.arange(TAPS - 1, device=x.device) + arrived[:, None]
        return F.silu(mixed), inputs.take_along_dim(index_BP[..., None], dim=1).to(before.dtype)
