"""What the models have in common when a segment is read token by token: one causal stack that keeps keys and values.

B  lanes     T  tokens of a piece     S  rows that are kept     D  width     V  vocabulary
"""

from abc import abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from memformer_pl.layers import (
    DecoderBlock,
    CachePositions,
    RelativeBlock,
    RotaryPositions,
    Rotation,
    KVCache,
    TransformerBlock,
    TokenEmbedding,
    empty_kv_cache,
)
from memformer_pl.gradients.rng import draw_seed
from memformer_pl.contract import DecodingCache, S, SegmentModel


class CausalDecoder(SegmentModel[S]):
    """A model that predicts by a causal stack, between the two ends of a ``table``. It implements :meth:`front`."""

    dim: int
    heads: int
    dropout: float
    table: TokenEmbedding
    stack: nn.ModuleList

    @abstractmethod
    def front(self, state: S, lanes: int) -> tuple[Float[Tensor, "B T D"], KVCache]:
        """What enters the first layer before the first token, and a draft that holds what all tokens see besides."""

    @torch.no_grad()
    def begin(self, state: S, lanes: int) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Look at what stands in front of the segment."""
        x, rows = self.front(state, lanes)
        return self._read_on(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), rows)

    @torch.no_grad()
    def extend(
        self, tokens: Int[Tensor, "B T"], present: Bool[Tensor, "B T"], draft: DecodingCache
    ) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Read on, by what is kept of the tokens before."""
        return self._read_on(self.vectors(tokens), present, KVCache(*draft))

    def predicting(self) -> nn.ModuleList:
        """The layers that predict."""
        return self.stack

    def vectors(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """What enters the first layer at tokens."""
        return self.table.vectors(tokens)

    def logits(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B V"]:
        """What the last layer says about the next token."""
        return self.table.logits(x)

    def rotation(self, positions: Int[Tensor, "B T"]) -> Rotation | None:
        """Of tokens, counted from the first one of the segment; None where layers go by distance."""
        assert isinstance(self.positions, RotaryPositions)
        turned: Rotation = self.positions(positions)
        return turned

    def empty_kv_cache(self, lanes: int, *, front: int = 0) -> KVCache:
        """A draft with room for a segment and for ``front`` rows before it."""
        layers, width = len(self.predicting()), self.dim // self.heads
        example = next(self.parameters())
        return empty_kv_cache(
            example, lanes=lanes, layers=layers, heads=self.heads, width=width, front=front, room=self.segment_length
        )

    def nothing_read(self, lanes: int) -> Int[Tensor, "B 0"]:
        """No token yet."""
        return torch.empty(lanes, 0, dtype=torch.int64, device=next(self.parameters()).device)

    def _seed(self) -> int | None:
        # What only a reading needs draws from a stream of its own, so that it can be left out where states count alone.
        return draw_seed() if self.training and self.dropout > 0 else None

    def _read_on(
        self, x: Float[Tensor, "B T D"], present: Bool[Tensor, "B T"], draft: KVCache
    ) -> tuple[Float[Tensor, "B V"], KVCache]:
        front = draft.there.shape[1] - 1 - self.segment_length
        rows, visible = draft.places(x.shape[1], front=front)
        at = CachePositions(rows, visible, draft.source_there[:, None, None], self.rotation(rows - front - 1))
        for n, layer in enumerate(self.predicting()):
            assert isinstance(layer, TransformerBlock | DecoderBlock | RelativeBlock)
            x = layer.extend(x, draft.layer(n), at)
        arrived = present.sum(1)
        last_BD = x.take_along_dim((arrived - 1).clamp(min=0)[:, None, None], dim=1)[:, 0]
        return self.logits(last_BD), draft._replace(filled=draft.filled + arrived)
