"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464) and three of its kin: a matrix for each head, decayed and written
at every token.

B  lanes     N  layers     H  heads
K  width of a key     W  width of a value     P  inputs of a convolution before the segment     C  its channels
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memformer_pl.contract import ABSENT
from memformer_pl.errors import LARGEST_WIDTH, UsageError, require_sizes
from memformer_pl.layers import BlockConfig, init_weights
from memformer_pl.layers.delta_rule import require_chunk
from memformer_pl.layers.matrix_memory import GATES, MatrixMemoryBlock, Update
from memformer_pl.layers.short_convolution import TAPS
from memformer_pl.models.memory_layers import MemoryLayers

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


class GatedDeltaNet(MemoryLayers[GatedDeltaNetState]):
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
        feed_forward: Another feed-forward for some layers, such as :class:`~memformer_pl.layers.UltraMemory`:
            ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``, with layers counted from 0.
        layers: Number of blocks.
        update: ``gated_delta``; ``delta`` without decay (DeltaNet); ``gla`` with a decay for each entry of a key, and
            ``mamba2`` with a step that is both decay and strength: both only add, so old values stay.
        segment_length: The most tokens that a segment may hold.
        chunk: Tokens that are computed at once; by default 64, or a whole segment that is shorter. With ``gla``, memory
            for a chunk grows with its square times ``key_width``.
        dropout: On the output of each branch of a layer, and on embeddings.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        key_width: int | None = None,
        ffn_dim: int | None = None,
        feed_forward: dict[str, Any] | None = None,
        layers: int = 12,
        update: Update = "gated_delta",
        segment_length: int = 64,
        chunk: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        block = BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout, feed_forward=feed_forward)
        super().__init__(vocab_size=vocab_size, segment_length=segment_length, layers=layers, block=block)
        require_chunk(chunk, segment_length=segment_length)
        if update not in GATES:
            raise UsageError(f"update must be one of {', '.join(GATES)}, got {update!r}")
        self.key_width = dim // heads if key_width is None else key_width
        require_sizes(most=LARGEST_WIDTH, key_width=self.key_width)
        self.update, self.chunk = update, chunk
        at_once = min(CHUNK, segment_length) if chunk is None else chunk
        self.blocks = nn.ModuleList(
            MatrixMemoryBlock(each, key_width=self.key_width, update=update, chunk=at_once)
            for each in block.of_layers(layers)
        )
        init_weights(self.blocks)

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
