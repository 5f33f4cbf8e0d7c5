"""Recurrent Memory Transformer (Bulatov et al. 2022, arXiv 2207.06881): memory tokens that pass from segment to
segment.

B  lanes     L  tokens in a segment     M  memory tokens     D  width     P  positions: read, START, tokens, write
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.layers import LayerSizes, RotaryPositions, Rows, TokenTable, causal_stack, visible_by_rank
from memformer_pl.models.stepwise import StepwiseModel
from memformer_pl.recurrence import Reading, Segment


class RecurrentMemoryState(NamedTuple):
    """What a Recurrent Memory Transformer carries."""

    memory: Float[Tensor, "B M D"]


class RecurrentMemoryTransformer(StepwiseModel[RecurrentMemoryState]):
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

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        heads: int,
        ffn_dim: int | None = None,
        layers: int = 12,
        memory_tokens: int = 10,
        segment_length: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(vocab=vocab, segment_length=segment_length)
        if memory_tokens < 0:
            raise ValueError(f"memory_tokens must be 0 (without memory) or more, got {memory_tokens}")
        self.dim, self.heads, self.layers, self.dropout = dim, heads, layers, dropout
        self.memory_tokens = memory_tokens
        self.ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
        sizes = LayerSizes(dim=dim, heads=heads, ffn_dim=self.ffn_dim, dropout=dropout)
        self.positions = RotaryPositions(width=dim // heads)
        self.table = TokenTable(vocab=vocab, dim=dim, dropout=dropout)
        self.stack = causal_stack(sizes, layers=layers)
        self.memory = nn.Parameter(torch.randn(memory_tokens, dim))

    def initial_state(self, lanes: int) -> RecurrentMemoryState:
        """The learned memory."""
        return RecurrentMemoryState(self.memory.expand(lanes, -1, -1))

    def read(self, segment: Segment, state: RecurrentMemoryState) -> tuple[Reading, RecurrentMemoryState]:
        """Predict the segment from memory, and write it into memory."""
        x = self._pass(segment, state.memory)
        predicting = slice(self.memory_tokens, self.memory_tokens + segment.tokens.shape[1])
        return self.table.reading(x[:, predicting], segment), self._written(x)

    def write(self, segment: Segment, state: RecurrentMemoryState) -> RecurrentMemoryState:
        """The next memory: all layers, no logits."""
        return self._written(self._pass(segment, state.memory))

    def front(self, state: RecurrentMemoryState, lanes: int) -> tuple[Float[Tensor, "B T D"], Rows]:
        """Memory and START."""
        x = torch.cat((state.memory, self.table(self.nothing_read(lanes))), dim=1)
        return x, self.empty_rows(lanes, front=self.memory_tokens)

    def _pass(self, segment: Segment, memory: Float[Tensor, "B M D"]) -> Float[Tensor, "B P D"]:
        """All positions behind the last layer. The last token predicts nothing here, but is to be remembered."""
        count, tokens = self.memory_tokens, self.table(segment.tokens)
        x = torch.cat((memory, tokens, memory), dim=1)
        places = torch.arange(-count, tokens.shape[1] + count, device=x.device)
        ranks = places.clamp(-1, tokens.shape[1])
        there = F.pad(F.pad(segment.present, (1, 0), value=True), (count, count), value=True)
        # what is written stands right behind the last token of its lane
        absent = (~segment.present).sum(1, keepdim=True) * (places >= tokens.shape[1])
        rotation = self.positions(places - 1 - absent)
        visible = visible_by_rank(ranks) & rearrange(there, "B P -> B 1 1 P")
        for layer in self.stack:
            x = layer(x, visible=visible, rotation=rotation)
        return x

    def _written(self, x: Float[Tensor, "B P D"]) -> RecurrentMemoryState:
        memory: Tensor = self.table.norm(x[:, x.shape[1] - self.memory_tokens :])
        return RecurrentMemoryState(memory)
