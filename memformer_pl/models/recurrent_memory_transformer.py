"""Recurrent Memory Transformer (Bulatov et al. 2022, arXiv 2207.06881): memory tokens that are carried from segment
to segment.

B  lanes     L  tokens in a segment     M  memory tokens     D  width     P  positions: read, START, tokens, write
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from memformer_pl.contract import Segment, SegmentOutput
from memformer_pl.errors import LARGEST_WIDTH, require_sizes
from memformer_pl.layers import (
    BlockConfig,
    KVCache,
    Positions,
    RotaryPositions,
    TransformerBlock,
    causal_blocks,
    drop,
    visible_by_rank,
)
from memformer_pl.layers.memory_tokens import EnteredBlock, enter, lengthen
from memformer_pl.models.causal_decoder import DecoderOnly


class RecurrentMemoryState(NamedTuple):
    """State of a Recurrent Memory Transformer."""

    memory: Float[Tensor, "B M D"]


class RecurrentMemoryTransformer(DecoderOnly[RecurrentMemoryState]):
    """Put memory before a segment, where it is read, and after it, where it is written; the output of the last layer at
    the second copy is the next memory (section 3.2).

    Read memory attends to itself alone; a token attends to memory and the tokens up to itself; written memory attends
    to all. The gradient flows through memory over the whole rollout: the paper's ``k`` is the horizon minus one.

    Ours: the layers of this package, which are pre-norm, with rotary positions over the extended segment and one START
    before the tokens. So memory passes the norm after the last layer, as the post-norm layers of the paper end in one.
    The paper's combination with a cache is not implemented.

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
        dropout: On the output of each branch of a layer, and on token embeddings.
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
        self.rotary = RotaryPositions(width=dim // heads, first=-1 - memory_tokens, last=segment_length + memory_tokens)
        self.blocks = causal_blocks(block, layers=layers)
        self.memory = nn.Parameter(torch.randn(memory_tokens, dim))

    def initial_state(self, lanes: int) -> RecurrentMemoryState:
        """The learned memory."""
        return RecurrentMemoryState(self.memory.expand(lanes, -1, -1))

    def step(self, segment: Segment, state: RecurrentMemoryState) -> tuple[SegmentOutput, RecurrentMemoryState]:
        """Predict the segment from memory, and write it into memory."""
        entering = self._run_lower_blocks(segment, state.memory)
        next_state = self._write(entering)
        predicting = slice(self.memory_tokens, self.memory_tokens + segment.tokens.shape[1])
        return self.embedding.output(entering.run(predicting), segment), next_state

    def advance_step(self, segment: Segment, state: RecurrentMemoryState) -> RecurrentMemoryState:
        """The next memory: all blocks, the last one at written memory alone."""
        return self._write(self._run_lower_blocks(segment, state.memory))

    def prefix(self, state: RecurrentMemoryState, lanes: int) -> tuple[Float[Tensor, "B T D"], KVCache]:
        """Memory and START."""
        x = torch.cat((state.memory, self.embedding(self.no_tokens(lanes))), dim=1)
        return x, self.empty_cache(lanes, prefix=self.memory_tokens)

    def _run_lower_blocks(self, segment: Segment, memory: Float[Tensor, "B M D"]) -> EnteredBlock:
        """Run all blocks but the last. The last token predicts nothing here, but memory must read it."""
        count, seeds, tokens = self.memory_tokens, self.seeds(segment), self.embedding(segment.tokens)
        tokens = drop(tokens, self.keep(seeds, tokens, part=0)[0])
        x = torch.cat((memory, tokens, memory), dim=1)
        *lower, last = self.keep(seeds, x, part=1, blocks=self.blocks, embedded=False)
        ranks, exists, positions = lengthen(segment.token_mask, before=count, behind=count)
        # memory in front sees itself, and memory behind all of itself
        visible = visible_by_rank(ranks.clamp(-1, tokens.shape[1])) & rearrange(exists, "B P -> B 1 1 P")
        at = Positions(visible, self.rotary(positions))
        for block, kept in zip(self.blocks[:-1], lower, strict=True):
            x = block(x, at, keep=kept)
        block = self.blocks[-1]
        assert isinstance(block, TransformerBlock)
        return enter(block, x, at, keep=last)

    def _write(self, entering: EnteredBlock) -> RecurrentMemoryState:
        positions = entering.x.shape[1]
        written = entering.run(slice(positions - self.memory_tokens, positions))
        return RecurrentMemoryState(self.embedding.norm(written))
