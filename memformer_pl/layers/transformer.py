"""Pre-norm Transformer blocks, and the token embedding at both ends of a decoder-only model."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.contract import ABSENT, Segment, SegmentOutput
from memformer_pl.errors import LARGEST, LARGEST_WIDTH, UsageError, require_sizes
from memformer_pl.layers.attention import (
    CrossAttention,
    KeysValues,
    Positions,
    SelfAttention,
    SourceKeysValues,
    with_before,
)
from memformer_pl.layers.cross_entropy import output_from_table
from memformer_pl.layers.dropout import Keep, add_update
from memformer_pl.layers.feed_forward import FeedForward, build_choice, check_choice
from memformer_pl.layers.kv_cache import LayerKVCache
from memformer_pl.layers.memory import SlotReader


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The sizes that all blocks of a model share.

    Args:
        dim: Width of a token.
        heads: Attention heads; must divide ``dim``.
        ffn_dim: Width of the hidden layer of the feed-forward; by default four times ``dim``.
        dropout: On the output of each branch; not on attention weights, so that fused kernels can be used (ours).
        feed_forward: Another feed-forward for some layers; see :func:`~memformer_pl.layers.feed_forward.check_choice`.
        layer: Number of the layer that these sizes are for, from :meth:`of_layers`.
    """

    dim: int
    heads: int
    ffn_dim: int | None = None
    dropout: float
    feed_forward: dict[str, Any] | None = None
    layer: int | None = None

    def __post_init__(self) -> None:
        require_sizes(most=LARGEST_WIDTH, dim=self.dim, heads=self.heads, ffn_dim=self.hidden)
        if self.dim % self.heads:
            raise UsageError(f"heads must divide dim, got heads={self.heads} and dim={self.dim}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    @property
    def hidden(self) -> int:
        """Width of the hidden layer of the feed-forward."""
        return 4 * self.dim if self.ffn_dim is None else self.ffn_dim

    def of_layers(self, layers: int) -> list["BlockConfig"]:
        """The sizes of each layer of a model.

        Raises:
            UsageError: ``feed_forward`` does not fit a model of so many layers.
        """
        if self.feed_forward is not None:
            check_choice(self.feed_forward, layers=layers)
        return [replace(self, layer=layer) for layer in range(layers)]

    def build_feed_forward(self) -> nn.Module:
        """Build the feed-forward of this layer: dense, unless ``feed_forward`` chooses another."""
        if self.feed_forward is not None:
            assert self.layer is not None, "build each block from its own of BlockConfig.of_layers"
            if self.layer in self.feed_forward["layers"]:
                return build_choice(self.feed_forward, dim=self.dim)
        return FeedForward(dim=self.dim, hidden=self.hidden)


class TransformerBlock(nn.Module):
    """Pre-norm block: masked self-attention, optional attention to memory, feed-forward.

    The block of Memformer's encoder (the paper's figure) and, under a causal mask, of decoder-only models.
    """

    def __init__(self, config: BlockConfig, *, reads_memory: bool = False) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.self_norm, self.self_attention = nn.LayerNorm(dim), SelfAttention(dim=dim, heads=heads)
        if reads_memory:
            self.memory_norm, self.memory_reader = nn.LayerNorm(dim), SlotReader(dim=dim, heads=heads)
        self.reads_memory = reads_memory
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), config.build_feed_forward()

    @property
    def branches(self) -> int:
        """Number of branches whose outputs are dropped in part."""
        return 3 if self.reads_memory else 2

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        at: Positions,
        memory: Float[Tensor, "B M D"] | None = None,
        *,
        before: SourceKeysValues | None = None,
        cache: LayerKVCache | None = None,
        keep: Keep | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Run the block.

        Args:
            x: Tokens.
            at: Their positions, and the mask over ``before`` and themselves, or over the cached positions.
            memory: Slots, for a block that reads them; with a cache, it holds their keys and values.
            before: Keys and values of positions in front of ``x``; by default there are none.
            cache: Keys and values of earlier tokens, to which those of ``x`` are appended.
            keep: Factors of dropout; by default nothing is dropped.
        """
        query, keys_values = self.project(x, at, before)
        if cache is not None:
            keys_values = cache.append(*keys_values)
        slots: SourceKeysValues | None = None
        if self.reads_memory and cache is not None:
            slots = cache.source
        elif self.reads_memory:
            assert memory is not None
            slots = self.memory_reader.keys_values(memory)
        return self.forward_rows(x, query, at, keys_values, slots, keep=keep)

    def project(
        self, x: Float[Tensor, "B L D"], at: Positions, before: SourceKeysValues | None = None
    ) -> tuple[Float[Tensor, "B H L K"], KeysValues]:
        """Queries of tokens, and the keys and values of what they see.

        Args:
            x: Tokens.
            at: Their positions.
            before: Keys and values of positions in front of them; by default there are none.
        """
        query, new = self.self_attention.project(self.self_norm(x), at.rotation)
        return query, new if before is None else with_before(before, new)

    def forward_rows(
        self,
        x: Float[Tensor, "B L D"],
        query: Float[Tensor, "B H L K"],
        at: Positions,
        keys_values: KeysValues,
        slots: SourceKeysValues | None = None,
        *,
        keep: Keep | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Run the block on a part of the tokens, given the keys and values of all tokens that they see.

        Args:
            x: The part.
            query: Its queries.
            at: Its positions, and its mask over ``keys_values``.
            keys_values: Keys and values of the visible tokens.
            slots: Keys and values of memory, for a block that reads it.
            keep: Factors of dropout of the part; by default nothing is dropped.
        """
        x = add_update(x, self.self_attention(query, keys_values, at), keep, 0)
        if self.reads_memory:
            read = self.memory_reader.attention(self.memory_norm(x), slots, visible=at.source_visible)
            x = add_update(x, read, keep, 1)
        return add_update(x, self.ffn(self.ffn_norm(x)), keep, -1)


