"""LaMemo (Ji et al. 2022, arXiv 2204.07341): a Transformer-XL whose cached tokens attend to later tokens too.

B  lanes     L  tokens in a segment     M  cached tokens     N  layers     D  width     H  heads
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memformer_pl.contract import ABSENT, Segment, detach
from memformer_pl.layers import (
    BlockConfig,
    LookAheadBlock,
    Positions,
    RunningSoftmax,
    ahead_mask,
    drop,
    filled_part,
    push,
)
from memformer_pl.models.xl_base import LastBlockInput, XLCache, XLTransformer


class LaMemoState(NamedTuple):
    """State of LaMemo; never with a graph. All rows are right-aligned."""

    embedded: Float[Tensor, "B M D"]
    """Inputs of the first layer at the last tokens."""
    contexts: Float[Tensor, "B N-1 M D"]
    """Results of attention there so far, in each layer but the last."""
    log_sums: Float[Tensor, "B N-1 M H"]
    """Logarithms of the softmax denominators of these results."""
    filled: Int[Tensor, " B"]
    """Number of cached tokens."""
    arrived: Int[Tensor, " B"]
    """Number of tokens of the previous segment."""
    last: Int[Tensor, " B"]
    """The last token, still to be read; ``ABSENT`` if there is none."""


class Refreshed(NamedTuple):
    """A segment below the last block, with its cache."""

    x: Float[Tensor, "B L D"]
    """Inputs of the last block."""
    hidden: list[Float[Tensor, "B M D"]]
    """Inputs of each block at the cached tokens."""
    attended: list[RunningSoftmax]
    """Attention of cached and present tokens in each block but the last."""
    at: Positions


class LaMemo(XLTransformer[LaMemoState]):
    """Predict each token from those before it in its segment, and from a cache that is refreshed at each segment.

    The inputs of each layer at the cached tokens are computed again from their embeddings, with the present weights.
    Cached tokens also attend to the tokens that came after them, up to the first of the segment, which every query sees
    anyway; the result is merged with their earlier attention, as one softmax over all keys (section 3.2; exact in the
    first layer, whose input does not change). The cost is linear in ``memory_length``.

    Ours: the choices of :class:`~memformer_pl.models.TransformerXL`; denominators are merged by their logarithms, so no
    epsilon is needed; the cache of the last layer, which is never read, is left out.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens; even.
        heads: Attention heads; must divide ``dim``.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        feed_forward: Another feed-forward for some layers, such as :class:`~memformer_pl.layers.UltraMemory`:
            ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``, with layers counted from 0.
        layers: Number of blocks.
        memory_length: Number of cached tokens; 0 gives a Transformer without memory.
        segment_length: The most tokens that a segment may hold.
        dropout: On the output of each branch of a layer, and on embeddings. Cached embeddings keep their dropout.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        ffn_dim: int | None = None,
        feed_forward: dict[str, Any] | None = None,
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
            block=BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout, feed_forward=feed_forward),
            lower=LookAheadBlock,
        )

    def initial_state(self, lanes: int) -> LaMemoState:
        """An empty cache, and no token before the first."""
        rows, below, none = self.memory_length, self.layers - 1, self.filled_with(0, lanes=lanes)
        log_sums = self.zeros(lanes, below, rows, self.heads)
        return LaMemoState(
            self.zeros(lanes, rows, self.dim),
            self.zeros(lanes, below, rows, self.dim),
            # in bfloat16 a sum over many segments would lose new terms
            log_sums.to(torch.promote_types(log_sums.dtype, torch.float32)),
            none,
            none,
            self.filled_with(ABSENT, lanes=lanes),
        )

    def run_lower_blocks(self, segment: Segment, state: LaMemoState) -> tuple[LastBlockInput, LaMemoState]:
        """Run all blocks but the last, and refresh the cache."""
        state = detach(state)
        rows, arrived = self.memory_length, segment.token_mask.sum(1)
        x, seeds = self.embedding(segment.tokens[:, :-1], state.last), self.seeds(segment)
        embedding_keep, last_keep = self.keep(seeds, x, part=0, blocks=self.blocks[-1:])
        x = drop(x, embedding_keep)
        embedded = push(state.embedded, x, arrived)
        refreshed = self._refresh(state, x, seeds)
        contexts, log_sums = state.contexts, state.log_sums
        if refreshed.attended:
            contexts, log_sums = (
                push(field[:, :, :rows], field[:, :, rows:], arrived)
                for field in (torch.stack(fields, dim=1) for fields in zip(*refreshed.attended, strict=True))
            )
        filled = (state.filled + arrived).clamp(max=rows)
        next_state = LaMemoState(embedded, contexts, log_sums, filled, arrived, self.last_token(segment))
        return LastBlockInput(refreshed.x, refreshed.hidden[-1], refreshed.at, last_keep), next_state

    def regions(self) -> Sequence[nn.Module]:
        """The last block; the others refresh the cache, and are not called as modules."""
        return [self.blocks[-1]]

    def xl_cache(self, state: LaMemoState) -> XLCache:
        """The cache, refreshed up to the last token, which is the first input of the next segment."""
        hidden = self._refresh(state, self.first(state.last), None).hidden
        return XLCache(state.last, torch.stack(hidden, dim=1), filled_part(state.filled, rows=self.memory_length))

    def _refresh(self, state: LaMemoState, x: Float[Tensor, "B L D"], seeds: Int[Tensor, " S"] | None) -> Refreshed:
        """Run a segment through all blocks but the last; ``x`` enters the first."""
        rows = self.memory_length
        at = self.positions(filled_part(state.filled, rows=rows), length=x.shape[1])
        ahead = ahead_mask(state.arrived, cached=rows, most=self.segment_length)
        hidden, attended = [state.embedded], []
        both_BSD = x[:, :1].expand(-1, rows + x.shape[1], -1)  # for its shape
        keep = self.keep(seeds, both_BSD, part=1, blocks=self.blocks[:-1], embedded=False)
        for n, block in enumerate(self.blocks[:-1]):
            assert isinstance(block, LookAheadBlock)
            past = RunningSoftmax(state.contexts[:, n], state.log_sums[:, n])
            refreshed, x, both = block.refresh(hidden[-1], x, past, at=at, ahead_visible=ahead, keep=keep[n])
            hidden.append(refreshed)
            attended.append(both)
        return Refreshed(x, hidden, attended, at)
