"""Attention among the tokens of a segment, and to all earlier segments in a matrix for each head (Infini-attention).

B  lanes     L  tokens of a segment     T  tokens of a piece     D  width     H  heads     K  width of a head
"""

from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.layers.attention import KeysValues, Positions, SelfAttention
from memformer_pl.layers.dropout import Keep, add_update
from memformer_pl.layers.kv_cache import KVCache, LayerKVCache
from memformer_pl.layers.probe import Probe
from memformer_pl.layers.transformer import BlockConfig

GATE_RATE = 10.0
"""Learning rate of the gates, as a multiple of that of all other weights. Adam moves a weight by about the learning
rate in a step, and a gate must move by several units to open or to close."""


class Stored(NamedTuple):
    """What a layer has stored of earlier segments: of each head, sums over their tokens."""

    values: Float[Tensor, "B H K K"]
    """Sums of the values, weighed by each channel of the features of their keys; at least float32."""
    keys: Float[Tensor, "B H K"]
    """Sums of the features of the keys, which normalise what is read; at least float32."""


class CompressiveAttention(SelfAttention):
    """Attention to the tokens of a segment up to a token's own, and to a matrix that stands for all earlier segments.

    The matrix is read by linear attention with the same queries, keys and values, but without positions (section 2.2).
    A gate of each head mixes both. A token whose query meets nothing, as in the first segment of a document, has its
    local attention alone, whatever the gate.

    The probe ``weights`` shows local attention, and ``read`` what comes from memory, ``[B, H, L, K]``, before the gate.

    Args:
        dim: Width of tokens.
        heads: Must divide ``dim``.
        delta: Whether only the difference is written between a value and what memory already returns for its key.
    """

    learning_rates: ClassVar = {"gate": GATE_RATE}

    def __init__(self, *, dim: int, heads: int, delta: bool) -> None:
        super().__init__(dim=dim, heads=heads)
        self.delta = delta
        self.gate = nn.Parameter(torch.zeros(heads))
        self.read = Probe()

    def mix(
        self, query_BHLK: Float[Tensor, "B H L K"], keys_values: KeysValues, at: Positions, stored: Stored
    ) -> Float[Tensor, "B L D"]:
        """The update of tokens.

        Args:
            query_BHLK: Their queries, without positions.
            keys_values: Keys, with positions, and values of the segment, or of the cached positions.
            at: Rotation of the tokens, and their mask.
            stored: Memory.
        """
        assert at.rotation is not None
        query_turned_BHLK = at.rotation.turn_heads(query_BHLK)
        local = self.attend(query_turned_BHLK, keys_values, visible=at.visible, causal=at.causal)
        read_BHLK, found = recall(features(query_BHLK), stored)
        read_BLHK = rearrange(self.read(read_BHLK), "B H L K -> B L H K")
        local_BLHK = local.view(read_BLHK.shape)
        share = self.gate.sigmoid()[:, None] * rearrange(found, "B H L 1 -> B L H 1")
        mixed = (local_BLHK + share * (read_BLHK - local_BLHK)).to(local.dtype)
        out: Tensor = self.to_out(mixed.flatten(2))
        return out

    def write(
        self,
        key_BHLK: Float[Tensor, "B H L K"],
        value_BHLK: Float[Tensor, "B H L K"],
        stored: Stored,
        token_mask: Bool[Tensor, "B L"],
    ) -> Stored:
        """Memory with the tokens of a segment, all against memory as it was before the segment.

        Args:
            key_BHLK: Their keys, without positions.
            value_BHLK: Their values.
            stored: Memory before the segment.
            token_mask: Which of them exist.
        """
        features_BHLK = features(key_BHLK) * rearrange(token_mask, "B L -> B 1 L 1")
        if self.delta:
            value_BHLK = value_BHLK - recall(features_BHLK, stored)[0]
        features_BHLK = features_BHLK.to(stored.values.dtype)
        added_BHKK = features_BHLK.transpose(2, 3) @ value_BHLK.to(features_BHLK.dtype)
        return Stored(stored.values + added_BHKK, stored.keys + features_BHLK.sum(2))


