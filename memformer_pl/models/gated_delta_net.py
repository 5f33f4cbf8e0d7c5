"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464) and three of its kin: a matrix for each head, decayed and written
at every token.

B  lanes     L  tokens in a segment     T  tokens of a piece     N  layers     D  width     H  heads     V  vocabulary
K  width of a key     W  width of a value     P  inputs of a convolution before the segment     C  its channels
"""

from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from memformer_pl.contract import ABSENT, DecodingCache, Segment, SegmentModel, SegmentOutput
from memformer_pl.errors import LARGEST, LARGEST_WIDTH, UsageError, require_sizes
from memformer_pl.layers import BlockConfig, Keep, TokenEmbedding, at_last, draw_keep, draw_seeds, drop, init_weights
from memformer_pl.layers.delta_rule import require_chunk
from memformer_pl.layers.matrix_memory import GATES, MatrixMemoryBlock, Update
from memformer_pl.layers.short_convolution import TAPS

CHUNK = 64
"""Tokens that are computed at once by default, in a segment that has as many."""


class GatedDeltaNetState(NamedTuple):
    """State of a Gated DeltaNet."""

    memory: Float[Tensor, "B N H K W"]
    """At least float32, whatever the weights are: sums over a whole document."""
    inputs: Float[Tensor, "B N P C"]
    """The last inputs of each layer's convolution, the oldest first; zeros where there were none."""
    last: Int[Tensor, " B"]
    """The last token, still to be read; ``ABSENT`` if there is none."""


