"""Where a token stands: rotary positions, so that only distances count, and a segment may be short."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from memformer_pl.errors import UsageError


class Rotation(NamedTuple):
    """The angle by which each pair of channels of each token is turned."""

    cos: Float[Tensor, "B 1 L K"]
    sin: Float[Tensor, "B 1 L K"]
    """By which the other channel of the pair is multiplied: of the first channel with a minus."""

    @classmethod
    def by(cls, angle: Float[Tensor, "B 1 L half_K"]) -> "Rotation":
        """That of each pair by an angle. A pair is a channel of the first half and one of the second."""
        cos, sin = angle.cos(), angle.sin()
        return cls(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))

    def turn(self, x_BHLK: Float[Tensor, "B H L K"]) -> Float[Tensor, "B H L K"]:
        """``x`` with each pair of channels turned: products of such vectors depend on the distance of their tokens."""
        first, second = x_BHLK.chunk(2, dim=-1)
        return (x_BHLK * self.cos + torch.cat((second, first), dim=-1) * self.sin).to(x_BHLK.dtype)

    def rows(self, rows: slice) -> "Rotation":
        """That of some of the tokens."""
        return Rotation(self.cos[..., rows, :], self.sin[..., rows, :])


class RotaryPositions(nn.Module):
    """Turn positions into rotations (Su et al. 2021). The paper leaves positions open; this choice is ours.

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
        """The rotations of tokens at ``positions``, which may be negative; in float32 in any precision."""
        powers = torch.arange(0, self.width, 2, device=positions.device, dtype=torch.float32) / self.width
        angle = rearrange(positions, "B L -> B 1 L 1") * self.base**-powers
        return Rotation.by(angle)
