"""The decoder-only Memformer of the paper's first version (Wu et al. 2020, arXiv 2010.06891v1), on which its cost of
replay was measured.

B  lanes     L  tokens in a segment     S  positions: START and L tokens     M  slots     D  width
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from memformer_pl.layers import (
    BiasedMemoryNorm,
    BlockConfig,
    RotaryPositions,
    KVCache,
    TransformerBlock,
    SlotWriter,
    TokenEmbedding,
    causal_mask,
    causal_blocks,
    require_times,
)
from memformer_pl.models.causal_decoder import CausalDecoder
from memformer_pl.contract import SegmentOutput, Segment
from memformer_pl.errors import LARGEST_WIDTH, require_sizes


class MemformerDecoderState(NamedTuple):
    """What a decoder-only Memformer carries."""

    memory: Float[Tensor, "B M D"]


class MemformerDecoder(CausalDecoder[MemformerDecoderState]):
    """Predict a segment by causal layers that all read memory, and write what the last one made of it into memory.

    Against Memformer: there is no encoder, so a token reads memory itself, and a segment is written as soon as it is
    predicted; but it is written from layers that saw only what stands before each token, and nearly the whole model
    lies on the way to the next memory, so that replay saves little of its first pass.

    Slots are written and forgotten as in the second version of the paper, by this package's layers; the writer of the
    first version had neither temperature nor forgetting (here ``temperature=1`` and ``forgetting=False``).

    Untrained layers make the tokens of a segment much alike, so that they count as few: heads of the writer begin by
    keeping a slot for longer than their time scales, 1.4 to 3 times in a stack of four layers, up to ten times and more
    in one of twelve.

    Args:
        vocab: Size of the vocabulary.
        dim: Width of tokens and slots.
        heads: Attention heads; must divide ``dim`` into even widths.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        layers: How many.
        slots: Memory slots of a lane; 0 is :class:`~memformer_pl.models.Transformer`.
        segment_length: The most tokens that a segment may hold.
        temperature: Of the writer. Below 1, a slot tends to keep all or to replace all.
        writer_heads: Attention heads of the writer; by default ``heads``.
        forgetting: Whether slots are pulled back to where they began.
        time_scale: Segments that an untrained memory keeps what it holds (ours), as Memformer's.
        writer_time_scale: Of the writer alone; by default ``time_scale``.
        dropout: On what each branch of a layer adds, and on embeddings.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        ffn_dim: int | None = None,
        layers: int = 12,
        slots: int = 32,
        segment_length: int = 64,
        temperature: float = 0.25,
        writer_heads: int | None = None,
        forgetting: bool = True,
        time_scale: float = 32.0,
        writer_time_scale: float | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        require_sizes(least=0, most=LARGEST_WIDTH, slots=slots)
        self.dim, self.heads, self.layers, self.dropout = dim, heads, layers, dropout
        self.slots, self.temperature, self.forgetting, self.time_scale = slots, temperature, forgetting, time_scale
        self.ffn_dim = 4 * dim if ffn_dim is None else ffn_dim
        self.writer_heads, self.writer_time_scale = heads if writer_heads is None else writer_heads, writer_time_scale
        writing = time_scale if writer_time_scale is None else writer_time_scale
        require_times(time_scale=time_scale, writer_time_scale=writing)
        sizes = BlockConfig(dim=dim, heads=heads, ffn_dim=self.ffn_dim, dropout=dropout)
        self.positions = RotaryPositions(width=dim // heads)
        self.table = TokenEmbedding(vocab_size=vocab_size, dim=dim, dropout=dropout)
        self.stack = causal_blocks(sizes, layers=layers, reads_memory=slots > 0)
        self.memory_norm = BiasedMemoryNorm(slots=slots, dim=dim, forgetting=forgetting, time_scale=time_scale)
        if slots:
            self.writer = SlotWriter(
                dim=dim,
                heads=self.writer_heads,
                temperature=temperature,
                segment_length=segment_length,
                time_scale=writing,
            )

    def initial_state(self, lanes: int) -> MemformerDecoderState:
        """The learned memory ``v / ||v||``."""
        return MemformerDecoderState(self.memory_norm.initial(lanes))

    def read(self, segment: Segment, state: MemformerDecoderState) -> tuple[SegmentOutput, MemformerDecoderState]:
        """Predict the segment from memory, and write it into memory."""
        x = self._pass(segment, state.memory)
        return self.table.reading(x[:, :-1], segment), self._written(x, segment, state.memory)

    def write(self, segment: Segment, state: MemformerDecoderState) -> MemformerDecoderState:
        """The next memory: all layers and the writer, no logits."""
        return self._written(self._pass(segment, state.memory), segment, state.memory)

    def front(self, state: MemformerDecoderState, lanes: int) -> tuple[Float[Tensor, "B 1 D"], KVCache]:
        """START, and the slots as each layer reads them."""
        rows = self.empty_kv_cache(lanes)
        if self.slots:
            readers = (layer.memory_reader for layer in self.stack if isinstance(layer, TransformerBlock))
            rows = rows.with_source(reader.keys_and_values(state.memory) for reader in readers)
        return self.table(self.nothing_read(lanes)), rows

    def _pass(self, segment: Segment, memory: Float[Tensor, "B M D"]) -> Float[Tensor, "B S D"]:
        """START and all tokens behind the last layer. The last token predicts nothing here, but is to be written."""
        x: Tensor = self.table(segment.tokens)
        length = x.shape[1]
        rotation = self.positions(torch.arange(-1, length - 1, device=x.device)[None])
        causal = causal_mask(length, device=x.device)
        for layer in self.stack:
            x = layer(x, memory, visible=causal, rotation=rotation)
        return x

    def _written(
        self, x: Float[Tensor, "B S D"], segment: Segment, memory: Float[Tensor, "B M D"]
    ) -> MemformerDecoderState:
        if self.slots:
            memory = self.memory_norm(self.writer(memory, self.table.norm(x[:, 1:]), segment.token_mask))
        return MemformerDecoderState(memory)
