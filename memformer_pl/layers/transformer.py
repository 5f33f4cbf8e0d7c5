"""The layers of all models, which are pre-norm residual branches, and what stands before and behind them."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.errors import UsageError
from memformer_pl.layers.attention import Attention
from memformer_pl.layers.dropout import Dropout
from memformer_pl.layers.memory import SlotReader
from memformer_pl.layers.rotary import Rotation
from memformer_pl.layers.cross_entropy import output_from_table
from memformer_pl.layers.kv_cache import LayerKVCache, CachePositions
from memformer_pl.contract import ABSENT, SegmentOutput, Segment
from memformer_pl.errors import LARGEST, LARGEST_WIDTH, require_sizes


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What the layers of a stack have in common.

    Args:
        dim: Width of a token.
        heads: Attention heads; must divide ``dim``.
        ffn_dim: Width of the hidden layer after attention.
        dropout: On what each branch adds. Attention weights have none, so that fused kernels serve (ours).
    """

    dim: int
    heads: int
    ffn_dim: int
    dropout: float

    def __post_init__(self) -> None:
        require_sizes(most=LARGEST_WIDTH, dim=self.dim, heads=self.heads, ffn_dim=self.ffn_dim)
        if self.dim % self.heads:
            raise UsageError(f"heads must divide dim, got heads={self.heads} and dim={self.dim}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, got {self.dropout}")


