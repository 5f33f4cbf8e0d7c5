"""Rotary positions: scores depend on distances alone, so a segment may be short."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memformer_pl.errors import UsageError


class Rotation(NamedTuple):
    """The rotation of each pair of channels of each token, in float32."""

    cos: Float[Tensor, "#B L 1 K"]
    sin: Float[Tensor, "#B L 1 K"]
    """Factor of the other channel of the pair, with a minus for the first channel."""

    def turn(self, x_BLHK: Float[Tensor, "B L *H K"]) -> Float[Tensor, "B L *H K"]:
        """Rotate each pair of channels of ``x``: products of rotated vectors depend on the distance of their tokens."""
        out: Tensor = _Turn.apply(x_BLHK, self.cos, self.sin)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return out

    def turn_heads(self, x_BHLK: Float[Tensor, "B H L K"]) -> Float[Tensor, "B H L K"]:
        """As :meth:`turn`, for queries or keys whose heads stand before their tokens."""
        return self.turn(x_BHLK.transpose(1, 2)).transpose(1, 2)

    def rows(self, rows: slice) -> "Rotation":
        """The rotation of a part of the tokens."""
        return Rotation(self.cos[:, rows], self.sin[:, rows])

    def with_more_at_first(self, count: int) -> "Rotation":
        """The rotations of these tokens, and behind them ``count`` more at the position of the first."""
        return Rotation(*(torch.cat((field, field[:, :1].expand(-1, count, -1, -1)), dim=1) for field in self))


class _Turn(torch.autograd.Function):
    """A rotation, in three operations forward and backward: the gradient is turned back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turned(x, cos, sin, forward=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return turned(grads[0], *ctx.saved_tensors, forward=False), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, *, forward: bool) -> Tensor:
    """``x [..., K]`` rotated forward or back, in its own dtype."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin, value=1 if forward else -1).to(x.dtype)


class RotaryPositions(nn.Module):
    """Turn positions into rotations (Su et al. 2021). Ours: the paper does not specify positions.

    The rotations of all positions are computed once, on the CPU, so they are the same on every device.

    Args:
        width: Width of a head; even. A pair is a channel of the first half and one of the second.
        first: The first position that occurs; may be negative.
        last: The last one.
        base: The slowest pair of channels turns once in about ``2 pi base`` tokens.
    """

    def __init__(self, *, width: int, first: int, last: int, base: float = 10_000.0) -> None:
        super().__init__()
        if width % 2:
            raise UsageError(f"rotary positions need heads of an even width, got {width=}: choose dim / heads even")
        self.width, self.first, self.last, self.base = width, first, last, base
        self._table = self._computed(torch.get_default_device())

    def forward(self, positions: Int[Tensor, "B L"]) -> Rotation:
        """The rotations of tokens at ``positions``."""
        index = positions - self.first
        return Rotation(self._table.cos[index], self._table.sin[index])

    def span(self, first: int, stop: int, place: Int[Tensor, " B"] | None = None) -> Rotation:
        """The rotations of tokens at ``first`` to ``stop - 1``, the same in all lanes; views.

        Args:
            first: Position of the first token.
            stop: Position behind the last one.
            place: By default 0: where each lane counts positions from. Beyond ``last`` all have that of ``last``.
        """
        if place is not None:
            positions = place[:, None] + torch.arange(first, stop, device=place.device)
            rotation: Rotation = self(positions.clamp(max=self.last))
            return rotation
        rows = slice(first - self.first, stop - self.first)
        return Rotation(self._table.cos[None, rows], self._table.sin[None, rows])

    def _computed(self, device: torch.device) -> Rotation:
        """The table of all positions, ``[positions, 1, K]``."""
        powers = torch.arange(0, self.width, 2, device="cpu", dtype=torch.float32) / self.width
        positions = torch.arange(self.first, self.last + 1, device="cpu")
        angle = positions[:, None, None] * self.base**-powers
        cos, sin = angle.cos(), angle.sin()
        return Rotation(torch.cat((cos, cos), dim=-1).to(device), torch.cat((-sin, sin), dim=-1).to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryPositions":
        """Follow the module to another device. Unlike a buffer, the table keeps its dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._table = self._computed(fn(torch.empty(0, device=self._table.cos.device)).device)
        return self
