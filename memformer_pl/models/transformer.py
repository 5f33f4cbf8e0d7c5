"""A causal Transformer that reads each segment by itself: what every memory is measured against.

B  lanes     L  tokens in a segment     D  width
"""

from abc import abstractmethod
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memformer_pl.errors import UsageError
from memformer_pl.layers import (
    BlockConfig,
    RotaryPositions,
    Rotation,
    KVCache,
    TokenEmbedding,
    causal_mask,
    causal_blocks,
    projected_distances,
    relative_blocks,
)
from memformer_pl.layers.blockwise import layer_by_blocks
from memformer_pl.models.causal_decoder import CausalDecoder
from memformer_pl.gradients.rng import own_stream
from memformer_pl.contract import SegmentOutput, Segment
from memformer_pl.errors import require_sizes


class StatelessModel(CausalDecoder[tuple[()]]):
    """A model that reads each segment by itself. It implements :meth:`predict`."""

    @abstractmethod
    def predict(self, segment: Segment) -> SegmentOutput:
        """Read a segment."""

    def initial_state(self, lanes: int) -> tuple[()]:
        """Nothing."""
        return ()

    def read(self, segment: Segment, state: tuple[()]) -> tuple[SegmentOutput, tuple[()]]:
        """Read a segment, and carry nothing."""
        with own_stream(self._seed(), segment.tokens):
            return self.predict(segment), state

    def write(self, segment: Segment, state: tuple[()]) -> tuple[()]:
        """Nothing, at the cost of one random number."""
        self._seed()
        return state


class Transformer(StatelessModel):
    """Predict each token from START and those before it in its segment, and carry nothing.

    Pre-norm layers, and one table for input and output, as in this package's Memformer.

    Args:
        vocab: Size of the vocabulary.
        dim: Width of tokens.
        heads: Attention heads; must divide ``dim`` into even widths.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        layers: How many.
        positions: ``rotary``, or ``relative``: those of the models that cache, each of which is this model without its
            memory.
        segment_length: The most tokens that a segment may hold.
        block: Tokens of a long segment that are computed at once, and once more in the backward pass: the same
            numbers in less memory (Liu & Abbeel 2023). By default all, without computing anything again.
        dropout: On what each branch of a layer adds, and on embeddings.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        ffn_dim: int | None = None,
        layers: int = 12,
        positions: Literal["rotary", "relative"] = "rotary",
        segment_length: int = 64,
        block: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        if block is not None:
            require_sizes(block=block)
        if block is not None and positions == "relative":
            raise UsageError(f"positions must be rotary where a segment is computed by blocks, got {block=}")
        self.dim, self.heads, self.layers, self.block, self.dropout = dim, heads, layers, block, dropout
        self.ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
        sizes = BlockConfig(dim=dim, heads=heads, ffn_dim=self.ffn_dim, dropout=dropout)
        self.positions = positions
        self.table = TokenEmbedding(vocab_size=vocab_size, dim=dim, dropout=dropout)
        if positions == "rotary":
            self.rotary, self.stack = RotaryPositions(width=dim // heads), causal_blocks(sizes, layers=layers)
        else:
            self.stack = relative_blocks(sizes, layers=layers)

    def predict(self, segment: Segment) -> SegmentOutput:
        """Read a segment, by blocks where told."""
        x = self.table(segment.tokens[:, :-1])
        length = x.shape[1]
        if self.positions == "relative":
            for layer in self.stack:
                x = layer(x, x[:, :0], visible=causal_mask(length, device=x.device))
            return self.table.reading(x, segment)
        rotation = self.rotary(torch.arange(-1, length - 1, device=x.device)[None])
        if self.block is not None:
            for layer in self.stack:
                x = layer_by_blocks(layer, x, rotation=rotation, block=self.block)
            return self.table.reading(x, segment, rows=self.block * len(x))
        causal = causal_mask(length, device=x.device)
        for layer in self.stack:
            x = layer(x, visible=causal, rotation=rotation)
        return self.table.reading(x, segment)

    def front(self, state: tuple[()], lanes: int) -> tuple[Float[Tensor, "B 1 D"], KVCache]:
        """START, and nothing besides."""
        rows = self.empty_kv_cache(lanes)
        if self.positions == "relative":
            rows = rows._replace(distances=projected_distances(self.stack, rows=rows.there.shape[1]))
        return self.table(self.nothing_read(lanes)), rows

    def rotation(self, positions: Int[Tensor, "B T"]) -> Rotation | None:
        """Of tokens, where positions are rotary."""
        return self.rotary(positions) if self.positions == "rotary" else None
