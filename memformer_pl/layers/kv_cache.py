"""What layers keep of a segment that is read token by token, so that each token passes them once.

B  lanes     T  tokens of a piece     N  layers     H  heads     K  width of a head
S  rows: what stands in front of the segment, its first input, its tokens, and one to spare
F  positions of a second source: slots, or encoded tokens
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl.layers.rotary import Rotation


class CachePositions(NamedTuple):
    """Where the tokens of a piece stand, and what they may see."""

    rows: Int[Tensor, "B T"]
    """The row that each is kept in."""
    visible: Bool[Tensor, "B 1 T S"]
    source_visible: Bool[Tensor, "B 1 1 F"]
    rotation: Rotation | None
    """None where layers go by distance."""


class LayerKVCache(NamedTuple):
    """What one layer keeps."""

    keys: Float[Tensor, "B H S K"]
    values: Float[Tensor, "B H S K"]
    source_keys: Float[Tensor, "B H F K"]
    source_values: Float[Tensor, "B H F K"]
    distances: Float[Tensor, "H S K"]

    def keep(self, at: CachePositions, keys: Float[Tensor, "B H T K"], values: Float[Tensor, "B H T K"]) -> None:
        """Keep the keys and values of a piece, in place."""
        rows = rearrange(at.rows, "B T -> B 1 T 1").expand_as(keys)
        self.keys.scatter_(2, rows, keys.to(self.keys.dtype))
        self.values.scatter_(2, rows, values.to(self.values.dtype))


class KVCache(NamedTuple):
    """A draft of a causal stack: keys and values of each layer, and how many rows of each lane are filled."""

    filled: Int[Tensor, " B"]
    """Rows that hold something, from the left."""
    there: Bool[Tensor, "B S"]
    """Rows that may be seen once they are filled; in front some may be empty."""
    keys: Float[Tensor, "B N H S K"]
    values: Float[Tensor, "B N H S K"]
    source_there: Bool[Tensor, "B F"]
    source_keys: Float[Tensor, "B N H F K"]
    source_values: Float[Tensor, "B N H F K"]
    distances: Float[Tensor, "1 N H S K"]
    """Projected, from 0 on; no rows where layers go by rotation."""

    def with_source(
        self,
        keys_and_values: Iterable[tuple[Float[Tensor, "B H F K"], Float[Tensor, "B H F K"]]],
        there: Bool[Tensor, "B F"] | None = None,
    ) -> "Rows":
        """With keys and values of a second source, layer by layer, of which by default all is there."""
        keys, values = (torch.stack(fields, dim=1).to(self.keys.dtype) for fields in zip(*keys_and_values, strict=True))
        all_there = keys.new_ones(len(keys), keys.shape[3], dtype=torch.bool)
        return self._replace(source_keys=keys, source_values=values, source_there=all_there if there is None else there)

    def layer(self, n: int) -> LayerKVCache:
        """What layer ``n`` keeps; the same memory."""
        kept = (self.keys, self.values, self.source_keys, self.source_values)
        keys, values, source_keys, source_values = (field[:, n] for field in kept)
        return LayerKVCache(keys, values, source_keys, source_values, self.distances[0, n])

    def places(self, count: int, *, front: int) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B 1 T S"]]:
        """The rows of ``count`` tokens that follow on those that are filled, and the rows that these may see: those up
        to their own, and in front of the segment all ``front``.

        Where there is no token, a row is taken that is not filled.
        """
        spare = self.there.shape[1] - 1
        rows = (self.filled[:, None] + torch.arange(count, device=self.filled.device)).clamp(max=spare)
        up_to = rearrange(rows.clamp(min=front - 1), "B T -> B T 1")
        visible = rearrange(self.there, "B S -> B 1 S") & (torch.arange(spare + 1, device=rows.device) <= up_to)
        return rows, visible[:, None]


def empty_kv_cache(example: Tensor, *, lanes: int, layers: int, heads: int, width: int, front: int, room: int) -> KVCache:
    """A draft without a row filled.

    Args:
        example: A tensor of the type and on the device of the keys.
        lanes: How many.
        layers: How many.
        heads: Of each layer.
        width: Of a head.
        front: Rows in front of the segment.
        room: Rows for the segment.
    """
    rows = front + room + 1
    filled = torch.zeros(lanes, dtype=torch.int64, device=example.device)
    there = torch.ones(lanes, rows, dtype=torch.bool, device=example.device)
    keys, values = (example.new_zeros(lanes, layers, heads, rows, width) for _ in range(2))
    nothing = keys[..., :0, :]
    return KVCache(filled, there, keys, values, there[:, :0], nothing, nothing, nothing[:1])
