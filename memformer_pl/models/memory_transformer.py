"""Memory Transformer (Burtsev et al. 2020, arXiv 2006.11527): memory tokens in front of the tokens of a segment."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memformer_pl.layers import BlockConfig, RotaryPositions, KVCache, TokenEmbedding, causal_blocks, visible_by_rank
from memformer_pl.models.transformer import StatelessModel
from memformer_pl.contract import SegmentOutput, Segment
from memformer_pl.errors import LARGEST_WIDTH, require_sizes


class MemoryTransformer(StatelessModel):
    """Predict each token from learned memory tokens, START and those before it in its segment; carry nothing.

    The paper's MemTransformer: memory tokens pass the layers as all others do. In a causal model they stand in front
    and must not see what follows, so their content is the same for every segment: a learned prefix. The paper's other
    two forms differ in what memory reads of the tokens, which here is nothing, and are not built.

    Args:
        vocab: Size of the vocabulary.
        dim: Width of tokens.
        heads: Attention heads; must divide ``dim`` into even widths.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        layers: How many.
        memory_tokens: How many; 0 is :class:`~memformer_pl.models.Transformer`.
        segment_length: The most tokens that a segment may hold.
        dropout: On what each branch of a layer adds, and on embeddings.
    """

    no_decay = ("memory",)

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        ffn_dim: int | None = None,
        layers: int = 12,
        memory_tokens: int = 10,
        segment_length: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        require_sizes(least=0, most=LARGEST_WIDTH, memory_tokens=memory_tokens)
        self.dim, self.heads, self.layers, self.dropout = dim, heads, layers, dropout
        self.memory_tokens = memory_tokens
        self.ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
        sizes = BlockConfig(dim=dim, heads=heads, ffn_dim=self.ffn_dim, dropout=dropout)
        self.positions = RotaryPositions(width=dim // heads)
        self.table = TokenEmbedding(vocab_size=vocab_size, dim=dim, dropout=dropout)
        self.stack = causal_blocks(sizes, layers=layers)
        self.memory = nn.Parameter(torch.randn(memory_tokens, dim))

    def predict(self, segment: Segment) -> SegmentOutput:
        """Read a segment behind the memory tokens."""
        tokens = self.table(segment.tokens[:, :-1])
        x = torch.cat((self.memory.expand(len(tokens), -1, -1), tokens), dim=1)
        places = torch.arange(-self.memory_tokens, tokens.shape[1], device=x.device)
        rotation, visible = self.positions(places[None] - 1), visible_by_rank(places.clamp(min=-1))
        for layer in self.stack:
            x = layer(x, visible=visible, rotation=rotation)
        return self.table.reading(x[:, self.memory_tokens :], segment)

    def front(self, state: tuple[()], lanes: int) -> tuple[Float[Tensor, "B T D"], KVCache]:
        """The memory tokens and START."""
        x = torch.cat((self.memory.expand(lanes, -1, -1), self.table(self.nothing_read(lanes))), dim=1)
        return x, self.empty_kv_cache(lanes, front=self.memory_tokens)
