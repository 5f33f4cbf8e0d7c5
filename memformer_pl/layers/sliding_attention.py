"""Attention of each token to itself, to a number of tokens before it, in earlier segments too, and to learned vectors.

B  lanes     L  tokens     D  width     H  heads     K  width of a head     W  rows of a window
P  learned vectors     G  vectors of a token that are seen: 1, or 2 with a read     J  heads of a window: G H
S  rows of the window and the tokens behind it     R  rows of a head: G S
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.layers.attention import SelfAttention, with_before
from memformer_pl.layers.relative_attention import mix
from memformer_pl.layers.rotary import RotaryPositions
from memformer_pl.layers.xl_cache import filled_part, push_with_graph

RowsOfHeads = tuple[Float[Tensor, "B J L K"], Float[Tensor, "B J L K"]]
"""Keys and values of tokens, as a window has them."""


class Window(NamedTuple):
    """The last tokens that a layer has read."""

    keys: Float[Tensor, "B J W K"]
    """Without positions, right-aligned; those of reads are behind those of tokens, as further heads."""
    values: Float[Tensor, "B J W K"]
    filled: Int[Tensor, " B"]
    """Number of filled rows."""

    def push(self, keys_values: RowsOfHeads, token_mask: Bool[Tensor, "B L"]) -> "Window":
        """The window after further tokens, of which those exist that stand at the left; one without rows has none."""
        arrived = token_mask.sum(1)
        keys, values = (push_with_graph(old, new, arrived) for old, new in zip(self[:2], keys_values, strict=True))
        return Window(keys, values, (self.filled + arrived).clamp(max=self.keys.shape[2]))


class SlidingAttention(SelfAttention):
    """Attention to a sliding window and to learned vectors without positions (Titans' persistent memory).

    Args:
        dim: Width of tokens.
        heads: Must divide ``dim`` into even widths.
        window: Number of tokens before its own that a token sees, and of their reads.
        persistent: Number of learned vectors.
        segment_length: The most tokens of a call.
    """

    no_decay = ("persistent",)

    def __init__(self, *, dim: int, heads: int, window: int, persistent: int, segment_length: int) -> None:
        super().__init__(dim=dim, heads=heads)
        self.window = window
        self.rotary = RotaryPositions(width=dim // heads, first=-window, last=segment_length)
        self.persistent = nn.Parameter(torch.randn(persistent, dim))

    def look(
        self,
        x: Float[Tensor, "B L D"],
        window: Window,
        token_mask: Bool[Tensor, "B L"],
        place: Int[Tensor, " B"] | None = None,
        reads: Float[Tensor, "B L D"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], Window]:
        """The update of tokens, and the window after them.

        Args:
            x: Tokens.
            window: Before the first of them.
            token_mask: Which of them exist, at the left.
            place: Tokens of the segment before the first of them, by default none: rotations are rounded, so a token
                must have the same one in a segment and in a piece of it.
            reads: Vectors that stand at the place of each token, and are seen from the same places on.
        """
        rows, length = window.keys.shape[2], x.shape[1]
        query, new = self._project(x, reads)
        keys, values = with_before((window.keys, window.values), new)
        rotation = self.rotary.span(-rows, length, place)
        query = query * query.shape[3] ** -0.5
        # a score with a learned vector must not depend on where a segment begins, so no rotation is in it
        learned_keys, learned_values = self.keys_values(self.persistent[None])
        turned = rotation.rows(slice(rows, None)).turn_heads(query)
        visible = self._visible(window, length).repeat(1, 1, 1, keys.shape[1] // self.heads)
        near = (turned @ self._by_head(rotation.turn_heads(keys)).mT).masked_fill(~visible, -torch.inf)
        weights = self.weights(torch.cat((query @ learned_keys.mT, near), dim=3).softmax(dim=-1))
        values = torch.cat((learned_values.expand(len(x), -1, -1, -1), self._by_head(values)), dim=2)
        out: Tensor = self.to_out(mix(weights, values))
        return out, window.push(new, token_mask)

    def advance(self, x: Float[Tensor, "B L D"], window: Window, token_mask: Bool[Tensor, "B L"]) -> Window:
        """The window that :meth:`look` returns."""
        return window.push(self.project(x)[1], token_mask)

    def _project(
        self, x: Float[Tensor, "B L D"], reads: Float[Tensor, "B L D"] | None
    ) -> tuple[Float[Tensor, "B H L K"], RowsOfHeads]:
        """Queries of tokens, and keys and values of tokens and reads as those of further heads."""
        query, keys_values = self.project(x)
        if reads is None:
            return query, keys_values
        keys, values = (torch.cat(pair, dim=1) for pair in zip(keys_values, self.keys_values(reads), strict=True))
        return query, (keys, values)

    def _by_head(self, x: Float[Tensor, "B J S K"]) -> Float[Tensor, "B H R K"]:
        """The rows of tokens and reads of each head."""
        return rearrange(x, "B (G H) S K -> B H (G S) K", H=self.heads)

    def _visible(self, window: Window, length: int) -> Bool[Tensor, "B 1 L S"]:
        """Which rows of the window and of the tokens behind it each token sees."""
        rows, device = window.keys.shape[2], window.filled.device
        row, place = torch.arange(rows + length, device=device), torch.arange(length, device=device)[:, None]
        near = (row >= place + rows - self.window) & (row <= place + rows)
        exists = F.pad(filled_part(window.filled, rows=rows), (0, length), value=True)
        return (near & exists[:, None])[:, None]
