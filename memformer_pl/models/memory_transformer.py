"""Memory Transformer (Burtsev et al. 2020, arXiv 2006.11527): memory tokens in front of the tokens of a segment."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memformer_pl.contract import Segment, SegmentOutput
from memformer_pl.errors import LARGEST_WIDTH, require_sizes
from memformer_pl.layers import BlockConfig, KVCache, Positions, RotaryPositions, causal_blocks, drop, visible_by_rank
from memformer_pl.models.transformer import StatelessModel


class MemoryTransformer(StatelessModel):
    """Predict each token from learned memory tokens, START and earlier tokens of its segment; carry no state.

    The paper's MemTransformer: memory tokens pass the layers like all others. In a causal model they precede the
    segment and must not see it, so their content is the same for every segment: a learned prefix. The paper's other two
    forms differ in how memory reads tokens, which it does not do here, and are not implemented.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens.
        heads: Attention heads; must divide ``dim`` into even widths.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        feed_forward: Another feed-forward for some layers, such as :class:`~memformer_pl.layers.UltraMemory`:
            ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``, with layers counted from 0.
        layers: Number of blocks.
        memory_tokens: Number of memory tokens; 0 gives :class:`~memformer_pl.models.Transformer`.
        segment_length: The most tokens that a segment may hold.
        dropout: On the output of each branch of a layer, and on embeddings.
    """

    no_decay = ("memory",)

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        ffn_dim: int | None = None,
        feed_forward: dict[str, Any] | None = None,
        layers: int = 12,
        memory_tokens: int = 10,
        segment_length: int = 64,
        dropout: float = 0.1,
    ) -> None:
        block = BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout, feed_forward=feed_forward)
        super().__init__(vocab_size=vocab_size, segment_length=segment_length, layers=layers, block=block)
        require_sizes(least=0, most=LARGEST_WIDTH, memory_tokens=memory_tokens)
        self.memory_tokens = memory_tokens
        self.rotary = RotaryPositions(width=dim // heads, first=-1 - memory_tokens, last=segment_length)
        self.blocks = causal_blocks(block, layers=layers)
        self.memory = nn.Parameter(torch.randn(memory_tokens, dim))

    def predict(self, segment: Segment) -> SegmentOutput:
        """Predict a segment after the memory tokens."""
        seeds, tokens = self.seeds(segment), self.embedding(segment.tokens[:, :-1])
        tokens = drop(tokens, self.keep(seeds, tokens, part=0)[0])
        x = torch.cat((self.memory.expand(len(tokens), -1, -1), tokens), dim=1)
        ranks = torch.arange(-self.memory_tokens, tokens.shape[1], device=x.device)
        rotation = self.rotary.span(-1 - self.memory_tokens, tokens.shape[1] - 1)
        at = Positions(visible_by_rank(ranks.clamp(min=-1)), rotation)
        keep = self.keep(seeds, x, part=1, blocks=self.blocks, embedded=False)
        for block, kept in zip(self.blocks, keep, strict=True):
            x = block(x, at, keep=kept)
        return self.embedding.output(x[:, self.memory_tokens :], segment)

    def prefix(self, state: tuple[()], lanes: int) -> tuple[Float[Tensor, "B T D"], KVCache]:
        """The memory tokens and START."""
        x = torch.cat((self.memory.expand(lanes, -1, -1), self.embedding(self.no_tokens(lanes))), dim=1)
        return x, self.empty_cache(lanes, prefix=self.memory_tokens)
