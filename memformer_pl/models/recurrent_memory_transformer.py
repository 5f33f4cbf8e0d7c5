"""Recurrent Memory Transformer (Bulatov et al. 2022, arXiv 2207.06881): memory tokens that pass from segment to
segment.

B  lanes     L  tokens in a segment     M  memory tokens     D  width     P  positions: read, START, tokens, write
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.layers import (
    BlockConfig,
    RotaryPositions,
    Rotation,
    KVCache,
    TransformerBlock,
    TokenEmbedding,
    causal_blocks,
    visible_by_rank,
)
from memformer_pl.models.causal_decoder import CausalDecoder
from memformer_pl.gradients.rng import own_stream
from memformer_pl.contract import SegmentOutput, Segment
from memformer_pl.errors import LARGEST_WIDTH, require_sizes


class RecurrentMemoryState(NamedTuple):
    """What a Recurrent Memory Transformer carries."""

    memory: Float[Tensor, "B M D"]


class Below(NamedTuple):
    """What enters the last layer, and what it sees."""

    x: Float[Tensor, "B P D"]
    normed: Float[Tensor, "B P D"]
    keys: Float[Tensor, "B H P K"]
    values: Float[Tensor, "B H P K"]
    visible: Bool[Tensor, "B 1 P P"]
    rotation: Rotation


class RecurrentMemoryTransformer(CausalDecoder[RecurrentMemoryState]):
    """Put memory in front of a segment to be read and behind it to be written; what the last layer makes of the second
    copy is the next memory (section 3.2).

    Memory reads memory alone; a token reads memory and the tokens up to itself; what is written reads all. The
    gradient flows through memory for as many segments as a window has: the paper's ``k`` is the horizon less one.

    It departs from the paper in its layers, which are this package's: pre-norm, rotary positions by distance over the
    lengthened segment, one START in front of the tokens. So memory passes the norm behind the last layer, as the
    post-norm layers of the paper end in one. The paper's combination with a cache is not built.

    Args:
        vocab: Size of the vocabulary.
        dim: Width of tokens.
        heads: Attention heads; must divide ``dim`` into even widths.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        layers: How many.
        memory_tokens: How many; 0 is :class:`~memformer_pl.models.Transformer`.
        segment_length: The most tokens that a segment may hold.
        dropout: On what each branch of a layer adds, and on embeddings of tokens.
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

    def initial_state(self, lanes: int) -> RecurrentMemoryState:
        """The learned memory."""
        return RecurrentMemoryState(self.memory.expand(lanes, -1, -1))

    def read(self, segment: Segment, state: RecurrentMemoryState) -> tuple[SegmentOutput, RecurrentMemoryState]:
        """Predict the segment from memory, and write it into memory."""
        below = self._pass(segment, state.memory)
        next_state = self._written(below)
        with own_stream(self._seed(), segment.tokens):
            predicting = slice(self.memory_tokens, self.memory_tokens + segment.tokens.shape[1])
            return self.table.reading(self._last(below, predicting), segment), next_state

    def write(self, segment: Segment, state: RecurrentMemoryState) -> RecurrentMemoryState:
        """The next memory: all layers, of which the last makes what is written alone."""
        next_state = self._written(self._pass(segment, state.memory))
        self._seed()
        return next_state

    def front(self, state: RecurrentMemoryState, lanes: int) -> tuple[Float[Tensor, "B T D"], KVCache]:
        """Memory and START."""
        x = torch.cat((state.memory, self.table(self.nothing_read(lanes))), dim=1)
        return x, self.empty_kv_cache(lanes, front=self.memory_tokens)

    def _pass(self, segment: Segment, memory: Float[Tensor, "B M D"]) -> Below:
        """All positions below the last layer. The last token predicts nothing here, but is to be remembered."""
        count, tokens = self.memory_tokens, self.table(segment.tokens)
        x = torch.cat((memory, tokens, memory), dim=1)
        places = torch.arange(-count, tokens.shape[1] + count, device=x.device)
        ranks = places.clamp(-1, tokens.shape[1])
        there = F.pad(F.pad(segment.token_mask, (1, 0), value=True), (count, count), value=True)
        # what is written stands right behind the last token of its lane
        absent = (~segment.token_mask).sum(1, keepdim=True) * (places >= tokens.shape[1])
        rotation = self.positions(places - 1 - absent)
        visible = visible_by_rank(ranks) & rearrange(there, "B P -> B 1 1 P")
        for layer in self.stack[:-1]:
            x = layer(x, visible=visible, rotation=rotation)
        last = self.stack[-1]
        assert isinstance(last, TransformerBlock)
        normed = last.self_norm(x)
        keys, values = last.self_attention.keys_and_values(normed, rotation)
        return Below(x, normed, keys, values, visible, rotation)

    def _last(self, below: Below, rows: slice) -> Float[Tensor, "B L D"]:
        """What the last layer makes of some positions. The others, memory that is read and the last token, are done."""
        last = self.stack[-1]
        assert isinstance(last, TransformerBlock)
        visible, rotation = below.visible[:, :, rows], below.rotation.some(rows)
        x, normed = below.x[:, rows], below.normed[:, rows]
        return last.some(x, normed, below.keys, below.values, visible=visible, rotation=rotation)

    def _written(self, below: Below) -> RecurrentMemoryState:
        positions = below.x.shape[1]
        return RecurrentMemoryState(
            self.table.norm(self._last(below, slice(positions - self.memory_tokens, positions)))
        )
