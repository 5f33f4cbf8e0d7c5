"""Memformer (Wu et al. 2022, arXiv 2010.06891): read a document segment by segment, and carry a fixed set of memory
slots.

B  lanes     L  tokens in a segment     M  slots     D  width     V  vocabulary     S  encoded positions: START and L
tokens
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.contract import ABSENT, Segment, SegmentOutput
from memformer_pl.contract.checks import check_continues
from memformer_pl.errors import LARGEST, LARGEST_WIDTH, UsageError, require_sizes
from memformer_pl.layers import (
    BiasedMemoryNorm,
    BlockConfig,
    CrossAttention,
    DecoderBlock,
    KVCache,
    Mask,
    Positions,
    RotaryPositions,
    Rotation,
    SlotWriter,
    TransformerBlock,
    as_bias,
    drop,
    embed_after,
    init_associative,
    init_weights,
    output_from_table,
    require_times,
    rotated_keys_values,
)
from memformer_pl.models.causal_decoder import CausalDecoder


class MemformerState(NamedTuple):
    """State of Memformer: its memory, and the previous segment, which is still to be read."""

    memory: Float[Tensor, "B M D"]
    previous: Int[Tensor, "B L"]
    """Tokens of the previous segment; ``ABSENT`` where there is none."""


class Encoded(NamedTuple):
    """What the decoder reads: the encoded previous segment after START, and behind it the slots if it reads them."""

    x: Float[Tensor, "B S D"]
    mask: Bool[Tensor, "B S"]
    """Which of these rows exist."""
    overlap: Int[Tensor, "B O"]
    """The last tokens of the previous segment, which the decoder reads again; ``ABSENT`` where there is none."""
    seeds: Int[Tensor, " segments"]
    """Seed of each segment's dropout; empty if nothing is dropped."""


