"""The KV cache: keys and values of the tokens of an unfinished segment, so that each token passes the layers only once.

B  lanes     T  tokens of a piece     N  layers     H  heads     K  width of a head
S  cached positions: the prefix in front of the segment, its first input, its tokens, and one to spare
F  positions of a second source: slots, or encoded tokens
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl.layers.attention import KeysValues, SourceKeysValues


class LayerKVCache(NamedTuple):
    """The cache of one layer, while a piece is decoded."""

    positions: Int[Tensor, "B T"]
    """The position at which each token of the piece is cached."""
    keys: Float[Tensor, "B H S K"]
    values: Float[Tensor, "B H S K"]
    source: SourceKeysValues
    distances: Float[Tensor, "H S K"]

    def append(self, keys: Float[Tensor, "B H T K"], values: Float[Tensor, "B H T K"]) -> KeysValues:
        """Write the keys and values of the piece, in place; return those of all positions."""
        index = rearrange(self.positions, "B T -> B 1 T 1").expand_as(keys)
        self.keys.scatter_(2, index, keys.to(self.keys.dtype))
        self.values.scatter_(2, index, values.to(self.values.dtype))
        return self.keys, self.values


class KVCache(NamedTuple):
    """Keys and values of each layer of a causal stack, and the number of filled positions of each lane."""

    filled: Int[Tensor, " B"]
    """Number of filled positions, which are the first."""
    usable: Bool[Tensor, "B S"]
    """Positions that may be seen once they are filled; False for empty positions of a prefix."""
    keys: Float[Tensor, "B N H S K"]
    values: Float[Tensor, "B N H S K"]
    source_usable: Bool[Tensor, "B F"]
    source_keys: Float[Tensor, "B N H F K"]
    source_values: Float[Tensor, "B N H F K"]
    distances: Float[Tensor, "1 N H S K"]
    """Projected distances from 0 on; empty for rotary layers."""

    def with_source(
        self, keys_values: Iterable[SourceKeysValues], usable: Bool[Tensor, "B F"] | None = None
    ) -> "KVCache":
        """This cache with the keys and values of a second source, layer by layer; by default all of it is usable."""
        keys, values = (torch.stack(fields, dim=1).to(self.keys.dtype) for fields in zip(*keys_values, strict=True))
        everything = keys.new_ones(len(keys), keys.shape[3], dtype=torch.bool)
        return self._replace(
            source_keys=keys, source_values=values, source_usable=everything if usable is None else usable
        )

    def layer(self, n: int, positions: Int[Tensor, "B T"]) -> LayerKVCache:
        """The cache of layer ``n``, a view, for a piece whose tokens go to ``positions``."""
        source = self.source_keys[:, n], self.source_values[:, n]
        return LayerKVCache(positions, self.keys[:, n], self.values[:, n], source, self.distances[0, n])

    def next_positions(self, count: int, *, prefix: int) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B 1 T S"]]:
        """Positions of the next ``count`` tokens, and their mask: the prefix, and positions up to their own.

        Absent tokens at the right of a lane go to positions that later tokens overwrite.
        """
        spare = self.usable.shape[1] - 1
        positions = (self.filled[:, None] + torch.arange(count, device=self.filled.device)).clamp(max=spare)
        up_to = rearrange(positions.clamp(min=prefix - 1), "B T -> B T 1")
        visible = rearrange(self.usable, "B S -> B 1 S") & (torch.arange(spare + 1, device=positions.device) <= up_to)
        return positions, visible[:, None]


def at_last(x: Float[Tensor, "B T D"], arrived: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
    """The vector at the last token of each lane, of which ``arrived`` exist; at the first if there is none."""
    return x.take_along_dim((arrived - 1).clamp(min=0)[:, None, None], dim=1)[:, 0]


def empty_kv_cache(
    example: Tensor, *, lanes: int, layers: int, heads: int, width: int, prefix: int, room: int
) -> KVCache:
    """A cache without filled positions.

    Args:
        example: A tensor of the dtype and on the device of the keys.
        lanes: Number of lanes.
        layers: Number of layers.
        heads: Heads of each layer.
        width: Width of a head.
        prefix: Positions in front of the segment.
        room: Positions for the segment.
    """
    length = prefix + room + 1
    filled = torch.zeros(lanes, dtype=torch.int64, device=example.device)
    usable = torch.ones(lanes, length, dtype=torch.bool, device=example.device)
    keys, values = (example.new_zeros(lanes, layers, heads, length, width) for _ in range(2))
    nothing = keys[..., :0, :]
    return KVCache(filled, usable, keys, values, usable[:, :0], nothing, nothing, nothing[:1])
