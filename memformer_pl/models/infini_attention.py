"""Infini-attention (Munkhdalai et al. 2024, arXiv 2404.07143): local attention in a segment, and linear attention to a
matrix that holds all segments before.

B  lanes     L  tokens in a segment     T  tokens of a piece     N  layers     D  width     H  heads
K  width of a head
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memformer_pl.contract import ABSENT, Segment, SegmentOutput
from memformer_pl.layers import (
    BlockConfig,
    Keep,
    KVCache,
    LayerKVCache,
    Positions,
    RotaryPositions,
    drop,
    init_weights,
)
from memformer_pl.layers.compressive_memory import CompressiveBlock, Stored, as_source
from memformer_pl.models.causal_decoder import DecoderOnly


class InfiniAttentionState(NamedTuple):
    """State of Infini-attention."""

    values: Float[Tensor, "B N H K K"]
    """The paper's ``M``: sums of values, weighed by the features of their keys; at least float32."""
    keys: Float[Tensor, "B N H K"]
    """The paper's ``z``: sums of the features of keys; at least float32."""
    last: Int[Tensor, " B"]
    """The last token, still to be read; ``ABSENT`` if there is none."""


class InfiniAttention(DecoderOnly[InfiniAttentionState]):
    """Predict each token from earlier tokens of its segment, and from what each head has stored of all segments before.

    A head reads its matrix by ``elu(q) + 1``, without positions, and mixes what it gets with local attention by a gate,
    ``sigmoid(gate)``, the same for all tokens; then it adds the segment to the matrix (section 2.2). Reading comes
    before writing, so a token sees its own segment in local attention alone. Gradients cross segments, through all
    sums. The last token of a segment is the first input of the next one, so only the first token of a document is
    predicted without a token before it.

    The gates have ten times the learning rate of the other weights and do not decay: the public attempt to reproduce
    the paper found that they hardly move otherwise.

    Ours: the blocks of this package, with rotary positions in local attention; memory counts as closed for a token that
    finds nothing, such as all tokens of a document's first segment, where the paper's quotient is not defined; gates
    begin at one half; memory is at least float32.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens.
        heads: Attention heads; must divide ``dim`` into even widths.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        feed_forward: Another feed-forward for some layers, such as :class:`~memformer_pl.layers.UltraMemory`:
            ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``, with layers counted from 0.
        layers: Number of blocks.
        delta: Whether a value is written less what memory already returns for its key (the paper's Linear + Delta), or
            as it is (Linear).
        segment_length: The most tokens that a segment may hold.
        dropout: On the output of each branch of a layer, and on embeddings.
    """

    unread = ("last",)

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        ffn_dim: int | None = None,
        feed_forward: dict[str, Any] | None = None,
        layers: int = 12,
        delta: bool = True,
        segment_length: int = 64,
        dropout: float = 0.1,
    ) -> None:
        block = BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout, feed_forward=feed_forward)
        super().__init__(vocab_size=vocab_size, segment_length=segment_length, layers=layers, block=block)
        self.delta = delta
        self.rotary = RotaryPositions(width=dim // heads, first=-1, last=segment_length)
        self.blocks = nn.ModuleList(CompressiveBlock(each, delta=delta) for each in block.of_layers(layers))
        init_weights(self.blocks)

    def initial_state(self, lanes: int) -> InfiniAttentionState:
        """Nothing stored, and no token before the first."""
        start, width = self.embedding.start, self.dim // self.heads
        exact = torch.promote_types(start.dtype, torch.float32)
        keys = start.new_zeros(lanes, self.layers, self.heads, width, dtype=exact)
        values = keys.new_zeros(*keys.shape, width)
        return InfiniAttentionState(values, keys, start.new_full((lanes,), ABSENT, dtype=torch.int64))

    def step(self, segment: Segment, state: InfiniAttentionState) -> tuple[SegmentOutput, InfiniAttentionState]:
        """Predict the segment, and store it."""
        x, at, keep = self._embed(segment, state)
        x, stored = self._run_blocks(x, at, keep, segment, state, blocks=self.layers)
        return self.embedding.output(x, segment), self._next_state(segment, stored)

    def advance_step(self, segment: Segment, state: InfiniAttentionState) -> InfiniAttentionState:
        """The next state: all blocks, the last one only to store its keys and values."""
        x, at, keep = self._embed(segment, state)
        x, stored = self._run_blocks(x, at, keep, segment, state, blocks=self.layers - 1)
        last = self.blocks[-1]
        assert isinstance(last, CompressiveBlock)
        stored.append(last.advance(x, Stored(state.values[:, -1], state.keys[:, -1]), segment.token_mask))
        return self._next_state(segment, stored)

    def prefix(self, state: InfiniAttentionState, lanes: int) -> tuple[Float[Tensor, "B 1 D"], KVCache]:
        """The last token, or START, and a cache with memory."""
        x = self.embedding(self.no_tokens(lanes), state.last)
        return x, as_source(state.values, state.keys, self.empty_cache(lanes))

    def decode_block(
        self, block: nn.Module, x: Float[Tensor, "B T D"], at: Positions, cache: LayerKVCache
    ) -> Float[Tensor, "B T D"]:
        """Run a block on the next tokens."""
        assert isinstance(block, CompressiveBlock)
        return block.decode(x, at, cache)

    def _embed(
        self, segment: Segment, state: InfiniAttentionState
    ) -> tuple[Float[Tensor, "B L D"], Positions, list[Keep | None]]:
        """Inputs of the first block, their positions, and factors of dropout for each block."""
        x = self.embedding(segment.tokens[:, :-1], state.last)
        first, *keep = self.keep(self.seeds(segment), x, part=0, blocks=self.blocks)
        return drop(x, first), Positions(rotation=self.rotary.span(-1, x.shape[1] - 1), causal=True), keep

    def _run_blocks(
        self,
        x: Float[Tensor, "B L D"],
        at: Positions,
        keep: list[Keep | None],
        segment: Segment,
        state: InfiniAttentionState,
        *,
        blocks: int,
    ) -> tuple[Float[Tensor, "B L D"], list[Stored]]:
        """What leaves the first ``blocks``, and what each of them has stored afterwards."""
        after = []
        fields = (field[:, :blocks].unbind(1) for field in (state.values, state.keys))
        for block, values, keys, kept in zip(self.blocks[:blocks], *fields, keep[:blocks], strict=True):
            x, stored = block(x, at, Stored(values, keys), segment.token_mask, keep=kept)
            after.append(stored)
        return x, after

    def _next_state(self, segment: Segment, stored: list[Stored]) -> InfiniAttentionState:
        values, keys = (torch.stack(fields, dim=1) for fields in zip(*stored, strict=True))
        return InfiniAttentionState(values, keys, segment.last_token)
