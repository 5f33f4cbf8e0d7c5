"""Multi-head attention: to the same tokens, to encoded tokens, or to slots."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.errors import UsageError
from memformer_pl.layers.probe import Probe
from memformer_pl.layers.rotary import Rotation

KeysValues = tuple[Float[Tensor, "B H S K"], Float[Tensor, "B H S K"]]
"""Keys and values of the positions that a query attends to."""
SourceKeysValues = tuple[Float[Tensor, "B H F K"], Float[Tensor, "B H F K"]]
"""Keys and values of a second source, such as slots or an encoded segment."""


class Positions(NamedTuple):
    """Positions and attention masks of the tokens that enter a block."""

    visible: Bool[Tensor, "#B 1 #L S"]
    """Which of the tokens, or of the cached positions, each token attends to."""
    rotation: Rotation | None = None
    """Rotation of each token; None for blocks with relative positions."""
    source_visible: Bool[Tensor, "B 1 1 F"] | None = None
    """Which positions of a second source, such as slots or an encoded segment, may be seen; by default all."""
    source_rotation: Rotation | None = None
    """Rotation of that source; None if it has no order."""

    def rows(self, rows: slice) -> "Positions":
        """The positions and masks of a part of the tokens."""
        rotation = None if self.rotation is None else self.rotation.rows(rows)
        return self._replace(visible=self.visible[:, :, rows], rotation=rotation)


class Attention(nn.Module):
    """Multi-head attention from queries to a source of ``S`` positions: tokens or slots.

    Keys and values are computed separately, so that they can be cached or reused for several groups of queries.

    The probe ``weights`` shows ``[B, H, L, S]``; the weights are computed only if it is watched.

    Args:
        dim: Width of queries and source.
        heads: Must divide ``dim``.
    """

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise UsageError(f"heads must divide dim, got {heads=} and {dim=}")
        self.heads = heads
        self.to_query = nn.Linear(dim, dim, bias=False)
        self.to_key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.weights = Probe()

    def keys_values(self, source: Float[Tensor, "B S D"], rotation: Rotation | None = None) -> KeysValues:
        """Keys and values of a source.

        Args:
            source: Tokens or slots; for self-attention the tokens that ask.
            rotation: Rotations of the source; by default none, for a source without order.
        """
        key_BHSK, value_BHSK = rearrange(self.to_key_value(source), "B S (two H K) -> two B H S K", two=2, H=self.heads)
        return key_BHSK if rotation is None else rotation.turn(key_BHSK), value_BHSK

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        keys_values: KeysValues,
        *,
        visible: Bool[Tensor, "#B 1 #L S"] | None = None,
        rotation: Rotation | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Attend to a source.

        Args:
            x: The tokens that ask.
            keys_values: Keys and values of the source.
            visible: Which positions each query may see, at least one; by default all.
            rotation: Rotations of the queries.
        """
        key_BHSK, value_BHSK = keys_values
        query_BHLK = rearrange(self.to_query(x), "B L (H K) -> B H L K", H=self.heads)
        query_BHLK = query_BHLK if rotation is None else rotation.turn(query_BHLK)
        if self.weights.watched:
            self.weights(attention_weights(query_BHLK, key_BHSK, visible))
        mixed_BHLK = F.scaled_dot_product_attention(query_BHLK, key_BHSK, value_BHSK, attn_mask=visible)
        out: Tensor = self.to_out(rearrange(mixed_BHLK, "B H L K -> B L (H K)"))
        return out


def attention_weights(
    query_BHLK: Float[Tensor, "B H L K"],
    key_BHSK: Float[Tensor, "B H S K"],
    visible: Bool[Tensor, "#B 1 #L S"] | None,
) -> Float[Tensor, "B H L S"]:
    """The weights of scaled dot-product attention."""
    score_BHLS = torch.einsum("BHLK,BHSK->BHLS", query_BHLK, key_BHSK) * query_BHLK.shape[-1] ** -0.5
    if visible is not None:
        score_BHLS = score_BHLS.masked_fill(~visible, -torch.inf)
    weights_BHLS: Tensor = score_BHLS.softmax(dim=-1)
    return weights_BHLS