class FeedForward(nn.Module):
    """A hidden layer for each token by itself."""

    def __init__(self, *, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand, self.contract = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """What the hidden layer makes of each token."""
        out: Tensor = self.contract(F.gelu(self.expand(x)))
        return out


class TransformerBlock(nn.Module):
    """Tokens read each other as far as they are visible, then memory where there is one, then think by themselves: the
    layer of Memformer's encoder (the paper's figure), and under a causal mask that of decoder-only models."""

    def __init__(self, sizes: BlockConfig, *, reads_memory: bool = False) -> None:
        super().__init__()
        dim, heads = sizes.dim, sizes.heads
        self.self_norm, self.self_attention = nn.LayerNorm(dim), Attention(dim=dim, heads=heads)
        if reads_memory:
            self.memory_norm, self.memory_reader = nn.LayerNorm(dim), SlotReader(dim=dim, heads=heads)
        self.reads_memory = reads_memory
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), FeedForward(dim=dim, hidden=sizes.ffn_dim)
        self.dropout = Dropout(sizes.dropout)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        memory: Float[Tensor, "B M D"] | None = None,
        *,
        visible: Bool[Tensor, "#B 1 #L L"],
        rotation: Rotation,
    ) -> Float[Tensor, "B L D"]:
        """The tokens one layer further up."""
        normed = self.self_norm(x)
        seen = self.self_attention.keys_and_values(normed, rotation)
        return self.some(x, normed, *seen, memory, visible=visible, rotation=rotation)

    def some(
        self,
        x: Float[Tensor, "B L D"],
        normed: Float[Tensor, "B L D"],
        key_BHSK: Float[Tensor, "B H S K"],
        value_BHSK: Float[Tensor, "B H S K"],
        memory: Float[Tensor, "B M D"] | None = None,
        *,
        visible: Bool[Tensor, "#B 1 #L S"],
        rotation: Rotation,
    ) -> Float[Tensor, "B L D"]:
        """Some of the tokens one layer further up, from the keys and values of all that they see."""
        query_BHLK = self.self_attention.queries(normed, rotation)
        return self.think(x, self.self_attention.read(query_BHLK, key_BHSK, value_BHSK, visible=visible), memory)

    def think(
        self, x: Float[Tensor, "B L D"], read: Float[Tensor, "B L D"], memory: Float[Tensor, "B M D"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """What follows on ``read``, that which tokens have read of each other: memory, and each token by itself."""
        x = x + self.dropout(read)
        if self.reads_memory:
            x = x + self.dropout(self.memory_reader(self.memory_norm(x), memory))
        out: Tensor = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return out

    def extend(self, x: Float[Tensor, "B T D"], kept: LayerKVCache, at: CachePositions) -> Float[Tensor, "B T D"]:
        """As :meth:`forward`, for tokens that follow on those that are kept; these are kept too, in place."""
        x = x + self.self_attention.extend(self.self_norm(x), kept, at)
        if self.reads_memory:
            x = x + self.memory_reader.attention.look_up(self.memory_norm(x), kept, at)
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class DecoderBlock(nn.Module):
    """Tokens read those before them, then the encoded previous segment, then think by themselves."""

    def __init__(self, sizes: BlockConfig) -> None:
        super().__init__()
        dim, heads = sizes.dim, sizes.heads
        self.self_norm, self.self_attention = nn.LayerNorm(dim), Attention(dim=dim, heads=heads)
        self.cross_norm, self.cross_attention = nn.LayerNorm(dim), Attention(dim=dim, heads=heads)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), FeedForward(dim=dim, hidden=sizes.ffn_dim)
        self.dropout = Dropout(sizes.dropout)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        encoded: Float[Tensor, "B S D"],
        *,
        causal: Bool[Tensor, "1 1 L L"],
        encoded_visible: Bool[Tensor, "B 1 1 S"],
        rotation: Rotation,
        encoded_rotation: Rotation,
    ) -> Float[Tensor, "B L D"]:
        """The tokens one layer further up."""
        normed = self.self_norm(x)
        x = x + self.dropout(self.self_attention(normed, normed, visible=causal, rotations=(rotation, rotation)))
        rotations = (rotation, encoded_rotation)
        x = x + self.dropout(
            self.cross_attention(self.cross_norm(x), encoded, visible=encoded_visible, rotations=rotations)
        )
        out: Tensor = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return out

    def extend(self, x: Float[Tensor, "B T D"], kept: LayerKVCache, at: CachePositions) -> Float[Tensor, "B T D"]:
        """As :meth:`forward`, for tokens that follow on those that are kept; these are kept too, in place."""
        x = x + self.self_attention.extend(self.self_norm(x), kept, at)
        x = x + self.cross_attention.look_up(self.cross_norm(x), kept, at, rotation=at.rotation)
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class TokenEmbedding(nn.Module):
    """The two ends of a decoder-only model: vectors for START and the tokens of a segment, and what the last layer says
    about each token, by the same table.

    Args:
        vocab: How many tokens there are.
        dim: Width of a token.
        dropout: On the vectors.
    """

    def __init__(self, *, vocab_size: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.embedding, self.start = nn.Embedding(vocab_size, dim), nn.Parameter(torch.randn(dim))
        self.norm, self.dropout = nn.LayerNorm(dim), Dropout(dropout)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)

    def forward(self, tokens: Int[Tensor, "B L"], last: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B L+1 D"]:
        """START and the tokens, each of a length near ``sqrt(dim)``.

        Args:
            tokens: Of a segment.
            last: The token before them, which stands in the place of START where it is not ``ABSENT``.
        """
        scale = self.start.numel() ** 0.5
        first = self.start.expand(len(tokens), -1)
        if last is not None:
            first = torch.where((last == ABSENT)[:, None], first, self.embedding(last.clamp(min=0)) * scale)
        out: Tensor = self.dropout(torch.cat((first[:, None], self.embedding(tokens) * scale), dim=1))
        return out

    def vectors(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """The tokens alone, without dropout."""
        out: Tensor = self.embedding(tokens) * self.start.numel() ** 0.5
        return out

    def logits(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """What ``x`` says about the next token."""
        return F.linear(self.norm(x), self.embedding.weight)

    def reading(self, x: Float[Tensor, "B L D"], segment: Segment, *, rows: int | None = None) -> SegmentOutput:
        """The reading of a segment whose token ``n`` is predicted by ``x[:, n]``; ``rows`` tokens at once."""
        return output_from_table(self.norm(x), self.embedding.weight, segment, rows=rows)


@torch.no_grad()
def init_weights(layers: nn.Module) -> None:
    """Start the linear maps of layers at unit gain without bias, and reading from memory at zero.

    So a model begins as its twin without memory, not led astray by what slots hold before they have learned.
    """
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in layers.modules():
        if isinstance(module, SlotReader):
            nn.init.zeros_(module.attention.to_out.weight)


def causal_blocks(sizes: BlockConfig, *, layers: int, reads_memory: bool = False) -> nn.ModuleList:
    """The untrained layers of a decoder-only model.

    Raises:
        UsageError: There is no layer.
    """
    require_sizes(most=LARGEST, layers=layers)
    stack = nn.ModuleList(TransformerBlock(sizes, reads_memory=reads_memory) for _ in range(layers))
    init_weights(stack)
    return stack


def visible_by_rank(ranks: Int[Tensor, " P"]) -> Bool[Tensor, "1 1 P P"]:
    """Each position sees those whose rank is not above its own."""
    return (ranks[:, None] >= ranks)[None, None]


def causal_mask(length: int, *, device: torch.device) -> Bool[Tensor, "1 1 L L"]:
    """Each token sees itself and those before it."""
    return visible_by_rank(torch.arange(length, device=device))
