"""Base class of the models with an XL cache: causal blocks with relative positions, of which the last does not lead to
the next state.

B  lanes     L  tokens in a segment     M  cached tokens     N  layers     D  width
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl.contract import ABSENT, S, Segment, SegmentOutput
from memformer_pl.errors import LARGEST_WIDTH, require_sizes
from memformer_pl.layers import (
    BlockConfig,
    Keep,
    KVCache,
    Positions,
    RelativeBlock,
    Rotation,
    cached_and_causal,
    distances_to_keys,
    projected_distances,
    relative_blocks,
)
from memformer_pl.models.causal_decoder import DecoderOnly


class LastBlockInput(NamedTuple):
    """Inputs of the last block."""

    x: Float[Tensor, "B L D"]
    xl_cache: Float[Tensor, "B M D"]
    at: Positions
    keep: Keep | None


class XLCache(NamedTuple):
    """The part of a state that blocks read."""

    last: Int[Tensor, " B"]
    hidden: Float[Tensor, "B N M D"]
    """Inputs of each block at the cached tokens."""
    exists: Bool[Tensor, "B M"]


class XLTransformer(DecoderOnly[S]):
    """A causal Transformer that continues from an XL cache and from the last token of the previous segment.

    The state has no graph, so every gradient method gives the same gradient, and ``truncated`` is the cheapest.

    Args:
        vocab_size: Size of the vocabulary.
        segment_length: The most tokens that a segment may hold.
        layers: Number of blocks.
        memory_length: Number of cached tokens.
        block: Configuration of all blocks.
        lower: Class of the blocks below the last.
    """

    unread = ("last",)

    def __init__(
        self,
        *,
        vocab_size: int,
        segment_length: int,
        layers: int,
        memory_length: int,
        block: BlockConfig,
        lower: type[RelativeBlock] = RelativeBlock,
    ) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length, layers=layers, block=block)
        require_sizes(least=0, most=LARGEST_WIDTH, memory_length=memory_length)
        self.memory_length = memory_length
        self.blocks = relative_blocks(block, layers=layers, lower=lower)

    @abstractmethod
    def run_lower_blocks(self, segment: Segment, state: S) -> tuple[LastBlockInput, S]:
        """Run all blocks but the last. No gradient flows into the state or out of the next one."""

    @abstractmethod
    def xl_cache(self, state: S) -> XLCache:
        """The cache that blocks read."""

    def step(self, segment: Segment, state: S) -> tuple[SegmentOutput, S]:
        """Predict the segment from the cache and earlier tokens."""
        entering, next_state = self.run_lower_blocks(segment, state)
        return self.predict(segment, entering), next_state

    def advance_step(self, segment: Segment, state: S) -> S:
        """The next state: all blocks but the last."""
        return self.run_lower_blocks(segment, state)[1]

    def predict(self, segment: Segment, entering: LastBlockInput) -> SegmentOutput:
        """Run the last block, and predict."""
        x = self.blocks[-1](entering.x, entering.at, entering.xl_cache, keep=entering.keep)
        return self.embedding.output(x, segment)

    def prefix(self, state: S, lanes: int) -> tuple[Float[Tensor, "B 1 D"], KVCache]:
        """The last token, and a KV cache with the keys and values of the XL cache."""
        last, hidden_BNMD, exists = self.xl_cache(state)
        count = hidden_BNMD.shape[2]
        cache = self.empty_cache(lanes, prefix=count)
        for n, block in enumerate(self.blocks):
            assert isinstance(block, RelativeBlock)
            keys_values = block.self_attention.keys_values(block.self_norm(hidden_BNMD[:, n]))
            cache.keys[:, n, :, :count], cache.values[:, n, :, :count] = keys_values
        cache.usable[:, :count] = exists
        distances = projected_distances(self.blocks, positions=cache.usable.shape[1])
        return self.first(last), cache._replace(filled=cache.filled + count, distances=distances)

    def positions(self, exists: Bool[Tensor, "B M"], *, length: int) -> Positions:
        """Mask and distances of the tokens of a segment, and of an XL cache before them, for all blocks.

        Args:
            exists: Which rows of the cache are filled.
            length: Number of tokens.
        """
        keys = exists.shape[1] + length
        return Positions(
            cached_and_causal(exists, length=length), distances=distances_to_keys(keys, like=self.embedding.start)
        )

    def first(self, last: Int[Tensor, " B"]) -> Float[Tensor, "B 1 D"]:
        """Inputs of the first block before the first token."""
        x: Tensor = self.embedding(self.no_tokens(len(last)), last)
        return x

    def rotation(self, positions: Int[Tensor, "B T"]) -> Rotation | None:
        """None: positions are relative."""
        return None

    def block_inputs(
        self,
        x: Float[Tensor, "B L D"],
        hidden: Float[Tensor, "B N M D"],
        at: Positions,
        keep: Sequence[Float[Tensor, "_ B L D"] | None],
    ) -> Float[Tensor, "B N L D"]:
        """Inputs of each block, given those of the first, the cached inputs of each, and the factors of dropout."""
        xs = [x]
        lower = zip(self.blocks[:-1], hidden.unbind(1)[:-1], keep[:-1], strict=True)
        for block, hidden_BMD, kept in lower:
            xs.append(block(xs[-1], at, hidden_BMD, keep=kept))
        return torch.stack(xs, dim=1)

    def last_token(self, segment: Segment) -> Int[Tensor, " B"]:
        """The last token of each lane, which the next segment reads first; ``ABSENT`` for a model without a cache."""
        if not self.memory_length:
            return self.filled_with(ABSENT, lanes=len(segment.tokens))
        return segment.last_token

    def zeros(self, *shape: int) -> Float[Tensor, "..."]:
        """Zeros of the dtype and on the device of the weights."""
        return torch.zeros(shape, dtype=self.embedding.start.dtype, device=self.embedding.start.device)

    def filled_with(self, value: int, *, lanes: int) -> Int[Tensor, " B"]:
        """One number for each lane."""
        return torch.full((lanes,), value, device=self.embedding.start.device)
