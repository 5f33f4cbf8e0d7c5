"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860): attend to a cache of layer inputs at the last tokens.

B  lanes     L  tokens in a segment     M  cached tokens     N  layers     D  width
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memformer_pl.contract import ABSENT, Segment, SegmentOutput, concat_segments, detach
from memformer_pl.layers import (
    EMPTY,
    BlockConfig,
    drop,
    filled_part,
    follow_caches,
    number_caches,
    push,
    take_rows,
)
from memformer_pl.models.xl_base import LastBlockInput, XLCache, XLTransformer


class TransformerXLState(NamedTuple):
    """State of Transformer-XL; never with a graph."""

    cache: Float[Tensor, "B N M D"]
    """What entered each layer at the last tokens, right-aligned."""
    filled: Int[Tensor, " B"]
    """Number of filled rows."""
    last: Int[Tensor, " B"]
    """The last token, still to be read; ``ABSENT`` if there is none."""


class TransformerXL(XLTransformer[TransformerXLState]):
    """Predict each token from earlier tokens of its segment, and from cached inputs of each layer at the tokens before
    the segment (section 3).

    Each layer reaches ``memory_length`` tokens further back than the one below it. Keys and values of cached tokens are
    computed with the present weights. The losses of a document in segments equal those of one pass, to rounding, as
    long as the cache holds the whole document.

    Ours: pre-norm layers and one table for input and output, as in all models of this package; ``u`` and ``v`` in each
    layer; a cache that is not yet full is masked, not filled with zeros; distances are not clamped, and a query sees
    the whole cache and all earlier tokens of its segment (no ``same_length``).

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens; even.
        heads: Attention heads; must divide ``dim``.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        feed_forward: Another feed-forward for some layers, such as :class:`~memformer_pl.layers.UltraMemory`:
            ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``, with layers counted from 0.
        layers: Number of blocks.
        memory_length: Number of cached tokens; 0 gives a Transformer without memory. May be larger in evaluation.
        segment_length: The most tokens that a segment may hold.
        dropout: On the output of each branch of a layer, and on embeddings.
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
        )

    def initial_state(self, lanes: int) -> TransformerXLState:
        """An empty cache, and no token before the first."""
        cache = self.zeros(lanes, self.layers, self.memory_length, self.dim)
        return TransformerXLState(cache, self.filled_with(0, lanes=lanes), self.filled_with(ABSENT, lanes=lanes))

    def run_lower_blocks(
        self, segment: Segment, state: TransformerXLState
    ) -> tuple[LastBlockInput, TransformerXLState]:
        """Run all blocks but the last, and cache the inputs of each block."""
        state = detach(state)
        x, arrived = self.embedding(segment.tokens[:, :-1], state.last), segment.token_mask.sum(1)
        keep = self.keep(self.seeds(segment), x, part=0, blocks=self.blocks)
        at = self.positions(filled_part(state.filled, rows=self.memory_length), length=x.shape[1])
        inputs = self.block_inputs(drop(x, keep[0]), state.cache, at, keep[1:])
        filled = (state.filled + arrived).clamp(max=self.memory_length)
        next_state = TransformerXLState(push(state.cache, inputs, arrived), filled, self.last_token(segment))
        return LastBlockInput(inputs[:, -1], state.cache[:, -1], at, keep[-1]), next_state

    def rollout_step(
        self, segments: Sequence[Segment], state: TransformerXLState
    ) -> tuple[SegmentOutput, TransformerXLState]:
        """Run each block on all segments at once; cached rows come from a copy without a graph of what entered it."""
        state, whole = detach(state), concat_segments(segments)
        entering = number_caches(state.filled, state.last, rows=self.memory_length)
        caches = follow_caches(segments, entering, self.last_token(whole).chunk(len(segments)))
        *_, (last_rows, last) = caches
        rows = torch.stack([cache.rows[..., 0] for cache in caches])
        x = self.embedding(whole.tokens[:, :-1], torch.cat([cache.last for cache in caches[:-1]]))
        keep = self.keep(self._seeds_of(segments), x, part=0, blocks=self.blocks)
        at = self.positions(rows[:-1].flatten(0, 1) != EMPTY, length=x.shape[1])
        x, pushed = drop(x, keep[0]), []
        for block, cache, kept in zip(self.blocks, state.cache.unbind(1), keep[1:], strict=True):
            hidden = take_rows(rows, cache, x)
            pushed.append(hidden[-1])
            x = block(x, at, hidden[:-1].flatten(0, 1), keep=kept)
        filled = (last_rows[..., 0] != EMPTY).sum(1)
        return self.embedding.output(x, whole), TransformerXLState(torch.stack(pushed, dim=1), filled, last)

    def _seeds_of(self, segments: Sequence[Segment]) -> Int[Tensor, " S"] | None:
        """The seeds that steps would draw, segment by segment."""
        seeds = [drawn for segment in segments if (drawn := self.seeds(segment)) is not None]
        return torch.cat(seeds) if seeds else None

    def xl_cache(self, state: TransformerXLState) -> XLCache:
        """The cache as it is."""
        return XLCache(state.last, state.cache, filled_part(state.filled, rows=self.memory_length))
