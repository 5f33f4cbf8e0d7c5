"""Attention by content and by distance (Transformer-XL, Dai et al. 2019, section 3.3): what was cached keeps its place
relative to what is read now.

B  lanes     L  tokens in a segment     S  source positions     T  distances     D  width     H  heads     K  width of
a head
"""

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.errors import UsageError
from memformer_pl.layers.transformer import FeedForward, BlockConfig, init_weights
from memformer_pl.layers.dropout import Dropout
from memformer_pl.layers.kv_cache import LayerKVCache, CachePositions
from memformer_pl.errors import LARGEST, require_sizes
from memformer_pl.layers.probe import Probe


class RelativeAttention(nn.Module):
    """What each query takes from a source of ``S`` positions, of which the queries are the last ``L``.

    A score is the sum of four terms: what is there and how far away, each as this query asks for it (``q k`` and
    ``q r``) and as every query does (``u k`` and ``v r``). ``r`` is a projection of a fixed sinusoid of the distance.

    The tap ``weights`` shows ``[B, H, L, S]``.

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
        self, x: Float[Tensor, "B L D"], source: Float[Tensor, "B S D"], *, visible: Bool[Tensor, "#B 1 L S"]
    ) -> Float[Tensor, "B L D"]:
        """Read from the source.

        Args:
            x: Queries.
            source: Where keys and values come from. It ends with the queries' own tokens.
            visible: What each query may see: at least one position, and none behind its own.
        """
        query_BHLK, key_BHSK, value_BHSK = self.project(x, source)
        scores_BHLS = self.scores(query_BHLK, key_BHSK).masked_fill(~visible, -torch.inf)
        out: Tensor = self.to_out(mix(self.weights(scores_BHLS.softmax(dim=-1)), value_BHSK))
        return out

    def project(
        self, x: Float[Tensor, "B L D"], source: Float[Tensor, "B S D"]
    ) -> tuple[Float[Tensor, "B H L K"], Float[Tensor, "B H S K"], Float[Tensor, "B H S K"]]:
        """Queries of ``x``, keys and values of ``source``."""
        query_BHLK = rearrange(self.to_query(x), "B L (H K) -> B H L K", H=self.heads)
        return query_BHLK, *self.keys_and_values(source)

    def keys_and_values(
        self, source: Float[Tensor, "B S D"]
    ) -> tuple[Float[Tensor, "B H S K"], Float[Tensor, "B H S K"]]:
        """What each position of the source is found by, and what it gives."""
        key_BHSK, value_BHSK = rearrange(self.to_key_value(source), "B S (two H K) -> two B H S K", two=2, H=self.heads)
        return key_BHSK, value_BHSK

    def extend(self, x: Float[Tensor, "B T D"], kept: LayerKVCache, at: CachePositions) -> Float[Tensor, "B T D"]:
        """As :meth:`forward`, for tokens that follow on those whose keys and values are kept; theirs are kept too, in
        place. The distances have been projected, those from 0 on."""
        query_BHTK, key_BHTK, value_BHTK = self.project(x, x)
        kept.keep(at, key_BHTK, value_BHTK)
        asked_BHTK = (query_BHTK + self.distance_bias) * self.scale
        by_distance_BHTS = einsum(asked_BHTK, kept.distances, "B H T K, H S K -> B H T S")
        away_BTS = at.rows[..., None] - torch.arange(kept.keys.shape[2], device=x.device)
        by_distance_BHTS = by_distance_BHTS.take_along_dim(away_BTS.clamp(min=0)[:, None], dim=-1)
        bias_BHTS = by_distance_BHTS.masked_fill(~at.visible, -torch.inf)
        query_BHTK = query_BHTK + self.content_bias
        read_BHTK = F.scaled_dot_product_attention(query_BHTK, kept.keys, kept.values, attn_mask=bias_BHTS)
        out: Tensor = self.to_out(rearrange(read_BHTK, "B H T K -> B T (H K)"))
        return out

    def scores(
        self, query_BHLK: Float[Tensor, "B H L K"], key_BHSK: Float[Tensor, "B H S K"]
    ) -> Float[Tensor, "B H L S"]:
        """Scores of queries that are the last ``L`` of the ``S`` keys; without meaning for keys behind a query."""
        keys = key_BHSK.shape[2]
        distances = torch.arange(keys - 1, -2, -1, device=key_BHSK.device)
        by_distance_BHLS = self.distance_scores(query_BHLK, distances, keys=keys, bias=self.distance_bias)
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
            distances: From the *last* query to each key, and further on by ``L - 1``, and at least 1, for the queries
                before it; only as far as those may see.
            keys: How many keys there are.
            bias: ``v``.
        """
        r_HTK = self.project_distances(distances)
        scores_BHLT = einsum((query_BHLK + bias) * self.scale, r_HTK, "B H L K, H T K -> B H L T")
        return shift(scores_BHLT)[..., :keys]

    def project_distances(self, distances: Int[Tensor, " T"]) -> Float[Tensor, "H T K"]:
        """What each distance is found by, head by head."""
        r_TD = self.to_distance(sinusoid(distances, dim=self.to_distance.in_features).to(self.to_distance.weight.dtype))
        r_HTK: Tensor = rearrange(r_TD, "T (H K) -> H T K", H=self.heads)
        return r_HTK


