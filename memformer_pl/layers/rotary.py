"""Rotary positions: scores depend on distances alone, so a segment may be short."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from memformer_pl.errors import UsageError


class Rotation(NamedTuple):
    """The rotation of each pair of channels of each token."""

    cos: Float[Tensor, "B 1 L K"]
    sin: Float[Tensor, "B 1 L K"]
    """Factor of the other channel of the pair, with a minus for the first channel."""

    @classmethod
    def by(cls, angle: Float[Tensor, "B 1 L half_K"]) -> "Rotation":
        """Rotate each pair by an angle. A pair is a channel of the first half and one of the second."""
        cos, sin = angle.cos(), angle.sin()
        return cls(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))

    def turn(self, x_BHLK: Float[Tensor, "B H L K"]) -> Float[Tensor, "B H L K"]:
        """Rotate each pair of channels of ``x``: products of rotated vectors depend on the distance of their tokens."""
        first, second = x_BHLK.chunk(2, dim=-1)
        return (x_BHLK * self.cos + torch.cat((second, first), dim=-1) * self.sin).to(x_BHLK.dtype)

    def rows(self, rows: slice) -> "Rotation":
        """The rotation of a part of the tokens."""
        return Rotation(self.cos[..., rows, :], self.sin[..., rows, :])


class RotaryPositions(nn.Module):
    """Turn positions into rotations (Su et al. 2021). Ours: the paper does not specify positions.

    Args:
        width: Width of a head; even.
        base: The slowest pair of channels turns once in about ``2 pi base`` tokens.
    """

    def __init__(self, *, width: int, base: float = 10_000.0) -> None:
        super().__init__()
        if width % 2:
            raise UsageError(f"rotary positions need heads of an even width, got {width=}: choose dim / heads even")
        self.width, self.base = width, base

    def forward(self, positions: Int[Tensor, "B L"]) -> Rotation:
        """The rotations of tokens at ``positions``, which may be negative; always in float32."""
        powers = torch.arange(0, self.width, 2, device=positions.device, dtype=torch.float32) / self.width
        angle = rearrange(positions, "B L -> B 1 L 1") * self.base**-powers
        return Rotation.by(angle)
