"""Base classes of models that predict by a causal stack of blocks: sizes, and inference with a KV cache.

B  lanes     T  tokens of a piece     S  cached positions     D  width     V  vocabulary
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from memformer_pl.contract import DecodingCache, S, Segment, SegmentModel
from memformer_pl.errors import LARGEST, require_sizes
from memformer_pl.layers import (
    BlockConfig,
    Keep,
    KVCache,
    LayerKVCache,
    Positions,
    RotaryPositions,
    Rotation,
    TokenEmbedding,
    at_last,
    draw_keep,
    draw_seeds,
    empty_kv_cache,
)


class CausalDecoder(SegmentModel[S]):
    """A model that predicts by a causal stack of blocks. A subclass implements :meth:`prefix` and both ends.

    Args:
        vocab_size: Size of the vocabulary.
        segment_length: The most tokens that a segment may hold.
        block: Configuration of all blocks.
    """

    rotary: RotaryPositions
    causal_prefix = False
    """Whether what precedes the segment is causal, too; by default each position of it sees all of it."""

    def __init__(self, *, vocab_size: int, segment_length: int, block: BlockConfig) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        self.dim, self.heads, self.ffn_dim, self.dropout = block.dim, block.heads, block.hidden, block.dropout
        self.feed_forward, self.has_weight_losses = block.feed_forward, block.feed_forward is not None

    @abstractmethod
    def prefix(self, state: S, lanes: int) -> tuple[Float[Tensor, "B T D"], KVCache]:
        """Inputs of the first block before the first token, and a cache with whatever precedes the segment."""

    @abstractmethod
    def predicting_blocks(self) -> nn.ModuleList:
        """The blocks that predict."""

    def regions(self) -> Sequence[nn.Module]:
        """The blocks that predict."""
        return list(self.predicting_blocks())

    @abstractmethod
    def vectors(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Inputs of the first block at tokens."""

    @abstractmethod
    def logits(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B V"]:
        """Logits of the next token, from the output of the last block."""

    @torch.no_grad()
    def prefill(self, state: S, lanes: int) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Run the prefix of a segment."""
        x, cache = self.prefix(state, lanes)
        return self._run(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), cache)

    @torch.no_grad()
    def decode(
        self, tokens: Int[Tensor, "B T"], token_mask: Bool[Tensor, "B T"], cache: DecodingCache
    ) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Run the next tokens of a segment, which attend to the cached ones."""
        return self._run(self.vectors(tokens), token_mask, KVCache(*cache))

    def decode_block(
        self, block: nn.Module, x: Float[Tensor, "B T D"], at: Positions, cache: LayerKVCache
    ) -> Float[Tensor, "B T D"]:
        """Run a block on the next tokens; by default, call it with its cache."""
        out: Tensor = block(x, at, cache=cache)
        return out

    def rotation(self, positions: Int[Tensor, "B T"]) -> Rotation | None:
        """Rotation at positions, counted from the first token of the segment; None for relative positions."""
        rotation: Rotation = self.rotary(positions)
        return rotation

    def empty_cache(self, lanes: int, *, prefix: int = 0) -> KVCache:
        """A cache with room for a segment and for ``prefix`` positions before it."""
        layers, width = len(self.predicting_blocks()), self.dim // self.heads
        example = next(self.parameters())
        return empty_kv_cache(
            example, lanes=lanes, layers=layers, heads=self.heads, width=width, prefix=prefix, room=self.segment_length
        )

    def no_tokens(self, lanes: int) -> Int[Tensor, "B 0"]:
        """A segment without a token."""
        return torch.empty(lanes, 0, dtype=torch.int64, device=next(self.parameters()).device)

    def seeds(self, segment: Segment) -> Int[Tensor, " S"] | None:
        """The seeds of a step's dropout; None if it drops nothing. Call it once, at the beginning of the step."""
        return draw_seeds(segment, rate=self.dropout, training=self.training)

    def keep(
        self,
        seeds: Int[Tensor, " S"] | None,
        like: Float[Tensor, "B L D"],
        *,
        part: int,
        blocks: Iterable[nn.Module] = (),
        embedded: bool = True,
    ) -> list[Keep | None]:
        """Factors of dropout on embedded tokens, if there are any, and on the branches of each block.

        Args:
            seeds: From :meth:`seeds`.
            like: A tensor of the shape of all of them.
            part: Number of this part of the step, which draws numbers of its own.
            blocks: The blocks.
            embedded: Whether the tokens are embedded in this part.
        """
        branches = [*([1] if embedded else []), *(int(block.branches) for block in blocks)]  # type: ignore[arg-type]
        return draw_keep(seeds, like, rate=self.dropout, part=part, branches=branches)

    def _run(
        self, x: Float[Tensor, "B T D"], token_mask: Bool[Tensor, "B T"], cache: KVCache
    ) -> tuple[Float[Tensor, "B V"], KVCache]:
        prefix = cache.usable.shape[1] - 1 - self.segment_length
        positions, visible = cache.next_positions(x.shape[1], prefix=0 if self.causal_prefix else prefix)
        at = Positions(visible, self.rotation(positions - prefix - 1), cache.source_usable[:, None, None])
        for n, block in enumerate(self.predicting_blocks()):
            x = self.decode_block(block, x, at, cache.layer(n, positions))
        arrived = token_mask.sum(1)
        return self.logits(at_last(x, arrived)), cache._replace(filled=cache.filled + arrived)


class DecoderOnly(CausalDecoder[S]):
    """A causal decoder with one :class:`TokenEmbedding` at both ends. A subclass builds ``blocks``.

    Takes the arguments of :class:`CausalDecoder`, and ``layers``, the number of blocks.
    """

    blocks: nn.ModuleList

    def __init__(self, *, vocab_size: int, segment_length: int, layers: int, block: BlockConfig) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length, block=block)
        require_sizes(most=LARGEST, layers=layers)
        self.layers = layers
        self.embedding = TokenEmbedding(vocab_size=vocab_size, dim=block.dim)

    def predicting_blocks(self) -> nn.ModuleList:
        """All blocks."""
        return self.blocks

    def vectors(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """The token embeddings."""
        return self.embedding.vectors(tokens)

    def logits(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B V"]:
        """Logits by the table of token embeddings."""
        return self.embedding.logits(x)
