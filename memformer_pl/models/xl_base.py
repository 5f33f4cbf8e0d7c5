"""What the models with an XL cache share: causal blocks with relative positions; the next state does not need the last.

B  lanes     L  tokens in a segment     M  cached tokens     N  layers     D  width
"""

from abc import abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl.contract import ABSENT, S, Segment, SegmentOutput
from memformer_pl.errors import LARGEST_WIDTH, require_sizes
from memformer_pl.gradients.rng import own_stream
from memformer_pl.layers import (
    BlockConfig,
    KVCache,
    Positions,
    RelativeBlock,
    Rotation,
    projected_distances,
    relative_blocks,
)
from memformer_pl.models.causal_decoder import DecoderOnly


class LastBlockInput(NamedTuple):
    """What enters the last block, and what it sees."""

    x: Float[Tensor, "B L D"]
    xl_cache: Float[Tensor, "B M D"]
    at: Positions


class XLCache(NamedTuple):
    """What the blocks read of a state."""

    last: Int[Tensor, " B"]
    hidden: Float[Tensor, "B N M D"]
    """What entered each block at the cached tokens."""
    exists: Bool[Tensor, "B M"]


class XLTransformer(DecoderOnly[S]):
    """A causal Transformer that reads on from an XL cache, and from the last token of the segment before.

    What it carries has no graph, so every method gives the same gradient, and ``truncated`` is the cheapest.

    Args:
        lower: The kind of the blocks below the last.

    The other arguments are those of the models.
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
        """What the blocks read of the state."""

    def step(self, segment: Segment, state: S) -> tuple[SegmentOutput, S]:
        """Predict the segment from the cache and what came before in it."""
        entering, next_state = self.run_lower_blocks(segment, state)
        return self.predict(segment, entering), next_state

    def advance_step(self, segment: Segment, state: S) -> S:
        """The next state: all blocks but the last."""
        next_state = self.run_lower_blocks(segment, state)[1]
        self.output_seed()
        return next_state

    def predict(self, segment: Segment, entering: LastBlockInput) -> SegmentOutput:
        """Run the last block, and predict."""
        with own_stream(self.output_seed(), entering.x):
            x = self.blocks[-1](entering.x, entering.at, entering.xl_cache)
            return self.embedding.output(x, segment)

    def prefix(self, state: S, lanes: int) -> tuple[Float[Tensor, "B 1 D"], KVCache]:
        """The last token, and a KV cache with the XL cache as each block reads it."""
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

    def first(self, last: Int[Tensor, " B"]) -> Float[Tensor, "B 1 D"]:
        """What enters the first block before the first token."""
        x: Tensor = self.embedding(self.no_tokens(len(last)), last)
        return x

    def rotation(self, positions: Int[Tensor, "B T"]) -> Rotation | None:
        """None: blocks go by distance."""
        return None

    def block_inputs(
        self, x: Float[Tensor, "B L D"], hidden: Float[Tensor, "B N M D"], at: Positions
    ) -> Float[Tensor, "B N L D"]:
        """What enters each block, from what enters the first and what entered each at the cached tokens."""
        xs = [x]
        for block, hidden_BMD in zip(self.blocks[:-1], hidden.unbind(1)[:-1], strict=True):
            xs.append(block(xs[-1], at, hidden_BMD))
        return torch.stack(xs, dim=1)

    def last_token(self, segment: Segment) -> Int[Tensor, " B"]:
        """The last token of each lane, which the next segment reads first; ``ABSENT`` for a model without a cache."""
        if not self.memory_length:
            return self.filled_with(ABSENT, lanes=len(segment.tokens))
        last = segment.token_mask.sum(1, keepdim=True) - 1
        return segment.tokens.gather(1, last.clamp(min=0))[:, 0]

    def zeros(self, *shape: int) -> Float[Tensor, "..."]:
        """An empty cache of some shape."""
        return torch.zeros(shape, dtype=self.embedding.start.dtype, device=self.embedding.start.device)

    def filled_with(self, value: int, *, lanes: int) -> Int[Tensor, " B"]:
        """The same number for each lane."""
        return torch.full((lanes,), value, device=self.embedding.start.device)
