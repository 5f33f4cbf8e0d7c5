"""A segment with memory tokens in front of it and behind it: which positions exist, and where they stand.

B  lanes     L  tokens in a segment     P  positions: memory, START, tokens, memory
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.layers.attention import KeysValues, Positions, SourceKeysValues
from memformer_pl.layers.dropout import Keep
from memformer_pl.layers.transformer import TransformerBlock


class Lengthened(NamedTuple):
    """A segment with memory tokens on both sides."""

    ranks: Int[Tensor, " P"]
    """The order of the positions; START has 0, so memory in front has negative numbers."""
    exists: Bool[Tensor, "B P"]
    positions: Int[Tensor, "B P"]
    """Positions, counted from the first token; memory behind directly follows the last token of its lane."""


def lengthen(token_mask: Bool[Tensor, "B L"], *, before: int, behind: int) -> Lengthened:
    """Put START, and memory tokens, around the tokens of a segment.

    Args:
        token_mask: Which tokens exist, at the left.
        before: Number of memory tokens in front.
        behind: Number of memory tokens behind.
    """
    length = token_mask.shape[1]
    ranks = torch.arange(-before, length + 1 + behind, device=token_mask.device)
    exists = F.pad(token_mask, (before + 1, behind), value=True)
    missing = (~token_mask).sum(1, keepdim=True) * (ranks > length)
    return Lengthened(ranks, exists, ranks - 1 - missing)


class EnteredBlock(NamedTuple):
    """A block that a lengthened segment has entered, to be run at some of the positions."""

    block: TransformerBlock
    x: Float[Tensor, "B P D"]
    query: Float[Tensor, "B H P K"]
    keys_values: KeysValues
    at: Positions
    keep: Keep | None

    def run(self, rows: slice) -> Float[Tensor, "B L D"]:
        """What leaves the block at a part of the positions."""
        keep = None if self.keep is None else self.keep[:, :, rows]
        x, query, at = self.x[:, rows], self.query[:, :, rows], self.at.rows(rows)
        return self.block.forward_rows(x, query, at, self.keys_values, keep=keep)


def enter(
    block: TransformerBlock,
    x: Float[Tensor, "B P D"],
    at: Positions,
    *,
    before: SourceKeysValues | None = None,
    keep: Keep | None = None,
) -> EnteredBlock:
    """Compute what a block needs of all positions.

    Args:
        block: The block.
        x: What enters it.
        at: Positions, and the mask over all that they see.
        before: Keys and values of what stands in front of ``x``; by default nothing does.
        keep: Factors of dropout; by default nothing is dropped.
    """
    return EnteredBlock(block, x, *block.project(x, at, before), at, keep)
