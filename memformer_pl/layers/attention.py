"""Multi-head attention: to the same tokens, to encoded tokens, or to slots."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.errors import UsageError
from memformer_pl.layers.rotary import Rotation
from memformer_pl.layers.kv_cache import LayerKVCache, CachePositions
from memformer_pl.layers.probe import Probe


class Attention(nn.Module):
    """What each query takes from a source of ``S`` positions: tokens or slots.

    The tap ``weights`` shows ``[B, H, L, S]``; while nobody watches it they are never computed apart.

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

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        source: Float[Tensor, "B S D"],
        *,
        visible: Bool[Tensor, "#B 1 #L S"] | None = None,
        rotations: tuple[Rotation, Rotation] | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Read from the source.

        Args:
            x: Queries.
            source: Where keys and values come from; ``x`` itself for self-attention.
            visible: What each query may see; at least one position. By default everything.
            rotations: Positions of the queries and of the source. By default the source is a set without order.
        """
        at, source_at = rotations or (None, None)
        return self.read(self.queries(x, at), *self.keys_and_values(source, source_at), visible=visible)

    def extend(self, x: Float[Tensor, "B T D"], kept: LayerKVCache, at: CachePositions) -> Float[Tensor, "B T D"]:
        """Self-attention of tokens that follow on those that are kept; these are kept too, in place."""
        kept.keep(at, *self.keys_and_values(x, at.rotation))
        return self.read(self.queries(x, at.rotation), kept.keys, kept.values, visible=at.visible)

    def look_up(
        self, x: Float[Tensor, "B T D"], kept: LayerKVCache, at: CachePositions, *, rotation: Rotation | None = None
    ) -> Float[Tensor, "B T D"]:
        """Read from the source whose keys and values are kept."""
        return self.read(self.queries(x, rotation), kept.source_keys, kept.source_values, visible=at.source_visible)

    def queries(self, x: Float[Tensor, "B L D"], rotation: Rotation | None) -> Float[Tensor, "B H L K"]:
        """What each token asks for, head by head."""
        query_BHLK = rearrange(self.to_query(x), "B L (H K) -> B H L K", H=self.heads)
        return query_BHLK if rotation is None else rotation.turn(query_BHLK)

    def keys_and_values(
        self, source: Float[Tensor, "B S D"], rotation: Rotation | None
    ) -> tuple[Float[Tensor, "B H S K"], Float[Tensor, "B H S K"]]:
        """What each position of the source is found by, and what it gives."""
        key_BHSK, value_BHSK = rearrange(self.to_key_value(source), "B S (two H K) -> two B H S K", two=2, H=self.heads)
        return key_BHSK if rotation is None else rotation.turn(key_BHSK), value_BHSK

    def read(
        self,
        query_BHLK: Float[Tensor, "B H L K"],
        key_BHSK: Float[Tensor, "B H S K"],
        value_BHSK: Float[Tensor, "B H S K"],
        *,
        visible: Bool[Tensor, "#B 1 #L S"] | None,
    ) -> Float[Tensor, "B L D"]:
        """What the heads read, side by side and projected."""
        if self.weights.watched:
            self.weights(attention_weights(query_BHLK, key_BHSK, visible))
        read_BHLK = F.scaled_dot_product_attention(query_BHLK, key_BHSK, value_BHSK, attn_mask=visible)
        out: Tensor = self.to_out(rearrange(read_BHLK, "B H L K -> B L (H K)"))
        return out


def attention_weights(
    query_BHLK: Float[Tensor, "B H L K"],
    key_BHSK: Float[Tensor, "B H S K"],
    visible: Bool[Tensor, "#B 1 #L S"] | None,
) -> Float[Tensor, "B H L S"]:
    """The softmax that scaled dot-product attention takes its mean with."""
    score_BHLS = torch.einsum("BHLK,BHSK->BHLS", query_BHLK, key_BHSK) * query_BHLK.shape[-1] ** -0.5
    if visible is not None:
        score_BHLS = score_BHLS.masked_fill(~visible, -torch.inf)
    weights_BHLS: Tensor = score_BHLS.softmax(dim=-1)
    return weights_BHLS