class DecoderBlock(nn.Module):
    """Pre-norm block: causal self-attention, attention to the encoded previous segment, feed-forward."""

    branches = 3
    """Number of branches whose outputs are dropped in part."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.self_norm, self.self_attention = nn.LayerNorm(dim), SelfAttention(dim=dim, heads=heads)
        self.cross_norm, self.cross_attention = nn.LayerNorm(dim), CrossAttention(dim=dim, heads=heads)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), config.build_feed_forward()

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        at: Positions,
        source: SourceKeysValues | None = None,
        *,
        cache: LayerKVCache | None = None,
        keep: Keep | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Run the block.

        Args:
            x: Tokens.
            at: Positions of the tokens, and the masks over them and over the encoded segment.
            source: Keys and values of the encoded segment; with a cache, it holds them.
            cache: Keys and values of earlier tokens, to which those of ``x`` are appended.
            keep: Factors of dropout; by default nothing is dropped.
        """
        query, keys_values = self.self_attention.project(self.self_norm(x), at.rotation)
        if cache is not None:
            keys_values, source = cache.append(*keys_values), cache.source
        assert source is not None
        x = add_update(x, self.self_attention(query, keys_values, at), keep, 0)
        attended = self.cross_attention(self.cross_norm(x), source, visible=at.source_visible, rotation=at.rotation)
        x = add_update(x, attended, keep, 1)
        return add_update(x, self.ffn(self.ffn_norm(x)), keep, 2)


class TokenEmbedding(nn.Module):
    """The two ends of a decoder-only model: vectors of START and of tokens, and logits by the same table.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of a token.
    """

    def __init__(self, *, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.tokens, self.start = nn.Embedding(vocab_size, dim), nn.Parameter(torch.randn(dim))
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.tokens.weight, std=dim**-0.5)

    def forward(self, tokens: Int[Tensor, "B L"], last: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B L+1 D"]:
        """Vectors of START, or of the last token before, and of the tokens; see :func:`embed_after`."""
        return embed_after(self.start, self.tokens, tokens, None if last is None else last[:, None])

    def vectors(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Vectors of the tokens alone, without dropout."""
        out: Tensor = self.tokens(tokens) * self.start.numel() ** 0.5
        return out

    def logits(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Logits of the next token."""
        return F.linear(self.norm(x), self.tokens.weight)

    def output(self, x: Float[Tensor, "B L D"], segment: Segment, *, rows: int | None = None) -> SegmentOutput:
        """The output for a segment whose token ``n`` is predicted from ``x[:, n]``; ``rows`` tokens at once."""
        return output_from_table(self.norm(x), self.tokens.weight, segment, rows=rows)


def embed_after(
    start: Float[Tensor, " D"], table: nn.Module, tokens: Int[Tensor, "B L"], before: Int[Tensor, "B O"] | None = None
) -> Float[Tensor, "B _ D"]:
    """Vectors of what stands before a segment, and of its tokens, each of a length near ``sqrt(D)``.

    Args:
        start: The vector of START.
        table: The table of embeddings.
        tokens: Tokens of a segment.
        before: The tokens before them, with START for each that is ``ABSENT``; without any, START stands there.
    """
    scale = start.numel() ** 0.5
    first = start.expand(len(tokens), 1, -1)
    if before is not None and before.shape[1]:
        first = torch.where((before == ABSENT)[:, :, None], first, table(before.clamp(min=0)) * scale)
    return torch.cat((first, table(tokens) * scale), dim=1)


@torch.no_grad()
def init_weights(blocks: nn.Module) -> None:
    """Initialise linear maps at unit gain with zero bias, and the output of memory attention at zero.

    So an untrained model equals its twin without memory, and the content of untrained slots does no harm.
    """
    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in blocks.modules():
        if isinstance(module, SlotReader):
            nn.init.zeros_(module.attention.to_out.weight)


def causal_blocks(config: BlockConfig, *, layers: int, reads_memory: bool = False) -> nn.ModuleList:
    """Build the blocks of a decoder-only model.

    Raises:
        UsageError: ``layers`` is below 1.
    """
    require_sizes(most=LARGEST, layers=layers)
    blocks = nn.ModuleList(TransformerBlock(each, reads_memory=reads_memory) for each in config.of_layers(layers))
    init_weights(blocks)
    return blocks


def visible_by_rank(ranks: Int[Tensor, " P"]) -> Bool[Tensor, "1 1 P P"]:
    """A mask in which each position sees those of its own rank or below."""
    return (ranks[:, None] >= ranks)[None, None]