class Memformer(CausalDecoder[MemformerState]):
    """Encode the previous segment with attention to memory, write it into memory, and predict the present segment from
    it (section 3).

    The encoder is bidirectional over the *previous* segment and never sees the tokens that are predicted. The decoder
    is causal and reaches memory only through the encoder's output, unless ``decoder_reads_memory``. One writer follows
    the last encoder layer.

    Ours, where the paper is silent: rotary positions, also from decoder to encoder; one learned START before the
    segments of encoder and decoder; in the first segment of a document the encoder sees START alone, and nothing is
    written; one table for the tokens of encoder, decoder and output.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens and slots.
        heads: Attention heads; must divide ``dim`` into even widths.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        feed_forward: Another feed-forward for some layers, such as :class:`~memformer_pl.layers.UltraMemory`:
            ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``, with layers counted from 0,
            the decoder's after the encoder's.
        encoder_layers: Layers that read the previous segment and memory.
        decoder_layers: Layers that predict.
        slots: Memory slots of a lane; 0 gives the paper's "without memory".
        segment_length: The most tokens that a segment may hold.
        temperature: Temperature of the writer. Below 1, a slot tends to keep all or to replace all.
        writer_heads: Attention heads of the writer; by default ``heads``.
        forgetting: Whether slots are pulled back to their initial value.
        time_scale: Number of segments for which an untrained memory keeps its content (ours): the larger, the shorter
            the forgetting vectors, and the less a write takes from a slot. Beyond the distances seen in training the
            forgetting vectors decide, since training hardly changes their length.
        writer_time_scale: Time scale of the writer alone; by default ``time_scale``. An untrained last head, or only
            head, keeps a slot for this number of segments, the first of several heads for a sixteenth of it.
        associative: Whether to initialise the model as an associative memory (ours): tokens attend one token back, and
            find slots by the token that came before their content. Lookup by key is hardly learned otherwise.
        overlap: Number of tokens at the end of the previous segment that the decoder reads again, before those that it
            predicts, instead of START (ours). Each that does not exist, before the beginning of a document, is START.
        decoder_reads_memory: Whether the decoder attends to the slots, too, beside the encoded segment, once it is
            written into them (ours).
        dropout: On the output of each branch of a layer, and on embeddings.
    """

    unread = ("previous",)
    causal_prefix = True

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        ffn_dim: int | None = None,
        feed_forward: dict[str, Any] | None = None,
        encoder_layers: int = 4,
        decoder_layers: int = 8,
        slots: int = 64,
        segment_length: int = 64,
        temperature: float = 0.25,
        writer_heads: int | None = None,
        forgetting: bool = True,
        time_scale: float = 32.0,
        writer_time_scale: float | None = None,
        associative: bool = False,
        overlap: int = 0,
        decoder_reads_memory: bool = False,
        dropout: float = 0.1,
    ) -> None:
        block = BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout, feed_forward=feed_forward)
        super().__init__(vocab_size=vocab_size, segment_length=segment_length, block=block)
        require_sizes(most=LARGEST, encoder_layers=encoder_layers, decoder_layers=decoder_layers)
        require_sizes(least=0, most=LARGEST_WIDTH, slots=slots)
        self.encoder_layers, self.decoder_layers = encoder_layers, decoder_layers
        self.slots, self.temperature, self.forgetting, self.time_scale = slots, temperature, forgetting, time_scale
        require_sizes(least=0, most=segment_length, overlap=overlap)
        self.associative, self.overlap, self.decoder_reads_memory = associative, overlap, decoder_reads_memory
        if decoder_reads_memory and not slots:
            raise UsageError("decoder_reads_memory needs slots, got slots=0: leave it out, or raise slots")
        self.writer_heads, self.writer_time_scale = heads if writer_heads is None else writer_heads, writer_time_scale
        writing = time_scale if writer_time_scale is None else writer_time_scale
        require_times(time_scale=time_scale, writer_time_scale=writing)
        self.embedding, self.start = nn.Embedding(vocab_size, dim), nn.Parameter(torch.randn(dim))
        self.rotary = RotaryPositions(width=dim // heads, first=-1 - segment_length, last=segment_length)
        sizes = block.of_layers(encoder_layers + decoder_layers)
        encoder, decoder = sizes[:encoder_layers], sizes[encoder_layers:]
        self.encoder = nn.ModuleList(TransformerBlock(each, reads_memory=slots > 0) for each in encoder)
        self.decoder = nn.ModuleList(DecoderBlock(each) for each in decoder)
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        init_weights(self.encoder)
        init_weights(self.decoder)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.memory_norm = BiasedMemoryNorm(slots=slots, dim=dim, forgetting=forgetting, time_scale=time_scale)
        if slots:
            self.writer = SlotWriter(
                dim=dim,
                heads=self.writer_heads,
                temperature=temperature,
                segment_length=segment_length,
                time_scale=writing,
            )
        if decoder_reads_memory:
            self.slot_norm = nn.LayerNorm(dim)
        if associative:
            init_associative(self.encoder, rotary=self.rotary, writer=self.writer if slots else None)

    def initial_state(self, lanes: int) -> MemformerState:
        """The learned memory ``v / ||v||``, and no previous segment."""
        previous = torch.full((lanes, self.segment_length), ABSENT, device=self.memory_norm.anchors.device)
        return MemformerState(self.memory_norm.initial(lanes), previous)

    def step(self, segment: Segment, state: MemformerState) -> tuple[SegmentOutput, MemformerState]:
        """Encode the previous segment, write it into memory, and predict the present one."""
        encoded, next_state = self.encode_step(segment, state)
        return self.decoder_step(segment, encoded), next_state

    def advance_step(self, segment: Segment, state: MemformerState) -> MemformerState:
        """The next state: encoder and writer, no decoder (the critical path of memory replay)."""
        return self.encode_step(segment, state)[1]

    def encode_step(self, segment: Segment, state: MemformerState) -> tuple[Encoded, MemformerState]:
        """Encode the previous segment, and write it into memory."""
        full = self._follows_full(segment)
        if full:
            check_continues(state.previous != ABSENT)
        encoded = self._encode(state, self.seeds(segment), full=full)
        memory = self._write(state.memory, encoded, full=full)
        previous = segment.tokens.masked_fill(~segment.token_mask, ABSENT)
        if previous.shape[1] < self.segment_length:
            previous = F.pad(previous, (0, self.segment_length - previous.shape[1]), value=ABSENT)
        return self._beside_slots(encoded, memory), MemformerState(memory, previous)

    def decoder_step(self, segment: Segment, encoded: Encoded) -> SegmentOutput:
        """Predict the present segment, or several."""
        length, full = segment.tokens.shape[1], self._follows_full(segment)
        x = self._embed(segment.tokens[:, :-1], encoded.overlap)
        keep = self.keep(encoded.seeds if len(encoded.seeds) else None, x, part=1, blocks=self.decoder)
        x = drop(x, keep[0])
        rotation, visible = self._encoded_positions(encoded.mask, x, full=full)
        sources = rotated_keys_values(self._cross_attentions(), encoded.x, rotation)
        at = Positions(None, self.rotary.span(length - 1 - x.shape[1], length - 1), visible, causal=True)
        for block, source, kept in zip(self.decoder, sources, keep[1:], strict=True):
            x = block(x, at, source, keep=kept)
        x = x if self.overlap <= 1 else x[:, -length:]
        return output_from_table(self.decoder_norm(x), self.embedding.weight, segment)

    def prefix(self, state: MemformerState, lanes: int) -> tuple[Float[Tensor, "B _ D"], KVCache]:
        """START or the overlap, and a cache with the keys and values of what the decoder attends to."""
        encoded = self._encode(state, None, full=False)
        if self.decoder_reads_memory:
            encoded = self._beside_slots(encoded, self._write(state.memory, encoded, full=False))
        rotation, _ = self._encoded_positions(encoded.mask, encoded.x, full=False)
        keys_values = rotated_keys_values(self._cross_attentions(), encoded.x, rotation)
        x = self._embed(self.no_tokens(lanes), encoded.overlap)
        return x, self.empty_cache(lanes, prefix=x.shape[1] - 1).with_source(keys_values, encoded.mask)

    def predicting_blocks(self) -> nn.ModuleList:
        """The decoder."""
        return self.decoder

    def regions(self) -> Sequence[nn.Module]:
        """Both stacks, and the writer."""
        return [*self.encoder, *self.decoder, *([self.writer] if self.slots else [])]

    def vectors(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Inputs of the decoder at tokens."""
        return self._embed(tokens)[:, 1:]

    def logits(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Logits of the next token."""
        return F.linear(self.decoder_norm(x), self.embedding.weight)

    def _encode(self, state: MemformerState, seeds: Int[Tensor, " S"] | None, *, full: bool) -> Encoded:
        """Encode the previous segment; ``full`` if every lane has all its tokens."""
        lanes, length = state.previous.shape
        if full:
            mask = state.previous.new_ones((lanes, length + 1), dtype=torch.bool)
        else:
            mask = F.pad(state.previous != ABSENT, (1, 0), value=True)
        x = self._embed(state.previous if full else state.previous.clamp(min=0))
        rotation, visible = self._encoded_positions(mask, x, full=full)
        at = Positions(visible, rotation)
        keep = self.keep(seeds, x, part=0, blocks=self.encoder)
        x = drop(x, keep[0])
        for block, kept in zip(self.encoder, keep[1:], strict=True):
            x = block(x, at, state.memory, keep=kept)
        seeds = state.previous.new_empty(0) if seeds is None else seeds
        return Encoded(self.encoder_norm(x), mask, self._overlapping(state.previous, full=full), seeds)

    def _write(self, memory: Float[Tensor, "B M D"], encoded: Encoded, *, full: bool) -> Float[Tensor, "B M D"]:
        """The memory after the encoded segment; without slots, as it was."""
        if not self.slots:
            return memory
        written = None if full else encoded.mask[:, 1:]
        after: Tensor = self.memory_norm(self.writer(memory, encoded.x[:, 1:], written))
        return after

    def _beside_slots(self, encoded: Encoded, memory: Float[Tensor, "B M D"]) -> Encoded:
        """What is encoded, and the slots behind it if the decoder reads them."""
        if not self.decoder_reads_memory:
            return encoded
        rows = torch.cat((encoded.x, self.slot_norm(memory)), dim=1)
        return encoded._replace(x=rows, mask=F.pad(encoded.mask, (0, self.slots), value=True))

    def _overlapping(self, previous: Int[Tensor, "B L"], *, full: bool) -> Int[Tensor, "B O"]:
        """The last tokens of the previous segment, at the right."""
        length = previous.shape[1]
        if full or not self.overlap:
            return previous[:, length - self.overlap :]
        first_B1 = (previous != ABSENT).sum(1, keepdim=True) - self.overlap
        index = first_B1 + torch.arange(self.overlap, device=previous.device)
        return previous.gather(1, index.clamp(min=0)).masked_fill(index < 0, ABSENT)

    def _encoded_positions(
        self, mask: Bool[Tensor, "B S"], x: Float[Tensor, "B _ D"], *, full: bool
    ) -> tuple[Rotation, Mask | None]:
        """Rotations of the previous segment, whose last token stands at -1, and its mask if it needs one. Slots behind
        it all stand at its START."""
        count = self.segment_length + 1
        if full:
            rotation = self.rotary.span(-count, 0)
        else:
            absent_B1 = (~mask).sum(1, keepdim=True)
            rotation = self.rotary(torch.arange(-count, 0, device=mask.device) + absent_B1)
        if slots := mask.shape[1] - count:
            rotation = rotation.with_more_at_first(slots)
        return rotation, None if full else as_bias(rearrange(mask, "B S -> B 1 1 S"), x)

    def _cross_attentions(self) -> list[CrossAttention]:
        return [block.cross_attention for block in self.decoder if isinstance(block, DecoderBlock)]

    def _follows_full(self, segment: Segment) -> bool:
        """Whether the previous segment is known to fill every lane of the state."""
        return segment.continues and segment.tokens.shape[1] == self.segment_length

    def _embed(self, tokens: Int[Tensor, "B L"], overlap: Int[Tensor, "B O"] | None = None) -> Float[Tensor, "B _ D"]:
        """Vectors of START or the overlap, and of the tokens; each of a length near ``sqrt(dim)``."""
        return embed_after(self.start, self.embedding, tokens, overlap)
