"""Stable Hadamard Memory (Le et al. 2024, arXiv 2410.10132): matrices whose cells tokens strengthen or fade one by one.

B  lanes     L  tokens in a segment     N  layers     D  width     H  heads     K  width of a head     R  rows
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from memformer_pl.contract import ABSENT, DecodingCache, Segment
from memformer_pl.errors import LARGEST, UsageError, require_sizes
from memformer_pl.layers import BlockConfig
from memformer_pl.layers.dropout import STREAM, random_bits, segment_seeds
from memformer_pl.layers.hadamard_memory import HadamardBlock, scheduled_rows
from memformer_pl.models.memory_layers import Carried, MemoryLayers

ROWS_PART = 1
"""Number of the part of a step whose random numbers choose rows; part 0 is dropout's."""


class StableHadamardMemoryState(NamedTuple):
    """State of Stable Hadamard Memory."""

    memory: Float[Tensor, "B N H K K"]
    """Of each head, values by keys; at least float32."""
    steps: Int[Tensor, "B N"]
    """Tokens of the document that each layer has read."""
    last: Int[Tensor, " B"]
    """The last token, still to be read; ``ABSENT`` if there is none."""


class StableHadamardMemory(MemoryLayers[StableHadamardMemoryState]):
    """Predict each token from all tokens before it, by layers whose memory is a matrix for each head.

    At each token every cell is multiplied by a factor of its own, between 0 and 2, and then a value is added under a
    key: ``M <- C * M + eta outer(v, k)`` with ``C = 1 + tanh(outer(theta, c))``. The token then reads ``M q``. Keys and
    queries have positive entries whose sum is 1; eta is between 0 and 1. Theta is a row of a learned table, drawn anew
    for every token, so that products of many factors have a mean of 1 at any content that is independent of it. Memory
    is carried with full gradient. The last token of a segment is the first input of the next one.

    Ours: several heads, with rows of the same number for all; the mean of the rows is taken from each (``centred``): a
    table of 128 random rows has a mean that is not zero, and a thousand steps make a large power of it; the map to
    ``c`` begins at a small gain. In evaluation and in sessions nothing is drawn: rows follow a fixed schedule of the
    place in the document. The blocks of this package, so the residual connection takes the place of the shortcut in the
    public code. That code always takes the first row, in the files of its table and in the one that stands alone.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens.
        heads: Matrices of a layer; must divide ``dim`` into widths of at least 2. A layer carries
            ``dim * dim // heads`` numbers.
        ffn_dim: Width of the hidden layer after the memory; by default four times ``dim``.
        feed_forward: Another feed-forward for some layers, such as :class:`~memformer_pl.layers.UltraMemory`:
            ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``, with layers counted from 0.
        layers: Number of blocks.
        rows: Rows of the table; with one, ``theta`` is the same at all tokens, and ``centred`` must be false.
        centred: Whether the mean of the rows is taken from each; false for the paper's table.
        calibration: Whether cells are multiplied at all; if not, this is linear attention.
        draw: Whether rows are drawn in training; if not, they follow the schedule there too.
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
        rows: int = 128,
        centred: bool = True,
        calibration: bool = True,
        draw: bool = True,
        segment_length: int = 64,
        dropout: float = 0.1,
    ) -> None:
        block = BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout, feed_forward=feed_forward)
        super().__init__(vocab_size=vocab_size, segment_length=segment_length, layers=layers, block=block)
        require_sizes(most=LARGEST, rows=rows)
        if dim // heads < 2:
            raise UsageError(f"heads must have at least 2 entries, got {dim=} and {heads=}: a key of one is constant")
        if calibration and centred and rows == 1:
            raise UsageError("rows=1 has nothing left once its mean is taken from it: set centred to false")
        self.rows, self.centred, self.calibration, self.draw = rows, centred, calibration, draw
        used = rows if calibration else 0
        self.blocks = nn.ModuleList(HadamardBlock(each, rows=used, centred=centred) for each in block.of_layers(layers))

    def initial_state(self, lanes: int) -> StableHadamardMemoryState:
        """Zeros, and no token before the first."""
        start, width = self.embedding.start, self.dim // self.heads
        exact = torch.promote_types(start.dtype, torch.float32)
        return StableHadamardMemoryState(
            start.new_zeros(lanes, self.layers, self.heads, width, width, dtype=exact),
            start.new_zeros(lanes, self.layers, dtype=torch.int64),
            start.new_full((lanes,), ABSENT, dtype=torch.int64),
        )

    def seeds(self, segment: Segment) -> Int[Tensor, " S"] | None:
        """The seeds of a segment; None if nothing is drawn."""
        return segment_seeds(segment) if self._draws() else super().seeds(segment)

    def entering(self, segment: Segment, state: StableHadamardMemoryState, seeds: Int[Tensor, " S"] | None) -> Carried:
        """Memory, tokens read, and with a table the row of each token in each layer."""
        if not self.calibration:
            return state[:-1]
        if seeds is None or not self._draws():
            return self._scheduled(state[:-1], segment.token_mask)
        lanes, length = segment.tokens.shape
        shape = len(seeds), self.layers, lanes // len(seeds), length
        bits = random_bits(seeds, first=ROWS_PART * STREAM, count=self.layers * lanes * length // len(seeds))
        return *state[:-1], (bits % self.rows).view(shape).transpose(1, 2).flatten(0, 1)

    def _decode(
        self, x: Float[Tensor, "B T D"], token_mask: Bool[Tensor, "B T"], cache: DecodingCache
    ) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Logits after the last new token of each lane, and what is carried after it."""
        return super()._decode(x, token_mask, self._scheduled(cache, token_mask) if self.calibration else cache)

    def _scheduled(self, carried: Carried, token_mask: Bool[Tensor, "B L"]) -> Carried:
        """Memory, tokens read, and the row of each of the next tokens in each layer."""
        memory, steps = carried
        rows = [scheduled_rows(read, token_mask, layer=n, rows=self.rows) for n, read in enumerate(steps.unbind(1))]
        return memory, steps, torch.stack(rows, dim=1)

    def _draws(self) -> bool:
        return self.training and self.draw and self.calibration and self.rows > 1
