"""LaMemo (Ji et al. 2022, arXiv 2204.07341): a Transformer-XL whose cached tokens read on to what came after them.

B  lanes     L  tokens in a segment     M  cached tokens     N  layers     D  width     H  heads
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memformer_pl.contract import ABSENT, Segment, detach
from memformer_pl.layers import (
    BlockConfig,
    LookAheadBlock,
    Positions,
    RunningSoftmax,
    ahead_mask,
    cached_and_causal,
    filled_part,
    push,
)
from memformer_pl.models.xl_base import LastBlockInput, XLCache, XLTransformer


class LaMemoState(NamedTuple):
    """What LaMemo carries; never with a graph. All rows right-aligned."""

    embedded: Float[Tensor, "B M D"]
    """What entered the first layer at the last tokens."""
    contexts: Float[Tensor, "B N-1 M D"]
    """What attention has read there so far, in each layer but the last."""
    log_sums: Float[Tensor, "B N-1 M H"]
    """Logarithms of the sums that these means were divided by."""
    filled: Int[Tensor, " B"]
    """How many cached tokens there are."""
    arrived: Int[Tensor, " B"]
    """How many tokens the previous segment had."""
    last: Int[Tensor, " B"]
    """The last token, still to be read; ``ABSENT`` where there is none."""


class Refreshed(NamedTuple):
    """A segment up to the last block, with its cache."""

    x: Float[Tensor, "B L D"]
    """What enters the last block."""
    hidden: list[Float[Tensor, "B M D"]]
    """What enters each block at the cached tokens."""
    attended: list[RunningSoftmax]
    """What cached and present tokens have attended to in each block but the last."""
    at: Positions


class LaMemo(XLTransformer[LaMemoState]):
    """Predict each token from those before it in its segment, and from a cache that is refreshed at each segment.

    What enters each layer at the cached tokens is computed anew from their embeddings, with the weights as they are
    now. There they read the tokens behind them that have come since, up to the first of the segment, which every query
    sees anyway; and what they read is merged with what they have read before, as one softmax over all keys would do it
    (section 3.2; exact in the first layer, whose input does not change). The cost is linear in ``memory_length``.

    Ours: pre-norm layers, and what else :class:`~memformer_pl.models.TransformerXL` says; sums are merged by their
    logarithms, so that no epsilon is needed; the last layer's cache is never read by anything, and is left out.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens; even.
        heads: Attention heads; must divide ``dim``.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        layers: How many blocks.
        memory_length: Tokens that are cached; 0 is a Transformer without memory.
        segment_length: The most tokens that a segment may hold.
        dropout: On what each branch of a layer adds, and on embeddings. What is cached keeps its own.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        ffn_dim: int | None = None,
        layers: int = 12,
        memory_length: int = 64,
        segment_length: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            segment_length=segment_length,
            layers=layers,
            memory_length=memory_length,
            block=BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout),
            lower=LookAheadBlock,
        )

    def initial_state(self, lanes: int) -> LaMemoState:
        """An empty cache, and no token before the first."""
        rows, below, none = self.memory_length, self.layers - 1, self.filled_with(0, lanes=lanes)
        log_sums = self.zeros(lanes, below, rows, self.heads)
        return LaMemoState(
            self.zeros(lanes, rows, self.dim),
            self.zeros(lanes, below, rows, self.dim),
            # in bfloat16 a sum over many segments would lose the new ones
            log_sums.to(torch.promote_types(log_sums.dtype, torch.float32)),
            none,
            none,
            self.filled_with(ABSENT, lanes=lanes),
        )

    def run_lower_blocks(self, segment: Segment, state: LaMemoState) -> tuple[LastBlockInput, LaMemoState]:
        """Run all blocks but the last, and refresh the cache on the way."""
        state = detach(state)
        rows, arrived = self.memory_length, segment.token_mask.sum(1)
        x = self.embedding(segment.tokens[:, :-1], state.last)
        embedded = push(state.embedded, x, arrived)
        refreshed = self._refresh(state, x)
        contexts, log_sums = state.contexts, state.log_sums
        if refreshed.attended:
            contexts, log_sums = (
                push(field[:, :, :rows], field[:, :, rows:], arrived)
                for field in (torch.stack(fields, dim=1) for fields in zip(*refreshed.attended, strict=True))
            )
        filled = (state.filled + arrived).clamp(max=rows)
        next_state = LaMemoState(embedded, contexts, log_sums, filled, arrived, self.last_token(segment))
        return LastBlockInput(refreshed.x, refreshed.hidden[-1], refreshed.at), next_state

    def xl_cache(self, state: LaMemoState) -> XLCache:
        """The cache, refreshed up to the last token, which is the first that a segment reads."""
        hidden = self._refresh(state, self.first(state.last)).hidden
        return XLCache(state.last, torch.stack(hidden, dim=1), filled_part(state.filled, rows=self.memory_length))

    def _refresh(self, state: LaMemoState, x: Float[Tensor, "B L D"]) -> Refreshed:
        """Run a segment up to the last block; ``x`` is what enters the first."""
        rows = self.memory_length
        visible = cached_and_causal(filled_part(state.filled, rows=rows), length=x.shape[1])
        ahead = ahead_mask(state.arrived, cached=rows, most=self.segment_length)
        hidden, attended = [state.embedded], []
        for n, block in enumerate(self.blocks[:-1]):
            assert isinstance(block, LookAheadBlock)
            past = RunningSoftmax(state.contexts[:, n], state.log_sums[:, n])
            refreshed, x, both = block.refresh(hidden[-1], x, past, visible=visible, ahead_visible=ahead)
            hidden.append(refreshed)
            attended.append(both)
        return Refreshed(x, hidden, attended, Positions(visible))
