"""Associative Recurrent Memory Transformer (Rodkin et al. 2024, arXiv 2407.04841): memory tokens that write a matrix in
every layer. Its ablation, the parallel RMT, carries memory tokens in every layer instead.

B  lanes     L  tokens in a segment     M  memory tokens     N  layers     D  width     H  heads     K  width of a head
P  positions: START, tokens, memory tokens     T  tokens of a piece     F  features of a key
R  rows that a layer carries: F, or M
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from memformer_pl.contract import Segment, SegmentOutput
from memformer_pl.errors import LARGEST_WIDTH, UsageError, require_sizes
from memformer_pl.layers import (
    BlockConfig,
    Keep,
    KeysValues,
    KVCache,
    LayerKVCache,
    Positions,
    RotaryPositions,
    Rotation,
    TransformerBlock,
    causal_blocks,
    drop,
    visible_by_rank,
)
from memformer_pl.layers.associative_matrix import ROLLS, AssociativeBlock, Matrix, associative_blocks
from memformer_pl.layers.compressive_memory import as_source
from memformer_pl.layers.memory_tokens import EnteredBlock, enter, lengthen
from memformer_pl.models.causal_decoder import DecoderOnly

Carried = Literal["matrix", "tokens"]
Stored = tuple[Float[Tensor, "B R D"], Float[Tensor, "B F"]]
"""What a layer carries: its parts of a state."""


class AssociativeRecurrentMemoryState(NamedTuple):
    """State of an Associative Recurrent Memory Transformer."""

    memory: Float[Tensor, "B N R D"]
    """Rows of each layer: sums of values, one for each feature of their keys and at least float32, or memory tokens."""
    keys: Float[Tensor, "B N F"]
    """Sums of the features of keys, at least float32; none with memory tokens."""


class Layers(NamedTuple):
    """What the layers of a step share."""

    at: Positions
    """Positions and their mask."""
    before: Rotation
    """Rotation of memory tokens in front of the segment."""
    keep: list[Keep | None]


class AssociativeRecurrentMemoryTransformer(DecoderOnly[AssociativeRecurrentMemoryState]):
    """Put the same learned memory tokens behind every segment; in each layer, what leaves it there is written into a
    matrix, which the next segment reads before the layer, at every position (equations 1 to 4).

    A memory token sees all tokens of its segment and the memory tokens before it, and no token sees it. Writing
    replaces what the matrix holds under a key (the delta rule) by a share. Gradients cross segments, through all sums.

    With ``carried="tokens"`` it is the paper's parallel RMT: what leaves a layer at the memory tokens stands in front
    of the next segment in the same layer, as keys and values alone, in place of a matrix.

    Ours: the blocks of this package, pre-norm, with rotary positions over the lengthened segment and one START. What
    memory returns is not dropped out. Memory is at least float32. An empty matrix returns exactly zero and corrects
    nothing, so the first segment of a document needs no case of its own, as it has in the paper. No segment knows the
    last token of the one before but through memory.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens.
        heads: Attention heads; must divide ``dim`` into even widths.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        feed_forward: Another feed-forward for some layers, such as :class:`~memformer_pl.layers.UltraMemory`:
            ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``, with layers counted from 0.
        layers: Number of blocks.
        memory_tokens: Number of memory tokens; at least 1.
        carried: What each layer carries: a ``matrix``, or memory ``tokens``.
        key_width: Width of the keys of the matrix before their features are taken, of which there are six times as
            many; the paper's ``d_mem``.
        correction: Whether a key that the matrix already holds is not counted again (``gamma``, figure 4a).
        segment_length: The most tokens that a segment may hold.
        dropout: On the output of each branch of a layer, and on token embeddings.
    """

    no_decay = ("memory", "initial")

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
        carried: Carried = "matrix",
        key_width: int = 64,
        correction: bool = True,
        segment_length: int = 64,
        dropout: float = 0.1,
    ) -> None:
        block = BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout, feed_forward=feed_forward)
        super().__init__(vocab_size=vocab_size, segment_length=segment_length, layers=layers, block=block)
        require_sizes(most=LARGEST_WIDTH, memory_tokens=memory_tokens, key_width=key_width)
        if carried not in get_args(Carried):
            raise UsageError(f"carried must be one of {', '.join(get_args(Carried))}, got {carried!r}")
        self.memory_tokens, self.carried = memory_tokens, carried
        self.key_width, self.correction = key_width, correction
        self.rotary = RotaryPositions(width=dim // heads, first=-1 - memory_tokens, last=segment_length + memory_tokens)
        self.memory = nn.Parameter(torch.randn(memory_tokens, dim))
        self.initial: nn.Parameter | None = None
        if carried == "matrix":
            self.blocks = associative_blocks(block, layers=layers, key_width=key_width, correction=correction)
        else:
            self.blocks = causal_blocks(block, layers=layers)
            self.initial = nn.Parameter(torch.randn(layers, memory_tokens, dim))

    def initial_state(self, lanes: int) -> AssociativeRecurrentMemoryState:
        """Nothing stored, or the learned memory tokens of each layer."""
        exact = torch.promote_types(self.memory.dtype, torch.float32)
        if self.initial is not None:
            keys = self.memory.new_zeros(lanes, self.layers, 0, dtype=exact)
            return AssociativeRecurrentMemoryState(self.initial.expand(lanes, -1, -1, -1), keys)
        keys = self.memory.new_zeros(lanes, self.layers, 2 * ROLLS * self.key_width, dtype=exact)
        return AssociativeRecurrentMemoryState(keys.new_zeros(*keys.shape, self.dim), keys)

    def step(
        self, segment: Segment, state: AssociativeRecurrentMemoryState
    ) -> tuple[SegmentOutput, AssociativeRecurrentMemoryState]:
        """Predict the segment from memory and earlier tokens, and write it."""
        entering, after = self._run_lower_blocks(segment, state)
        next_state = self._write_last(entering, after, state)
        return self.embedding.output(entering.run(slice(0, segment.tokens.shape[1])), segment), next_state

    def advance_step(self, segment: Segment, state: AssociativeRecurrentMemoryState) -> AssociativeRecurrentMemoryState:
        """The next state: all blocks, the last one at memory tokens alone."""
        return self._write_last(*self._run_lower_blocks(segment, state), state)

    def regions(self) -> Sequence[nn.Module]:
        """The blocks, and what reads and writes their matrices."""
        matrices = (block for block in self.blocks if isinstance(block, AssociativeBlock))
        return [*self.blocks, *(part for block in matrices for part in (block.reader, block.writer))]

    def prefix(self, state: AssociativeRecurrentMemoryState, lanes: int) -> tuple[Float[Tensor, "B 1 D"], KVCache]:
        """START, and a cache with the matrices, or with keys and values of the memory tokens."""
        x = self.embedding(self.no_tokens(lanes))
        if self.carried == "matrix":
            return x, as_source(state.memory[:, :, None], state.keys[:, :, None], self.empty_cache(lanes))
        count = self.memory_tokens
        cache = self.empty_cache(lanes, prefix=count)
        for n in range(self.layers):
            keys_values = self._in_front(n, state, self.rotary.span(-1 - count, -1))
            cache.keys[:, n, :, :count], cache.values[:, n, :, :count] = keys_values
        return x, cache._replace(filled=cache.filled + count)

    def decode_block(
        self, block: nn.Module, x: Float[Tensor, "B T D"], at: Positions, cache: LayerKVCache
    ) -> Float[Tensor, "B T D"]:
        """Run a block on the next tokens, which read its matrix first."""
        if isinstance(block, AssociativeBlock):
            keys, values = cache.source
            x = block.reader(x, Matrix(values[:, 0], keys[:, 0, :, 0]))
        return super().decode_block(block, x, at, cache)

    def _embed(self, segment: Segment) -> tuple[Float[Tensor, "B P D"], Layers]:
        """START, tokens and memory tokens. The last token predicts nothing here, but memory must read it."""
        seeds, tokens = self.seeds(segment), self.embedding(segment.tokens)
        tokens = drop(tokens, self.keep(seeds, tokens, part=0)[0])
        x = torch.cat((tokens, self.memory.expand(len(tokens), -1, -1)), dim=1)
        keep = self.keep(seeds, x, part=1, blocks=self.blocks, embedded=False)
        front = 0 if self.carried == "matrix" else self.memory_tokens
        ranks, exists, positions = lengthen(segment.token_mask, before=front, behind=self.memory_tokens)
        visible, rotation = visible_by_rank(ranks) & rearrange(exists, "B P -> B 1 1 P"), self.rotary(positions)
        at = Positions(visible, rotation).rows(slice(front, None))
        return x, Layers(at, rotation.rows(slice(0, front)), keep)

    def _run_lower_blocks(
        self, segment: Segment, state: AssociativeRecurrentMemoryState
    ) -> tuple[EnteredBlock, list[Stored]]:
        """The last block as it is entered, and what all blocks before it carry on."""
        x, layers = self._embed(segment)
        after: list[Stored] = []
        for n, block in enumerate(self.blocks[:-1]):
            x, before = self._read(n, x, state, layers.before)
            x = block(x, layers.at, before=before, keep=layers.keep[n])
            after.append(self._write(n, x[:, -self.memory_tokens :], state))
        last = self.blocks[-1]
        assert isinstance(last, TransformerBlock)
        x, before = self._read(self.layers - 1, x, state, layers.before)
        return enter(last, x, layers.at, before=before, keep=layers.keep[-1]), after

    def _write_last(
        self, entering: EnteredBlock, after: list[Stored], state: AssociativeRecurrentMemoryState
    ) -> AssociativeRecurrentMemoryState:
        written = entering.run(slice(-self.memory_tokens, None))
        stored = [*after, self._write(self.layers - 1, written, state)]
        memory, keys = (torch.stack(fields, dim=1) for fields in zip(*stored, strict=True))
        return AssociativeRecurrentMemoryState(memory, keys)

    def _read(
        self, n: int, x: Float[Tensor, "B P D"], state: AssociativeRecurrentMemoryState, rotation: Rotation
    ) -> tuple[Float[Tensor, "B P D"], KeysValues | None]:
        """What enters block ``n``, and keys and values in front of it."""
        block = self.blocks[n]
        if isinstance(block, AssociativeBlock):
            return block.reader(x, Matrix(state.memory[:, n], state.keys[:, n])), None
        return x, self._in_front(n, state, rotation)

    def _in_front(self, n: int, state: AssociativeRecurrentMemoryState, rotation: Rotation) -> KeysValues:
        """Keys and values of the memory tokens of block ``n``, which attend to nothing."""
        block = self.blocks[n]
        assert isinstance(block, TransformerBlock)
        return block.project(state.memory[:, n], Positions(rotation=rotation))[1]

    def _write(self, n: int, written: Float[Tensor, "B M D"], state: AssociativeRecurrentMemoryState) -> Stored:
        """What block ``n`` carries on, given what leaves it at the memory tokens."""
        block = self.blocks[n]
        if isinstance(block, AssociativeBlock):
            stored: Matrix = block.writer(written, Matrix(state.memory[:, n], state.keys[:, n]))
            return stored
        return written, state.keys[:, n]