class GatedDeltaNet(SegmentModel[GatedDeltaNetState]):
    """Predict each token from all tokens before it, by layers that write a matrix of associations at every token;
    gradients cross segments (section 3).

    At each token a head first decays its matrix ``S``, by a factor ``a`` that depends on the token, and then moves what
    it holds under the key ``k`` towards the value ``v``, by a share ``b``: ``S <- a S + b k (v - a S^T k)^T``. It reads
    ``S^T q``. Queries and keys have unit length; queries, keys and values pass a convolution over four tokens. Within a
    segment, chunks of tokens are computed at once, with the numbers of the loop over tokens, to rounding. The losses of
    a document in segments equal those of one pass. The last token of a segment is the first input of the next one, so
    only the first token of a document is predicted without a token before it.

    Ours: the blocks of this package, so a LayerNorm before each branch and a feed-forward with GELU; the layer differs
    between values of ``update`` in decay and write alone, where GLA and Mamba-2 have neither this convolution nor keys
    of unit length, and Mamba-2 has a skip connection; queries are not scaled, since the norm of what is read undoes it;
    values are as wide as ``dim // heads``, where the public code has twice the width of a key; heads begin with decays
    that are spread evenly, not drawn.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens.
        heads: Matrices of a layer; must divide ``dim``.
        key_width: Width of a key; by default ``dim // heads``. A layer carries ``key_width * dim`` numbers, and a few
            inputs of the convolution.
        ffn_dim: Width of the hidden layer after the memory; by default four times ``dim``.
        layers: Number of blocks.
        update: ``gated_delta``; ``delta`` without decay (DeltaNet); ``gla`` with a decay for each entry of a key, and
            ``mamba2`` with a step that is both decay and strength: both only add, so old values stay.
        segment_length: The most tokens that a segment may hold.
        chunk: Tokens that are computed at once; by default 64, or a whole segment that is shorter. With ``gla``, memory
            for a chunk grows with its square times ``key_width``.
        dropout: On the output of each branch of a layer, and on embeddings.
    """

    unread = ("last",)

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        key_width: int | None = None,
        ffn_dim: int | None = None,
        layers: int = 12,
        update: Update = "gated_delta",
        segment_length: int = 64,
        chunk: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        block = BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout)
        require_sizes(most=LARGEST, layers=layers)
        require_chunk(chunk, segment_length=segment_length)
        if update not in GATES:
            raise UsageError(f"update must be one of {', '.join(GATES)}, got {update!r}")
        self.dim, self.heads, self.ffn_dim, self.layers, self.dropout = dim, heads, block.hidden, layers, dropout
        self.key_width = dim // heads if key_width is None else key_width
        require_sizes(most=LARGEST_WIDTH, key_width=self.key_width)
        self.update, self.chunk = update, chunk
        at_once = min(CHUNK, segment_length) if chunk is None else chunk
        self.embedding = TokenEmbedding(vocab_size=vocab_size, dim=dim)
        self.blocks = nn.ModuleList(
            MatrixMemoryBlock(block, key_width=self.key_width, update=update, chunk=at_once) for _ in range(layers)
        )
        init_weights(self.blocks)

    def regions(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)

    def initial_state(self, lanes: int) -> GatedDeltaNetState:
        """Zeros, and no token before the first."""
        start = self.embedding.start
        exact = torch.promote_types(start.dtype, torch.float32)
        width, channels = self.dim // self.heads, 2 * self.heads * self.key_width + self.dim
        return GatedDeltaNetState(
            start.new_zeros(lanes, self.layers, self.heads, self.key_width, width, dtype=exact),
            start.new_zeros(lanes, self.layers, TAPS - 1, channels),
            start.new_full((lanes,), ABSENT, dtype=torch.int64),
        )

    def step(self, segment: Segment, state: GatedDeltaNetState) -> tuple[SegmentOutput, GatedDeltaNetState]:
        """Predict the segment, and compute the next state."""
        x, keep = self._embed(segment, state, blocks=self.layers)
        x, carried = self._run(x, segment.token_mask, state[:2], keep, blocks=self.layers)
        return self.embedding.output(x, segment), self._next_state(segment, carried)

    def advance_step(self, segment: Segment, state: GatedDeltaNetState) -> GatedDeltaNetState:
        """The next state: all blocks, the last one without reading its memory."""
        lower = self.layers - 1
        x, keep = self._embed(segment, state, blocks=lower)
        x, carried = self._run(x, segment.token_mask, state[:2], keep, blocks=lower)
        last = cast(MatrixMemoryBlock, self.blocks[-1])
        carried.append(last.advance(x, state.memory[:, -1], state.inputs[:, -1], segment.token_mask))
        return self._next_state(segment, carried)

    @torch.no_grad()
    def prefill(self, state: GatedDeltaNetState, lanes: int) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Read the last token, or START."""
        x = self.embedding(state.last.new_empty(lanes, 0), state.last)
        return self._decode(x, torch.ones_like(x[..., 0], dtype=torch.bool), state[:2])

    @torch.no_grad()
    def decode(
        self, tokens: Int[Tensor, "B T"], token_mask: Bool[Tensor, "B T"], cache: DecodingCache
    ) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Run the next tokens from what is carried."""
        return self._decode(self.embedding.vectors(tokens), token_mask, cache)

    def _embed(
        self, segment: Segment, state: GatedDeltaNetState, *, blocks: int
    ) -> tuple[Float[Tensor, "B L D"], list[Keep | None]]:
        """Inputs of the first block, and factors of dropout for the first ``blocks``."""
        x = self.embedding(segment.tokens[:, :-1], state.last)
        seeds = draw_seeds(segment, rate=self.dropout, training=self.training)
        branches = [1, *[MatrixMemoryBlock.branches] * blocks]
        first, *keep = draw_keep(seeds, x, rate=self.dropout, part=0, branches=branches)
        return drop(x, first), keep

    def _run(
        self,
        x: Float[Tensor, "B T D"],
        token_mask: Bool[Tensor, "B T"],
        entering: tuple[Tensor, ...],
        keep: list[Keep | None],
        *,
        blocks: int,
    ) -> tuple[Float[Tensor, "B T D"], list[tuple[Tensor, Tensor]]]:
        """What leaves the first ``blocks``, and what each of them carries on."""
        carried = []
        fields = (field[:, :blocks].unbind(1) for field in entering)
        for block, memory, inputs, kept in zip(self.blocks[:blocks], *fields, keep, strict=True):
            x, *after = block(x, memory, inputs, token_mask, keep=kept)
            carried.append(tuple(after))
        return x, carried

    def _next_state(self, segment: Segment, carried: list[tuple[Tensor, Tensor]]) -> GatedDeltaNetState:
        memory, inputs = (torch.stack(fields, dim=1) for fields in zip(*carried, strict=True))
        return GatedDeltaNetState(memory, inputs, segment.last_token)

    def _decode(
        self, x: Float[Tensor, "B T D"], token_mask: Bool[Tensor, "B T"], cache: DecodingCache
    ) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Logits after the last new token of each lane, and what is carried after it."""
        x, carried = self._run(x, token_mask, cache, [None] * self.layers, blocks=self.layers)
        fields = tuple(torch.stack(fields, dim=1) for fields in zip(*carried, strict=True))
        return self.embedding.logits(at_last(x, token_mask.sum(1))), fields
