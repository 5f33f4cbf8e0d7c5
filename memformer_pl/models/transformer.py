"""A causal Transformer that reads each segment separately: the baseline without memory.

B  lanes     L  tokens in a segment     D  width
"""

from abc import abstractmethod
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from memformer_pl.contract import Segment, SegmentOutput
from memformer_pl.errors import UsageError, require_sizes
from memformer_pl.layers import (
    BlockConfig,
    Keep,
    KVCache,
    Positions,
    RotaryPositions,
    Rotation,
    causal_blocks,
    causal_mask,
    distances_to_keys,
    drop,
    projected_distances,
    relative_blocks,
)
from memformer_pl.layers.blockwise import chunks, forward_by_chunks
from memformer_pl.models.causal_decoder import DecoderOnly


class StatelessModel(DecoderOnly[tuple[()]]):
    """A model that reads each segment separately. A subclass implements :meth:`predict`."""

    @abstractmethod
    def predict(self, segment: Segment) -> SegmentOutput:
        """Predict a segment."""

    def initial_state(self, lanes: int) -> tuple[()]:
        """The empty state."""
        return ()

    def step(self, segment: Segment, state: tuple[()]) -> tuple[SegmentOutput, tuple[()]]:
        """Predict a segment; the state stays empty."""
        return self.predict(segment), state

    def advance_step(self, segment: Segment, state: tuple[()]) -> tuple[()]:
        """The empty state; draws the seed that :meth:`step` draws."""
        self.seeds(segment)
        return state


class Transformer(StatelessModel):
    """Predict each token from START and earlier tokens of its segment; carry no state.

    Pre-norm layers, and one table for input and output, as in this package's Memformer.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens.
        heads: Attention heads; must divide ``dim`` into even widths.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        feed_forward: Another feed-forward for some layers, such as :class:`~memformer_pl.layers.UltraMemory`:
            ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``, with layers counted from 0.
        layers: Number of blocks.
        positions: ``rotary``, or ``relative`` as in the models with an XL cache, which equal this model without it.
        segment_length: The most tokens that a segment may hold.
        chunk: Number of tokens of a long segment that are computed at once, and again in the backward pass: the same
            numbers in less memory (Liu & Abbeel 2023). By default all tokens, without recomputation.
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
        positions: Literal["rotary", "relative"] = "rotary",
        segment_length: int = 64,
        chunk: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        sizes = BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout, feed_forward=feed_forward)
        super().__init__(vocab_size=vocab_size, segment_length=segment_length, layers=layers, block=sizes)
        if positions not in ("rotary", "relative"):
            raise UsageError(f"positions must be rotary or relative, got {positions!r}")
        if chunk is not None:
            require_sizes(chunk=chunk)
        if chunk is not None and positions == "relative":
            raise UsageError(f"chunk needs positions='rotary', got {chunk=} and {positions=}")
        self.positions, self.chunk = positions, chunk
        if positions == "rotary":
            self.rotary = RotaryPositions(width=dim // heads, first=-1, last=segment_length)
            self.blocks = causal_blocks(sizes, layers=layers)
        else:
            self.blocks = relative_blocks(sizes, layers=layers)

    def predict(self, segment: Segment) -> SegmentOutput:
        """Predict a segment, in chunks if ``chunk`` is given."""
        x, seeds = self.embedding(segment.tokens[:, :-1]), self.seeds(segment)
        if self.chunk is not None:
            return self._predict_by_chunks(segment, x, seeds, self.chunk)
        keep = self.keep(seeds, x, part=0, blocks=self.blocks)
        x = drop(x, keep[0])
        if self.positions == "rotary":
            at = Positions(rotation=self.rotary.span(-1, x.shape[1] - 1), causal=True)
        else:
            distances = distances_to_keys(x.shape[1], like=self.embedding.start)
            at = Positions(causal_mask(x.shape[1], device=x.device), distances=distances)
        for block, kept in zip(self.blocks, keep[1:], strict=True):
            x = block(x, at, keep=kept)
        return self.embedding.output(x, segment)

    def _predict_by_chunks(
        self, segment: Segment, x: Float[Tensor, "B L D"], seeds: Int[Tensor, " S"] | None, chunk: int
    ) -> SegmentOutput:
        x = drop(x, self.keep(seeds, x, part=0)[0])
        rotation, parts = self.rotary.span(-1, x.shape[1] - 1), len(chunks(x.shape[1], chunk))
        for n, block in enumerate(self.blocks):

            def keep(number: int, like: Float[Tensor, "B L D"], first: int = 1 + n * parts) -> Keep | None:
                return self.keep(seeds, like, part=first + number, blocks=[self.blocks[0]], embedded=False)[0]

            x = forward_by_chunks(block, x, rotation=rotation, chunk=chunk, keep=keep)
        return self.embedding.output(x, segment, rows=chunk * len(x))

    def prefix(self, state: tuple[()], lanes: int) -> tuple[Float[Tensor, "B 1 D"], KVCache]:
        """START alone."""
        cache = self.empty_cache(lanes)
        if self.positions == "relative":
            distances = projected_distances(self.blocks, positions=cache.usable.shape[1])
            cache = cache._replace(distances=distances)
        return self.embedding(self.no_tokens(lanes)), cache

    def rotation(self, positions: Int[Tensor, "B T"]) -> Rotation | None:
        """Rotation of tokens; None if positions are relative."""
        return super().rotation(positions) if self.positions == "rotary" else None
