"""What the models that cache have in common: a causal stack with relative positions, whose last layer and prediction
are left out where only the next state counts.

B  lanes     L  tokens in a segment     M  cached rows     N  layers     D  width
"""

from abc import abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl.layers import (
    BlockConfig,
    RelativeBlock,
    Rotation,
    KVCache,
    TokenEmbedding,
    projected_distances,
    relative_blocks,
)
from memformer_pl.models.causal_decoder import CausalDecoder
from memformer_pl.gradients.rng import own_stream
from memformer_pl.contract import ABSENT, SegmentOutput, S, Segment
from memformer_pl.errors import LARGEST_WIDTH, require_sizes


class Top(NamedTuple):
    """What the last layer reads."""

    x: Float[Tensor, "B L D"]
    cached: Float[Tensor, "B M D"]
    visible: Bool[Tensor, "B 1 L M+L"]


class Cached(NamedTuple):
    """What layers read of a state."""

    last: Int[Tensor, " B"]
    rows: Float[Tensor, "B N M D"]
    """What entered each layer at the cached tokens."""
    there: Bool[Tensor, "B M"]


class XLTransformer(CausalDecoder[S]):
    """A causal Transformer that reads on from a cache, and from the last token of the segment before.

    Nothing that is carried has a graph, so all ways to a gradient give the same, and ``cut`` is the cheapest.

    Args:
        lower: What the layers below the last are.

    The other arguments are those of the models.
    """

    unread = ("last",)

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        ffn_dim: int | None,
        layers: int,
        memory_length: int,
        segment_length: int,
        dropout: float,
        lower: type[RelativeBlock] = RelativeBlock,
    ) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        require_sizes(least=0, most=LARGEST_WIDTH, memory_length=memory_length)
        self.dim, self.heads, self.dropout = dim, heads, dropout
        self.ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
        self.layers, self.memory_length = layers, memory_length
        sizes = BlockConfig(dim=dim, heads=heads, ffn_dim=self.ffn_dim, dropout=dropout)
        self.table = TokenEmbedding(vocab_size=vocab_size, dim=dim, dropout=dropout)
        self.stack = relative_blocks(sizes, layers=layers, lower=lower)

    @abstractmethod
    def climb(self, segment: Segment, state: S) -> tuple[Top, S]:
        """Read a segment up to the last layer. No gradient flows into the state or out of the next one."""

    @abstractmethod
    def cached(self, state: S) -> Cached:
        """What the layers read of the state."""

    def front(self, state: S, lanes: int) -> tuple[Float[Tensor, "B 1 D"], KVCache]:
        """The last token, and the cache as each layer reads it."""
        last, cached_BNMD, there = self.cached(state)
        count = cached_BNMD.shape[2]
        rows = self.empty_kv_cache(lanes, front=count)
        for n, layer in enumerate(self.stack):
            assert isinstance(layer, RelativeBlock)
            keys_and_values = layer.self_attention.keys_and_values(layer.self_norm(cached_BNMD[:, n]))
            rows.keys[:, n, :, :count], rows.values[:, n, :, :count] = keys_and_values
        rows.there[:, :count] = there
        distances = projected_distances(self.stack, rows=rows.there.shape[1])
        return self.first(last), rows._replace(filled=rows.filled + count, distances=distances)

    def first(self, last: Int[Tensor, " B"]) -> Float[Tensor, "B 1 D"]:
        """What enters the first layer before the first token."""
        x: Tensor = self.table(self.nothing_read(len(last)), last)
        return x

    def rotation(self, positions: Int[Tensor, "B T"]) -> Rotation | None:
        """None: layers go by distance."""
        return None

    def read(self, segment: Segment, state: S) -> tuple[SegmentOutput, S]:
        """Predict the segment from the cache and what came before in it."""
        top, next_state = self.climb(segment, state)
        return self.predict(segment, top), next_state

    def write(self, segment: Segment, state: S) -> S:
        """The next state: all layers but the last."""
        next_state = self.climb(segment, state)[1]
        self._seed()
        return next_state

    def predict(self, segment: Segment, top: Top) -> SegmentOutput:
        """The last layer, and the reading."""
        with own_stream(self._seed(), top.x):
            return self.table.reading(self.stack[-1](top.x, top.cached, visible=top.visible), segment)

    def entered(
        self, x: Float[Tensor, "B L D"], cached: Float[Tensor, "B N M D"], visible: Bool[Tensor, "B 1 L M+L"]
    ) -> Float[Tensor, "B N L D"]:
        """What enters each layer, from what enters the first."""
        xs = [x]
        for layer, cached_BMD in zip(self.stack[:-1], cached.unbind(1), strict=False):
            xs.append(layer(xs[-1], cached_BMD, visible=visible))
        return torch.stack(xs, dim=1)

    def still_to_read(self, segment: Segment) -> Int[Tensor, " B"]:
        """The last token of each lane; ``ABSENT`` where nothing is remembered, as in a Transformer without memory."""
        if not self.memory_length:
            return self.number(ABSENT, lanes=len(segment.tokens))
        last = segment.token_mask.sum(1, keepdim=True) - 1
        return segment.tokens.gather(1, last.clamp(min=0))[:, 0]

    def nothing(self, *shape: int) -> Float[Tensor, "..."]:
        """A cache that holds nothing."""
        return torch.zeros(shape, dtype=self.table.start.dtype, device=self.table.start.device)

    def number(self, value: int, *, lanes: int) -> Int[Tensor, " B"]:
        """The same number for each lane."""
        return torch.full((lanes,), value, device=self.table.start.device)