class CompressiveBlock(nn.Module):
    """Pre-norm block: attention to the segment and to memory, feed-forward."""

    branches = 2
    """Number of branches whose outputs are dropped in part."""

    def __init__(self, config: BlockConfig, *, delta: bool) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.self_norm = nn.LayerNorm(dim)
        self.self_attention = CompressiveAttention(dim=dim, heads=heads, delta=delta)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), config.build_feed_forward()

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        at: Positions,
        stored: Stored,
        token_mask: Bool[Tensor, "B L"],
        *,
        keep: Keep | None = None,
    ) -> tuple[Float[Tensor, "B L D"], Stored]:
        """Run the block on a segment; return its tokens, and memory after it.

        Args:
            x: Tokens.
            at: Their positions.
            stored: Memory before the segment.
            token_mask: Which of the tokens exist, at the left.
            keep: Factors of dropout; by default nothing is dropped.
        """
        assert at.rotation is not None
        query, (key, value) = self.self_attention.project(self.self_norm(x))
        update = self.self_attention.mix(query, (at.rotation.turn_heads(key), value), at, stored)
        return self._finish(x, update, keep), self.self_attention.write(key, value, stored, token_mask)

    def advance(self, x: Float[Tensor, "B L D"], stored: Stored, token_mask: Bool[Tensor, "B L"]) -> Stored:
        """Memory after a segment, as :meth:`forward` returns it, without its update of the tokens."""
        _, keys_values = self.self_attention.project(self.self_norm(x))
        return self.self_attention.write(*keys_values, stored, token_mask)

    def decode(self, x: Float[Tensor, "B T D"], at: Positions, cache: LayerKVCache) -> Float[Tensor, "B T D"]:
        """Run the block on the next tokens of a segment.

        Args:
            x: Tokens.
            at: Their positions, and their mask over the cached ones.
            cache: Keys and values of the tokens before; as its source, memory from :func:`as_source`.
        """
        assert at.rotation is not None
        query, (key, value) = self.self_attention.project(self.self_norm(x))
        keys, values = cache.source
        keys_values = cache.append(at.rotation.turn_heads(key), value)
        return self._finish(x, self.self_attention.mix(query, keys_values, at, Stored(values, keys[..., 0])), None)

    def _finish(
        self, x: Float[Tensor, "B L D"], update: Float[Tensor, "B L D"], keep: Keep | None
    ) -> Float[Tensor, "B L D"]:
        x = add_update(x, update, keep, 0)
        return add_update(x, self.ffn(self.ffn_norm(x)), keep, 1)


def features(x_BHLK: Float[Tensor, "B H L K"]) -> Float[Tensor, "B H L K"]:
    """Features of queries or keys for linear attention, above 0: ``elu(x) + 1``."""
    return F.elu(x_BHLK) + 1


def recall(
    features_BHLK: Float[Tensor, "B H L K"], stored: Stored
) -> tuple[Float[Tensor, "B H L K"], Bool[Tensor, "B H L 1"]]:
    """What memory returns for queries, and which of them meet anything; zeros for those that meet nothing.

    Args:
        features_BHLK: Features of the queries.
        stored: Memory.
    """
    features_BHLK = features_BHLK.to(stored.values.dtype)
    weight_BHL1 = features_BHLK @ stored.keys[..., None]
    found = weight_BHL1 > 0
    # no quotient of zeros, which would have no gradient either
    return features_BHLK @ stored.values / weight_BHL1.where(found, 1.0), found


def as_source(values_BNHFK: Float[Tensor, "B N H F K"], keys_BNHF: Float[Tensor, "B N H F"], cache: KVCache) -> KVCache:
    """A KV cache whose second source is the memory of each layer: a position for each of the features, with the sum of
    the keys in place of a key, and the sum of the values that it weighs as the value.

    Args:
        values_BNHFK: Sums of the values, layer by layer.
        keys_BNHF: Sums of the features of the keys.
        cache: The cache.
    """
    usable = torch.ones_like(keys_BNHF[:, 0, 0], dtype=torch.bool)
    return cache._replace(source_keys=keys_BNHF[..., None], source_values=values_BNHFK, source_usable=usable)
