"""Multi-head attention: to the same tokens, to encoded tokens, or to slots."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
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

Mask = Bool[Tensor, "#B 1 #L S"] | Float[Tensor, "#B 1 #L S"]
"""True, or 0, where a query may look; False, or minus infinity, where it may not."""


class Positions(NamedTuple):
    """Positions and attention masks of the tokens that enter a block."""

    visible: Mask | None = None
    """Which of the tokens, or of the cached positions, each token attends to; by default all, or those that
    ``causal`` leaves. Without a mask, attention can use the fastest kernels."""
    rotation: Rotation | None = None
    """Rotation of each token; None for blocks with relative positions."""
    source_visible: Mask | None = None
    """Which positions of a second source, such as slots or an encoded segment, may be seen; by default all."""
    causal: bool = False
    """Whether each token attends to itself and to the tokens before it; then ``visible`` is None."""
    distances: Float[Tensor, "T D"] | None = None
    """For blocks with relative positions: :func:`~memformer_pl.layers.sinusoid` of the distances that scores need, once
    for all blocks; by default each computes it."""

    def rows(self, rows: slice) -> "Positions":
        """The positions and masks of a part of the tokens."""
        rotation = None if self.rotation is None else self.rotation.rows(rows)
        visible = None if self.visible is None else self.visible[:, :, rows]
        return self._replace(visible=visible, rotation=rotation)


class Attention(nn.Module):
    """Multi-head attention from queries to ``S`` positions. Its subclasses compute queries, keys and values.

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
        self.weights = Probe()

    def attend(
        self,
        query_BHLK: Float[Tensor, "B H L K"],
        keys_values: KeysValues,
        *,
        visible: Mask | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B L D"]:
        """The mixed values of each query, heads side by side.

        Args:
            query_BHLK: Queries.
            keys_values: Keys and values of the source.
            visible: Which positions each query may see, at least one; by default all.
            causal: Whether each query sees its own position and those before it; then ``visible`` is None.
        """
        key_BHSK, value_BHSK = keys_values
        if self.weights.watched:
            seen = causal_mask(query_BHLK.shape[2], device=query_BHLK.device) if causal else visible
            self.weights(attention_weights(query_BHLK, key_BHSK, seen))
        mixed_BHLK = F.scaled_dot_product_attention(
            query_BHLK, key_BHSK, value_BHSK, attn_mask=visible, is_causal=causal
        )
        return mixed_BHLK.transpose(1, 2).flatten(2)


class SelfAttention(Attention):
    """Attention among tokens, with one projection to queries, keys and values."""

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__(dim=dim, heads=heads)
        self.to_query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def project(
        self, x: Float[Tensor, "B L D"], rotation: Rotation | None = None
    ) -> tuple[Float[Tensor, "B H L K"], KeysValues]:
        """Queries of tokens, and their keys and values.

        Args:
            x: Tokens.
            rotation: Their rotations.
        """
        dim = x.shape[-1]
        query_key, value = torch.split(self.to_query_key_value(x), [2 * dim, dim], dim=-1)
        query_key = split_heads(query_key, heads=2 * self.heads)
        query_key = query_key if rotation is None else rotation.turn(query_key)
        parts = (*query_key.chunk(2, dim=2), split_heads(value, heads=self.heads))
        query, key, value = (part.transpose(1, 2) for part in parts)
        return query, (key, value)

    def keys_values(self, x: Float[Tensor, "B L D"]) -> KeysValues:
        """Keys and values of tokens alone, without positions."""
        return self.as_heads(self.side_by_side(x))

    def side_by_side(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L 2*D"]:
        """Keys and values of tokens, without positions, as one row for each token."""
        return F.linear(x, self.to_query_key_value.weight[x.shape[2] :])

    def as_heads(self, rows: Float[Tensor, "B L E"]) -> KeysValues:
        """The keys and values in such rows."""
        keys, values = split_heads(rows, heads=2 * self.heads).transpose(1, 2).chunk(2, dim=1)
        return keys, values

    def forward(self, query_BHLK: Float[Tensor, "B H L K"], keys_values: KeysValues, at: Positions) -> Tensor:
        """The update ``[B, L, D]`` of the tokens that ask.

        Args:
            query_BHLK: Their queries.
            keys_values: Keys and values of the tokens, or of the cached positions.
            at: Their mask.
        """
        out: Tensor = self.to_out(self.attend(query_BHLK, keys_values, visible=at.visible, causal=at.causal))
        return out


class CrossAttention(Attention):
    """Attention from tokens to another source: encoded tokens, or slots.

    Keys and values are computed separately, so that they can be cached, or computed for all layers at once.
    """

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__(dim=dim, heads=heads)
        self.to_query = nn.Linear(dim, dim, bias=False)
        self.to_key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def keys_values(self, source: Float[Tensor, "B S D"]) -> KeysValues:
        """Keys and values of a source without order, such as slots."""
        keys, values = split_heads(self.to_key_value(source), heads=2 * self.heads).chunk(2, dim=2)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        keys_values: KeysValues,
        *,
        visible: Mask | None = None,
        rotation: Rotation | None = None,
    ) -> Float[Tensor, "B L D"]:
        """The update of the tokens that ask.

        Args:
            x: The tokens.
            keys_values: Keys and values of the source.
            visible: Which positions of the source may be seen; by default all.
            rotation: Rotations of the tokens; by default none, for a source without order.
        """
        query = split_heads(self.to_query(x), heads=self.heads)
        query = (query if rotation is None else rotation.turn(query)).transpose(1, 2)
        out: Tensor = self.to_out(self.attend(query, keys_values, visible=visible))
        return out


def rotated_keys_values(
    attentions: Sequence[CrossAttention], source: Float[Tensor, "B S D"], rotation: Rotation
) -> list[KeysValues]:
    """Keys and values of one source for the attention of every layer, by one matrix product and one rotation."""
    weight = torch.cat([attention.to_key_value.weight for attention in attentions])
    shape = *source.shape[:2], len(attentions), 2, attentions[0].heads, -1
    keys_BSNHK, values_BSNHK = F.linear(source, weight).view(shape).unbind(3)
    keys_BSNHK = Rotation(rotation.cos[:, :, None], rotation.sin[:, :, None]).turn(keys_BSNHK)
    layers = (field.permute(2, 0, 3, 1, 4).unbind(0) for field in (keys_BSNHK, values_BSNHK))
    return list(zip(*layers, strict=True))


def split_heads(x: Float[Tensor, "B L D"], *, heads: int) -> Float[Tensor, "B L H K"]:
    """The part of each head, as a view."""
    return x.view(*x.shape[:2], heads, x.shape[2] // heads)


def causal_mask(length: int, *, device: torch.device) -> Bool[Tensor, "1 1 L L"]:
    """A mask in which each token sees itself and earlier tokens."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def with_before(before: SourceKeysValues, new: KeysValues) -> tuple[Float[Tensor, "B H R K"], Float[Tensor, "B H R K"]]:
    """Keys and values of what stands before, and of what stands behind it."""
    keys, values = (torch.cat(pair, dim=2) for pair in zip(before, new, strict=True))
    return keys, values


def as_bias(visible: Bool[Tensor, "#B 1 #L S"], like: Tensor) -> Float[Tensor, "#B 1 #L S"]:
    """A mask in the form that attention adds to scores, for several layers: each would convert it for itself.

    Args:
        visible: Which positions may be seen.
        like: A tensor of the dtype of the queries; under autocast, they have another.
    """
    device = visible.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    cast = autocast and like.dtype != torch.float64  # autocast leaves double precision alone
    dtype = torch.get_autocast_dtype(device) if cast else like.dtype
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)


def attention_weights(
    query_BHLK: Float[Tensor, "B H L K"],
    key_BHSK: Float[Tensor, "B H S K"],
    visible: Mask | None,
) -> Float[Tensor, "B H L S"]:
    """The weights of scaled dot-product attention."""
    score_BHLS = torch.einsum("BHLK,BHSK->BHLS", query_BHLK, key_BHSK) * query_BHLK.shape[-1] ** -0.5
    if visible is not None:
        score_BHLS = score_BHLS + (as_bias(visible, score_BHLS) if visible.dtype == torch.bool else visible)
    weights_BHLS: Tensor = score_BHLS.softmax(dim=-1)
    return weights_BHLS
