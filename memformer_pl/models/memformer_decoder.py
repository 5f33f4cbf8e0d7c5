"""The decoder-only Memformer of the paper's first version (Wu et al. 2020, arXiv 2010.06891v1), with which the paper
measured the cost of replay.

B  lanes     L  tokens in a segment     S  positions: START and L tokens     M  slots     D  width
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from memformer_pl.contract import Segment, SegmentOutput
from memformer_pl.errors import LARGEST_WIDTH, require_sizes
from memformer_pl.layers import (
    BiasedMemoryNorm,
    BlockConfig,
    KVCache,
    Positions,
    RotaryPositions,
    SlotWriter,
    TransformerBlock,
    causal_blocks,
    drop,
    require_times,
)
from memformer_pl.models.causal_decoder import DecoderOnly


class MemformerDecoderState(NamedTuple):
    """State of a decoder-only Memformer."""

    memory: Float[Tensor, "B M D"]


class MemformerDecoder(DecoderOnly[MemformerDecoderState]):
    """Predict a segment by causal layers that all read memory, and write the output of the last one into memory.

    Unlike Memformer it has no encoder: tokens read memory directly, and a segment is written once it is predicted. But
    it is written from layers that saw only the tokens before each token, and nearly the whole model leads to the
    next memory, so the first pass of replay is nearly a whole forward pass.

    Slots are written and forgotten by the layers of the paper's second version; the writer of the first version had
    neither temperature nor forgetting (here ``temperature=1`` and ``forgetting=False``).

    Outputs of untrained layers are similar for all tokens of a segment, so they count as few tokens: untrained heads of
    the writer keep a slot for longer than their time scales, 1.4 to 3 times in a stack of four layers, and ten times
    or more in one of twelve.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens and slots.
        heads: Attention heads; must divide ``dim`` into even widths.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        feed_forward: Another feed-forward for some layers, such as :class:`~memformer_pl.layers.UltraMemory`:
            ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``, with layers counted from 0.
        layers: Number of blocks.
        slots: Memory slots of a lane; 0 gives :class:`~memformer_pl.models.Transformer`.
        segment_length: The most tokens that a segment may hold.
        temperature: Temperature of the writer. Below 1, a slot tends to keep all or to replace all.
        writer_heads: Attention heads of the writer; by default ``heads``.
        forgetting: Whether slots are pulled back to their initial value.
        time_scale: Number of segments for which an untrained memory keeps its content (ours), as in Memformer.
        writer_time_scale: Time scale of the writer alone; by default ``time_scale``.
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
        slots: int = 32,
        segment_length: int = 64,
        temperature: float = 0.25,
        writer_heads: int | None = None,
        forgetting: bool = True,
        time_scale: float = 32.0,
        writer_time_scale: float | None = None,
        dropout: float = 0.1,
    ) -> None:
        block = BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout, feed_forward=feed_forward)
        super().__init__(vocab_size=vocab_size, segment_length=segment_length, layers=layers, block=block)
        require_sizes(least=0, most=LARGEST_WIDTH, slots=slots)
        self.slots, self.temperature, self.forgetting, self.time_scale = slots, temperature, forgetting, time_scale
        self.writer_heads, self.writer_time_scale = heads if writer_heads is None else writer_heads, writer_time_scale
        writing = time_scale if writer_time_scale is None else writer_time_scale
        require_times(time_scale=time_scale, writer_time_scale=writing)
        self.rotary = RotaryPositions(width=dim // heads, first=-1, last=segment_length)
        self.blocks = causal_blocks(block, layers=layers, reads_memory=slots > 0)
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

    def step(self, segment: Segment, state: MemformerDecoderState) -> tuple[SegmentOutput, MemformerDecoderState]:
        """Predict the segment from memory, and write it into memory."""
        x = self._run_blocks(segment, state.memory)
        return self.embedding.output(x[:, :-1], segment), self._write(x, segment, state.memory)

    def advance_step(self, segment: Segment, state: MemformerDecoderState) -> MemformerDecoderState:
        """The next memory: all blocks and the writer, no logits."""
        return self._write(self._run_blocks(segment, state.memory), segment, state.memory)

    def regions(self) -> Sequence[nn.Module]:
        """The blocks, and the writer."""
        return [*self.blocks, *([self.writer] if self.slots else [])]

    def prefix(self, state: MemformerDecoderState, lanes: int) -> tuple[Float[Tensor, "B 1 D"], KVCache]:
        """START, and a cache with keys and values of the slots."""
        cache = self.empty_cache(lanes)
        if self.slots:
            readers = (block.memory_reader for block in self.blocks if isinstance(block, TransformerBlock))
            cache = cache.with_source(reader.keys_values(state.memory) for reader in readers)
        return self.embedding(self.no_tokens(lanes)), cache

    def _run_blocks(self, segment: Segment, memory: Float[Tensor, "B M D"]) -> Float[Tensor, "B S D"]:
        """Outputs of the last block at START and all tokens; the last token predicts nothing here, but is written."""
        x: Tensor = self.embedding(segment.tokens)
        keep = self.keep(self.seeds(segment), x, part=0, blocks=self.blocks)
        x = drop(x, keep[0])
        at = Positions(rotation=self.rotary.span(-1, x.shape[1] - 1), causal=True)
        for block, kept in zip(self.blocks, keep[1:], strict=True):
            x = block(x, at, memory, keep=kept)
        return x

    def _write(
        self, x: Float[Tensor, "B S D"], segment: Segment, memory: Float[Tensor, "B M D"]
    ) -> MemformerDecoderState:
        if self.slots:
            memory = self.memory_norm(self.writer(memory, self.embedding.norm(x[:, 1:]), segment.token_mask))
        return MemformerDecoderState(memory)
