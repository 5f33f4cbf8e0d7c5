"""Block-Recurrent Transformer (Hutchins et al. 2022, arXiv 2203.07852): one layer reads and updates state vectors, once
in each segment; all layers attend to a window of earlier tokens.

B  lanes     L  tokens in a segment     T  tokens of a piece     W  tokens of the window     M  state vectors
N  layers     D  width     H  heads     K  width of a head
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.contract import ABSENT, Segment, SegmentOutput
from memformer_pl.errors import LARGEST_WIDTH, require_sizes
from memformer_pl.layers import (
    BlockConfig,
    Keep,
    KeysValues,
    KVCache,
    LayerKVCache,
    Positions,
    RotaryPositions,
    as_bias,
    cached_and_causal,
    drop,
    filled_part,
    init_weights,
    push_with_graph,
)
from memformer_pl.layers.attention import SourceKeysValues, with_before
from memformer_pl.layers.block_recurrence import StateUpdate, WindowBlock
from memformer_pl.models.causal_decoder import DecoderOnly


class BlockRecurrentState(NamedTuple):
    """State of a Block-Recurrent Transformer."""

    states: Float[Tensor, "B M D"]
    """The state vectors."""
    keys: Float[Tensor, "B N H W K"]
    """Keys of each layer at the last tokens, without positions, right-aligned."""
    values: Float[Tensor, "B N H W K"]
    filled: Int[Tensor, " B"]
    """Number of filled rows of keys and values."""
    last: Int[Tensor, " B"]
    """The last token, still to be read; ``ABSENT`` if there is none."""


class Entering(NamedTuple):
    """What enters the first block."""

    x: Float[Tensor, "B L D"]
    at: Positions
    exists: Bool[Tensor, "B S"]
    """Which tokens of window and segment the state vectors may see."""
    keep: list[Keep | None]


class BlockRecurrentTransformer(DecoderOnly[BlockRecurrentState]):
    """Predict each token from earlier tokens of its segment and of a window before it, and from state vectors that one
    layer updates once in each segment (section 3).

    A segment is the paper's block. In the recurrent layer, tokens attend to the state vectors as the segment before
    left them, beside their window, and the vectors attend to each other and to window and segment. So no token sees
    what a later token of its segment writes. The gradient flows through state vectors and windows over the whole
    rollout. The last token of a segment is the first input of the next one, so only the first token of a document is
    predicted without a token before it.

    The gate is the paper's fixed gate, one learned number for each channel, and the state vectors have no feed-forward
    layer ("skip"): the paper's best figures for its cost.

    Ours: the layers of this package, with rotary positions, where the public code has keys and queries of unit length
    and a learned bias for each distance; a query sees the whole window and its segment up to itself, where the paper's
    window slides; the recurrent layer is always the third from the last, or the first of fewer; no dropout on the
    state vectors.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens and of state vectors.
        heads: Attention heads; must divide ``dim`` into even widths.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        feed_forward: Another feed-forward for some layers, such as :class:`~memformer_pl.layers.UltraMemory`:
            ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``, with layers counted from 0.
        layers: Number of blocks.
        states: Number of state vectors.
        window: Number of earlier tokens that all layers see; may be 0.
        segment_length: The most tokens that a segment may hold.
        dropout: On the output of each branch of a layer, and on embeddings.
    """

    unread = ("last",)

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        ffn_dim: int | None = None,
        feed_forward: dict[str, Any] | None = None,
        layers: int = 12,
        states: int = 64,
        window: int = 64,
        segment_length: int = 64,
        dropout: float = 0.1,
    ) -> None:
        block = BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout, feed_forward=feed_forward)
        super().__init__(vocab_size=vocab_size, segment_length=segment_length, layers=layers, block=block)
        require_sizes(most=LARGEST_WIDTH, states=states)
        require_sizes(least=0, most=LARGEST_WIDTH, window=window)
        self.states, self.window = states, window
        self.recurrent = max(layers - 3, 0)
        self.rotary = RotaryPositions(width=dim // heads, first=-1 - window, last=segment_length)
        self.blocks = nn.ModuleList(
            WindowBlock(each, reads_states=each.layer == self.recurrent) for each in block.of_layers(layers)
        )
        self.update = StateUpdate(dim=dim, heads=heads, states=states)
        init_weights(self.blocks)
        init_weights(self.update)
        self.update.shrink()

    def initial_state(self, lanes: int) -> BlockRecurrentState:
        """The learned state vectors, an empty window, and no token before the first."""
        start, width = self.embedding.start, self.dim // self.heads
        nothing = start.new_zeros(lanes, self.layers, self.heads, self.window, width)
        filled = start.new_zeros(lanes, dtype=torch.int64)
        states = self.update.initial.expand(lanes, -1, -1)
        return BlockRecurrentState(states, nothing, nothing, filled, torch.full_like(filled, ABSENT))

    def regions(self) -> Sequence[nn.Module]:
        """The blocks, and the update of the state vectors."""
        return [*self.blocks, self.update]

    def step(self, segment: Segment, state: BlockRecurrentState) -> tuple[SegmentOutput, BlockRecurrentState]:
        """Predict the segment, and update the state vectors."""
        entering = self._embed(segment, state)
        x, new, states = self._run_blocks(entering, state, blocks=self.layers)
        return self.embedding.output(x, segment), self._next_state(segment, state, states, new)

    def advance_step(self, segment: Segment, state: BlockRecurrentState) -> BlockRecurrentState:
        """The next state: all blocks, the last one only for its keys and values."""
        entering = self._embed(segment, state)
        x, new, states = self._run_blocks(entering, state, blocks=self.layers - 1)
        last = self._block(-1)
        new.append(last.keys_values(x))
        if last.reads_states:
            identified, states_kv = self._identified(state)
            states = self._update(state, identified, states_kv, new[-1], entering)
        return self._next_state(segment, state, states, new)

    def prefix(self, state: BlockRecurrentState, lanes: int) -> tuple[Float[Tensor, "B 1 D"], KVCache]:
        """The last token, or START, and a cache with the window, and with the state vectors as its source."""
        cache = self.empty_cache(lanes, prefix=self.window)
        rotation = self.rotary.span(-1 - self.window, -1)
        for n in range(self.layers):
            cache.keys[:, n, :, : self.window] = rotation.turn_heads(state.keys[:, n])
        cache.values[:, :, :, : self.window] = state.values
        cache.usable[:, : self.window] = filled_part(state.filled, rows=self.window)
        source = (field[:, None].expand(-1, self.layers, -1, -1, -1) for field in self._identified(state)[1])
        usable = cache.usable.new_ones(lanes, self.states)
        keys, values = (field.to(cache.keys.dtype) for field in source)
        cache = cache._replace(source_keys=keys, source_values=values, source_usable=usable)
        x = self.embedding(self.no_tokens(lanes), state.last)
        return x, cache._replace(filled=cache.filled + self.window)

    def decode_block(
        self, block: nn.Module, x: Float[Tensor, "B T D"], at: Positions, cache: LayerKVCache
    ) -> Float[Tensor, "B T D"]:
        """Run a block on the next tokens."""
        assert isinstance(block, WindowBlock)
        return block.decode(x, at, cache)

    def _block(self, n: int) -> WindowBlock:
        block = self.blocks[n]
        assert isinstance(block, WindowBlock)
        return block

    def _identified(self, state: BlockRecurrentState) -> tuple[Float[Tensor, "B M D"], SourceKeysValues]:
        """The state vectors as they are read, and their keys and values."""
        identified = self.update.identified(state.states)
        return identified, self._block(self.recurrent).state_attention.keys_values(identified)

    def _embed(self, segment: Segment, state: BlockRecurrentState) -> Entering:
        x = self.embedding(segment.tokens[:, :-1], state.last)
        first, *keep = self.keep(self.seeds(segment), x, part=0, blocks=self.blocks)
        window = filled_part(state.filled, rows=self.window)
        visible = as_bias(cached_and_causal(window, length=x.shape[1]), x)
        at = Positions(visible, self.rotary.span(-1 - self.window, x.shape[1] - 1))
        # a softmax over nothing is NaN: lanes without tokens, whose states are kept, see one all the same
        tokens = F.pad(segment.token_mask[:, 1:], (1, 0), value=True)
        return Entering(drop(x, first), at, torch.cat((window, tokens), dim=1), keep)

    def _run_blocks(
        self, entering: Entering, state: BlockRecurrentState, *, blocks: int
    ) -> tuple[Float[Tensor, "B L D"], list[KeysValues], Float[Tensor, "B M D"]]:
        """What leaves the first ``blocks``, their new keys and values, and the state vectors, updated if the recurrent
        block is among them."""
        x, new, states = entering.x, [], state.states
        windows = zip(state.keys.unbind(1), state.values.unbind(1), strict=True)
        for n, (block, window, kept) in enumerate(zip(self.blocks[:blocks], windows, entering.keep, strict=False)):
            if n != self.recurrent:
                x, keys_values = block(x, entering.at, window, keep=kept)
            else:
                identified, states_kv = self._identified(state)
                x, keys_values = block(x, entering.at, window, states_kv, keep=kept)
                states = self._update(state, identified, states_kv, keys_values, entering)
            new.append(keys_values)
        return x, new, states

    def _update(
        self,
        state: BlockRecurrentState,
        identified: Float[Tensor, "B M D"],
        states_kv: SourceKeysValues,
        new: KeysValues,
        entering: Entering,
    ) -> Float[Tensor, "B M D"]:
        """The next state vectors, given the keys and values of the segment in the recurrent block."""
        tokens = with_before((state.keys[:, self.recurrent], state.values[:, self.recurrent]), new)
        states: Tensor = self.update(state.states, identified, states_kv, tokens, entering.exists)
        return states

    def _next_state(
        self, segment: Segment, state: BlockRecurrentState, states: Float[Tensor, "B M D"], new: list[KeysValues]
    ) -> BlockRecurrentState:
        arrived = segment.token_mask.sum(1)
        keys, values = (torch.stack(fields, dim=1) for fields in zip(*new, strict=True))
        return BlockRecurrentState(
            states,
            push_with_graph(state.keys, keys, arrived),
            push_with_graph(state.values, values, arrived),
            (state.filled + arrived).clamp(max=self.window),
            segment.last_token,
        )
