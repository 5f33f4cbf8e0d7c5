"""Attention by content and by distance (Transformer-XL, Dai et al. 2019, section 3.3): cached tokens keep their
position relative to the present ones.

B  lanes     L  tokens in a segment     S  source positions     T  distances     D  width     H  heads     K  width of
a head
"""

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.errors import LARGEST, UsageError, require_sizes
from memformer_pl.layers.attention import KeysValues, Positions
from memformer_pl.layers.dropout import Keep, add_update
from memformer_pl.layers.kv_cache import LayerKVCache
from memformer_pl.layers.probe import Probe
from memformer_pl.layers.transformer import BlockConfig, init_weights


class RelativeAttention(nn.Module):
    """Attention from queries to a source of ``S`` positions, of which the queries are the last ``L``.

    A score is the sum of four terms: content and distance, each weighed by the query (``q k`` and ``q r``) and by a
    bias that all queries share (``u k`` and ``v r``). ``r`` is a projection of a fixed sinusoid of the distance.

    The probe ``weights`` shows ``[B, H, L, S]``.

    Args:
        dim: Width of queries and source; even.
        heads: Must divide ``dim``.
    """

    no_decay = ("content_bias", "distance_bias")

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise UsageError(f"heads must divide dim, got {heads=} and {dim=}")
        if dim % 2:
            raise UsageError(f"relative positions need an even dim, got {dim=}")
        self.heads = heads
        self.scale = (dim / heads) ** -0.5
        self.to_query = nn.Linear(dim, dim, bias=False)
        self.to_key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.to_distance = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, 1, dim // heads))
        self.distance_bias = nn.Parameter(torch.zeros(heads, 1, dim // heads))
        self.weights = Probe()

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        source: Float[Tensor, "B S D"],
        *,
        visible: Bool[Tensor, "#B 1 L T"],
        distances: Float[Tensor, "S+1 D"] | None = None,
        cache: LayerKVCache | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Attend to the source.

        Args:
            x: The tokens that ask.
            source: Tokens that give keys and values; it ends with ``x``, and with a cache it is ``x``.
            visible: Which positions of the source, or of the cache, each query may see: at least one, none after it.
            distances: From :func:`distances_to_keys`, if it was called before; not used with a cache.
            cache: Keys and values of earlier tokens, to which those of the source are appended.
        """
        query_BHLK, key_BHSK, value_BHSK = self.project(x, source)
        if cache is not None:
            return self._attend_cached(query_BHLK, *cache.append(key_BHSK, value_BHSK), cache, visible)
        scores_BHLS = self.scores(query_BHLK, key_BHSK, distances).masked_fill(~visible, -torch.inf)
        out: Tensor = self.to_out(mix(self.weights(scores_BHLS.softmax(dim=-1)), value_BHSK))
        return out

    def project(
        self, x: Float[Tensor, "B L D"], source: Float[Tensor, "B S D"]
    ) -> tuple[Float[Tensor, "B H L K"], Float[Tensor, "B H S K"], Float[Tensor, "B H S K"]]:
        """Queries of ``x``, keys and values of ``source``."""
        query_BHLK = rearrange(self.to_query(x), "B L (H K) -> B H L K", H=self.heads)
        return query_BHLK, *self.keys_values(source)

    def keys_values(self, source: Float[Tensor, "B S D"]) -> KeysValues:
        """Keys and values of a source."""
        key_BHSK, value_BHSK = rearrange(self.to_key_value(source), "B S (two H K) -> two B H S K", two=2, H=self.heads)
        return key_BHSK, value_BHSK

    def _attend_cached(
        self,
        query_BHTK: Float[Tensor, "B H T K"],
        key_BHSK: Float[Tensor, "B H S K"],
        value_BHSK: Float[Tensor, "B H S K"],
        cache: LayerKVCache,
        visible: Bool[Tensor, "B 1 T S"],
    ) -> Float[Tensor, "B T D"]:
        """Attend to cached positions; the number of filled ones may differ between lanes."""
        distant_BHTK = (query_BHTK + self.distance_bias) * self.scale
        by_distance_BHTS = einsum(distant_BHTK, cache.distances, "B H T K, H S K -> B H T S")
        away_BTS = cache.positions[..., None] - torch.arange(key_BHSK.shape[2], device=key_BHSK.device)
        by_distance_BHTS = by_distance_BHTS.take_along_dim(away_BTS.clamp(min=0)[:, None], dim=-1)
        bias_BHTS = by_distance_BHTS.masked_fill(~visible, -torch.inf)
        query_BHTK = query_BHTK + self.content_bias
        mixed_BHTK = F.scaled_dot_product_attention(query_BHTK, key_BHSK, value_BHSK, attn_mask=bias_BHTS)
        out: Tensor = self.to_out(rearrange(mixed_BHTK, "B H T K -> B T (H K)"))
        return out

    def scores(
        self,
        query_BHLK: Float[Tensor, "B H L K"],
        key_BHSK: Float[Tensor, "B H S K"],
        distances: Float[Tensor, "S+1 D"] | None = None,
    ) -> Float[Tensor, "B H L S"]:
        """Scores of queries at the last ``L`` of the ``S`` keys; undefined for keys after a query.

        Args:
            query_BHLK: Queries.
            key_BHSK: Keys.
            distances: From :func:`distances_to_keys`, if it was called before.
        """
        keys = key_BHSK.shape[2]
        if distances is None:
            distances = distances_to_keys(keys, like=self.to_distance.weight)
        by_distance_BHLS = self._distance_scores(query_BHLK, distances, keys=keys, bias=self.distance_bias)
        return self.content_scores(query_BHLK, key_BHSK) + by_distance_BHLS

    def content_scores(
        self, query_BHLK: Float[Tensor, "B H L K"], key_BHSK: Float[Tensor, "B H S K"]
    ) -> Float[Tensor, "B H L S"]:
        """The terms ``q k + u k``, scaled."""
        query_BHLK = (query_BHLK + self.content_bias) * self.scale
        return einsum(query_BHLK, key_BHSK, "B H L K, B H S K -> B H L S")

    def distance_scores(
        self, query_BHLK: Float[Tensor, "B H L K"], distances: Int[Tensor, " T"], *, keys: int, bias: nn.Parameter
    ) -> Float[Tensor, "B H L S"]:
        """The terms ``q r + v r``, scaled, for queries and keys that each stand at consecutive positions.

        Each distance is projected once, so their cost grows with ``L + S`` and not with ``L S``.

        Args:
            query_BHLK: Queries.
            distances: From the *last* query to each key, continued for the earlier queries by ``L - 1`` entries, and
                at least 1, as far as those may see.
            keys: Number of keys.
            bias: ``v``.
        """
        return self._distance_scores(query_BHLK, self._sinusoid(distances), keys=keys, bias=bias)

    def project_distances(self, distances: Int[Tensor, " T"]) -> Float[Tensor, "H T K"]:
        """The projection ``r`` of each distance, head by head."""
        return self._project_sinusoid(self._sinusoid(distances))

    def _distance_scores(
        self, query_BHLK: Float[Tensor, "B H L K"], sinusoid_TD: Float[Tensor, "T D"], *, keys: int, bias: nn.Parameter
    ) -> Float[Tensor, "B H L S"]:
        r_HTK = self._project_sinusoid(sinusoid_TD)
        scores_BHLT = einsum((query_BHLK + bias) * self.scale, r_HTK, "B H L K, H T K -> B H L T")
        return shift(scores_BHLT)[..., :keys]

    def _project_sinusoid(self, sinusoid_TD: Float[Tensor, "T D"]) -> Float[Tensor, "H T K"]:
        r_HTK: Tensor = rearrange(self.to_distance(sinusoid_TD), "T (H K) -> H T K", H=self.heads)
        return r_HTK

    def _sinusoid(self, distances: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
        weight = self.to_distance.weight
        return sinusoid(distances, dim=weight.shape[1]).to(weight.dtype)


class RelativeBlock(nn.Module):
    """Pre-norm block: attention by content and distance to an XL cache and to the tokens before, feed-forward.

    Ours: pre-norm, where the papers normalise after each branch; ``u`` and ``v`` for each block.
    """

    branches = 2
    """Number of branches whose outputs are dropped in part."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.self_norm, self.self_attention = nn.LayerNorm(dim), RelativeAttention(dim=dim, heads=heads)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), config.build_feed_forward()

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        at: Positions,
        xl_cache: Float[Tensor, "B M D"] | None = None,
        *,
        cache: LayerKVCache | None = None,
        keep: Keep | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Run the block.

        Args:
            x: Tokens.
            at: Mask over the XL cache and the tokens, or over the cached positions; sinusoids of distances.
            xl_cache: Inputs of this block at earlier tokens, or rows in their place; by default none.
            cache: Keys and values of earlier tokens, including the XL cache, to which those of ``x`` are appended.
            keep: Factors of dropout; by default nothing is dropped.
        """
        before = 0 if xl_cache is None else xl_cache.shape[1]
        normed = self.self_norm(x if xl_cache is None else torch.cat((xl_cache, x), dim=1))
        assert at.visible is not None
        attended = self.self_attention(
            normed[:, before:], normed, visible=at.visible, distances=at.distances, cache=cache
        )
        return self.finish(x, attended, keep)

    def finish(
        self, x: Float[Tensor, "B L D"], attended: Float[Tensor, "B L D"], keep: Keep | None
    ) -> Float[Tensor, "B L D"]:
        """The rest of the block, given the result of attention."""
        x = add_update(x, attended, keep, 0)
        return add_update(x, self.ffn(self.ffn_norm(x)), keep, 1)


def relative_blocks(config: BlockConfig, *, layers: int, lower: type[RelativeBlock] = RelativeBlock) -> nn.ModuleList:
    """Build the blocks of a decoder-only model with relative positions; those below the last are of class ``lower``.

    Raises:
        UsageError: ``layers`` is below 1.
    """
    require_sizes(most=LARGEST, layers=layers)
    *below, last = config.of_layers(layers)
    blocks = nn.ModuleList([*map(lower, below), RelativeBlock(last)])
    init_weights(blocks)
    return blocks


def projected_distances(blocks: nn.ModuleList, *, positions: int) -> Float[Tensor, "1 N H S K"]:
    """The projections of all distances below ``positions``, block by block; the same for all lanes."""
    projected = []
    for block in blocks:
        assert isinstance(block, RelativeBlock)
        weight = block.self_attention.to_distance.weight
        distances = torch.arange(positions, device=weight.device)
        projected.append(block.self_attention.project_distances(distances).to(weight.dtype))
    return torch.stack(projected)[None]


def mix(weights_BHLS: Float[Tensor, "B H L S"], value_BHSK: Float[Tensor, "B H S K"]) -> Float[Tensor, "B L D"]:
    """The weighted sum of the values, heads side by side."""
    mixed_BHLK = einsum(weights_BHLS, value_BHSK, "B H L S, B H S K -> B H L K")
    return rearrange(mixed_BHLK, "B H L K -> B L (H K)")


def sinusoid(distances: Int[Tensor, " T"], *, dim: int) -> Float[Tensor, "T D"]:
    """A fixed vector for each distance: sines, then cosines, of 1 to 1/10,000 radian a token; in float32."""
    frequencies = 10_000.0 ** -(torch.arange(0, dim, 2, device=distances.device, dtype=torch.float32) / dim)
    angles = distances[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def distances_to_keys(keys: int, *, like: Float[Tensor, "*any D"]) -> Float[Tensor, "T D"]:
    """Sinusoids of the distances from the last of ``keys`` positions to each, and of one more, as
    :meth:`RelativeAttention.scores` needs them; of the width, dtype and device of ``like``."""
    distances = torch.arange(keys - 1, -2, -1, device=like.device)
    return sinusoid(distances, dim=like.shape[-1]).to(like.dtype)


def shift(scores_BHLT: Float[Tensor, "B H L T"]) -> Float[Tensor, "B H L T-1"]:
    """Move row ``i`` of the last two axes to the left by ``L - 1 - i``, without a copy.

    The beginning of the next row moves in from the right: the caller must mask it.
    """
    rows, columns = scores_BHLT.shape[-2:]
    flat = scores_BHLT.flatten(-2)[..., rows - 1 :]
    return flat[..., : rows * (columns - 1)].reshape(*scores_BHLT.shape[:2], rows, columns - 1)
