"""Models whose layers carry something from token to token: Gated DeltaNet and its kin, and Titans.

B  lanes     L  tokens in a segment     T  tokens of a piece     N  layers     D  width     V  vocabulary
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from memformer_pl.contract import DecodingCache, S, Segment, SegmentModel, SegmentOutput, as_state
from memformer_pl.errors import LARGEST, require_sizes
from memformer_pl.layers import BlockConfig, Keep, TokenEmbedding, at_last, draw_keep, draw_seeds, drop

Carried = tuple[Tensor, ...]
"""What a layer carries: the fields of the state but the last, without the axis of layers."""


class MemoryLayers(SegmentModel[S]):
    """A stack of layers over the token before each token; every layer carries its own part of the state.

    The fields of the state have layers as their second axis, but the last field, which is the last token. A block takes
    ``(x, carried, token_mask, keep=...)`` and returns ``(x, carried)``; its ``advance`` takes the same, and returns
    what it carries on alone. Behind the fields of the state, a block may return others, for :meth:`output`.

    Args:
        vocab_size: Size of the vocabulary.
        segment_length: The most tokens that a segment may hold.
        layers: Number of blocks; the subclass sets them as ``blocks``.
        block: Sizes of a block.
    """

    unread = ("last",)
    blocks: nn.ModuleList

    def __init__(self, *, vocab_size: int, segment_length: int, layers: int, block: BlockConfig) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        require_sizes(most=LARGEST, layers=layers)
        self.dim, self.heads, self.ffn_dim = block.dim, block.heads, block.hidden
        self.layers, self.dropout = layers, block.dropout
        self.feed_forward, self.has_weight_losses = block.feed_forward, block.feed_forward is not None
        self.embedding = TokenEmbedding(vocab_size=vocab_size, dim=block.dim)

    def regions(self) -> Sequence[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    def step(self, segment: Segment, state: S) -> tuple[SegmentOutput, S]:
        """Predict the segment, and compute the next state."""
        seeds = self.seeds(segment)
        x, keep = self._embed(segment, state, seeds)
        carried, entering = [], by_layer(self.entering(segment, state, seeds))
        for block, fields, kept in zip(self.blocks, entering, keep, strict=True):
            x, after = block(x, fields, segment.token_mask, keep=kept)
            carried.append(after)
        return self.output(x, segment, carried), self._next_state(segment, state, carried)

    def advance_step(self, segment: Segment, state: S) -> S:
        """The next state: all blocks, the last one without reading its memory."""
        lower, seeds = self.layers - 1, self.seeds(segment)
        x, keep = self._embed(segment, state, seeds)
        *below, entering = by_layer(self.entering(segment, state, seeds))
        carried = []
        for block, fields, kept in zip(self.blocks[:lower], below, keep[:lower], strict=True):
            x, after = block(x, fields, segment.token_mask, keep=kept)
            carried.append(after)
        last: nn.Module = self.blocks[lower]
        carried.append(last.advance(x, entering, segment.token_mask, keep=keep[lower]))  # type: ignore[operator]
        return self._next_state(segment, state, carried)

    @torch.no_grad()
    def prefill(self, state: S, lanes: int) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Read the last token, or START."""
        x = self.embedding(state[-1].new_empty(lanes, 0), state[-1])
        return self._decode(x, torch.ones_like(x[..., 0], dtype=torch.bool), self.begin_cache(state))

    @torch.no_grad()
    def decode(
        self, tokens: Int[Tensor, "B T"], token_mask: Bool[Tensor, "B T"], cache: DecodingCache
    ) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Run the next tokens from what is carried."""
        return self._decode(self.embedding.vectors(tokens), token_mask, cache)

    def seeds(self, segment: Segment) -> Int[Tensor, " S"] | None:
        """The seeds of a segment; None if nothing is drawn."""
        return draw_seeds(segment, rate=self.dropout, training=self.training)

    def entering(self, segment: Segment, state: S, seeds: Int[Tensor, " S"] | None) -> Carried:
        """What enters the layers with a segment: as the state, with layers as the second axis."""
        del segment, seeds
        return state[:-1]

    def output(self, x: Float[Tensor, "B L D"], segment: Segment, carried: Sequence[Carried]) -> SegmentOutput:
        """The output for a segment, from what leaves the last block and from what each block returned to carry."""
        del carried
        return self.embedding.output(x, segment)

    def begin_cache(self, state: S) -> DecodingCache:
        """What a session needs at the start of a segment: as the state, with layers as the second axis."""
        return state[:-1]

    def decode_block(
        self, block: nn.Module, x: Float[Tensor, "B T D"], carried: Carried, token_mask: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B T D"], Carried]:
        """Run a block on the next tokens of a segment; return them, and what it carries on in the cache."""
        after: tuple[Tensor, Carried] = block(x, carried, token_mask)
        return after

    def _embed(
        self, segment: Segment, state: S, seeds: Int[Tensor, " S"] | None
    ) -> tuple[Float[Tensor, "B L D"], list[Keep | None]]:
        """Inputs of the first block, and factors of dropout for each."""
        x = self.embedding(segment.tokens[:, :-1], state[-1])
        seeds = seeds if self.dropout else None
        branches = [1, *(block.branches for block in self.blocks)]
        first, *keep = draw_keep(seeds, x, rate=self.dropout, part=0, branches=branches)  # type: ignore[arg-type]
        return drop(x, first), keep

    def _next_state(self, segment: Segment, state: S, carried: Sequence[Carried]) -> S:
        fields = len(state) - 1
        return as_state(state, (*stacked([after[:fields] for after in carried]), segment.last_token))

    def _decode(
        self, x: Float[Tensor, "B T D"], token_mask: Bool[Tensor, "B T"], cache: DecodingCache
    ) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Logits after the last new token of each lane, and what is carried after it."""
        carried = []
        for block, fields in zip(self.blocks, by_layer(cache), strict=True):
            x, after = self.decode_block(block, x, fields, token_mask)
            carried.append(after)
        return self.embedding.logits(at_last(x, token_mask.sum(1))), stacked(carried)


def by_layer(fields: Carried) -> list[Carried]:
    """What each layer carries, from fields with layers as their second axis."""
    return list(zip(*(field.unbind(1) for field in fields), strict=True))


def stacked(carried: Sequence[Carried]) -> Carried:
    """The fields with layers as their second axis, from what each layer carries."""
    return tuple(torch.stack(fields, dim=1) for fields in zip(*carried, strict=True))