class RelativeBlock(nn.Module):
    """Tokens read what is cached and those before them by content and distance, then think by themselves.

    Pre-norm, as all layers here, where the papers that use it normalise behind each branch; ``u`` and ``v`` are each
    layer's own.
    """

    def __init__(self, sizes: BlockConfig) -> None:
        super().__init__()
        self.self_norm, self.self_attention = (
            nn.LayerNorm(sizes.dim),
            RelativeAttention(dim=sizes.dim, heads=sizes.heads),
        )
        self.ffn_norm, self.ffn = nn.LayerNorm(sizes.dim), FeedForward(dim=sizes.dim, hidden=sizes.ffn_dim)
        self.dropout = Dropout(sizes.dropout)

    def forward(
        self, x: Float[Tensor, "B L D"], cached: Float[Tensor, "B M D"], *, visible: Bool[Tensor, "#B 1 L M+L"]
    ) -> Float[Tensor, "B L D"]:
        """The tokens one layer further up.

        Args:
            x: The tokens of a segment.
            cached: What entered this layer at the tokens before them, or stands for it.
            visible: What each token may see of both.
        """
        normed = self.self_norm(torch.cat((cached, x), dim=1))
        return self.think(x, self.self_attention(normed[:, cached.shape[1] :], normed, visible=visible))

    def extend(self, x: Float[Tensor, "B T D"], kept: LayerKVCache, at: CachePositions) -> Float[Tensor, "B T D"]:
        """As :meth:`forward`, for tokens that follow on those that are kept; these are kept too, in place."""
        return self.think(x, self.self_attention.extend(self.self_norm(x), kept, at))

    def think(self, x: Float[Tensor, "B L D"], read: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """What follows on ``read``, that which tokens have read of each other: each token by itself."""
        x = x + self.dropout(read)
        out: Tensor = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return out


def relative_blocks(sizes: BlockConfig, *, layers: int, lower: type[RelativeBlock] = RelativeBlock) -> nn.ModuleList:
    """The untrained layers of a decoder-only model with relative positions, those below the last of the kind ``lower``.

    Raises:
        UsageError: There is no layer.
    """
    require_sizes(most=LARGEST, layers=layers)
    stack = nn.ModuleList([*(lower(sizes) for _ in range(layers - 1)), RelativeBlock(sizes)])
    init_weights(stack)
    return stack


def projected_distances(stack: nn.ModuleList, *, rows: int) -> Float[Tensor, "1 N H S K"]:
    """What each layer finds the distances below ``rows`` by; the same for all lanes."""
    projected = []
    for layer in stack:
        assert isinstance(layer, RelativeBlock)
        weight = layer.self_attention.to_distance.weight
        distances = torch.arange(rows, device=weight.device)
        projected.append(layer.self_attention.project_distances(distances).to(weight.dtype))
    return torch.stack(projected)[None]


def mix(weights_BHLS: Float[Tensor, "B H L S"], value_BHSK: Float[Tensor, "B H S K"]) -> Float[Tensor, "B L D"]:
    """The values by their weights, the heads side by side."""
    read_BHLK = einsum(weights_BHLS, value_BHSK, "B H L S, B H S K -> B H L K")
    return rearrange(read_BHLK, "B H L K -> B L (H K)")


def sinusoid(distances: Int[Tensor, " T"], *, dim: int) -> Float[Tensor, "T D"]:
    """A fixed vector for each distance: sines, then cosines, from one radian a token down to 1/10,000; in float32."""
    frequencies = 10_000.0 ** -(torch.arange(0, dim, 2, device=distances.device, dtype=torch.float32) / dim)
    angles = distances[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def shift(scores_BHLT: Float[Tensor, "B H L T"]) -> Float[Tensor, "B H L T-1"]:
    """Row ``i`` of the last two axes, moved to the left by ``L - 1 - i``; without a copy.

    What is moved in from the right is the beginning of the next row: for the caller to mask.
    """
    rows, columns = scores_BHLT.shape[-2:]
    flat = scores_BHLT.flatten(-2)[..., rows - 1 :]
    return flat[..., : rows * (columns - 1)].reshape(*scores_BHLT.shape[:2], rows, columns - 1)
