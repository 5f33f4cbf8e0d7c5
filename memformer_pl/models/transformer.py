"""A causal Transformer that reads each segment by itself: what every memory is measured against.

B  lanes     L  tokens in a segment     D  width
"""

import torch
from torch import nn

from memformer_pl.layers import LayerSizes, RotaryPositions, SelfLayer, TokenTable, causal_mask, start_at_unit_gain
from memformer_pl.randomness import draw_seed, own_stream
from memformer_pl.recurrence import Reading, Segment, SegmentModel


class Transformer(SegmentModel[tuple[()]]):
    """Predict each token from START and those before it in its segment, and carry nothing.

    Pre-norm layers with rotary positions, and one table for input and output, as in this package's Memformer.

    Args:
        vocab: Size of the vocabulary.
        dim: Width of tokens.
        heads: Attention heads; must divide ``dim`` into even widths.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        layers: How many.
        segment_length: The most tokens that a segment may hold.
        dropout: On what each branch of a layer adds, and on embeddings.
    """

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        heads: int,
        ffn_dim: int | None = None,
        layers: int = 12,
        segment_length: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(vocab=vocab, segment_length=segment_length)
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        self.dim, self.heads, self.dropout = dim, heads, dropout
        self.ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
        self.layers = layers
        sizes = LayerSizes(dim=dim, heads=heads, ffn_dim=self.ffn_dim, dropout=dropout)
        self.table, self.positions = (
            TokenTable(vocab=vocab, dim=dim, dropout=dropout),
            RotaryPositions(width=dim // heads),
        )
        self.stack = nn.ModuleList(SelfLayer(sizes) for _ in range(layers))
        start_at_unit_gain(self.stack)

    def initial_state(self, lanes: int) -> tuple[()]:
        """Nothing."""
        return ()

    def read(self, segment: Segment, state: tuple[()]) -> tuple[Reading, tuple[()]]:
        """Predict the segment by itself."""
        x = segment.tokens
        with own_stream(self._seed(), x):
            x = self.table(x[:, :-1])
            length = x.shape[1]
            rotation = self.positions(torch.arange(-1, length - 1, device=x.device)[None])
            for layer in self.stack:
                x = layer(x, visible=causal_mask(length, device=x.device), rotation=rotation)
            return self.table.reading(x, segment), state

    def write(self, segment: Segment, state: tuple[()]) -> tuple[()]:
        """Nothing, at the cost of one random number."""
        self._seed()
        return state

    def _seed(self) -> int | None:
        # Random numbers come from a stream of their own, so that a segment can be left out where only states count.
        return draw_seed() if self.training and self.dropout > 0 else None
