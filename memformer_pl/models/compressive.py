"""Compressive Transformer (Rae et al. 2019, arXiv 1911.05507): rows that leave the cache are compressed.

B  lanes     L  tokens in a segment     M  cached tokens     C  compressed rows     N  layers     D  width
O  old rows, which leave the cache     P  rows that they are compressed to
"""

import math
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from memformer_pl.contract import ABSENT, Segment, SegmentOutput, detach
from memformer_pl.errors import LARGEST_WIDTH, UsageError, require_sizes
from memformer_pl.layers import (
    BlockConfig,
    Compressor,
    Pooling,
    RelativeBlock,
    attention_weights,
    drop,
    filled_part,
    push,
)
from memformer_pl.layers.compression import check_compression
from memformer_pl.models.xl_base import LastBlockInput, XLCache, XLTransformer


class CompressiveState(NamedTuple):
    """State of the Compressive Transformer; never with a graph."""

    cache: Float[Tensor, "B N M D"]
    """Inputs of each layer at the last tokens, right-aligned."""
    filled: Int[Tensor, " B"]
    """Number of filled rows."""
    compressed: Float[Tensor, "B N C D"]
    """Rows compressed from those that have left the cache, right-aligned."""
    compressed_filled: Int[Tensor, " B"]
    """Number of filled rows."""
    last: Int[Tensor, " B"]
    """The last token, still to be read; ``ABSENT`` if there is none."""


class Evicted(NamedTuple):
    """Rows that leave the cache, and their compressed form."""

    rows: Float[Tensor, "B N O D"]
    """Oldest first; zeros where ``exists`` is False."""
    exists: Bool[Tensor, "B O"]
    compressed: Float[Tensor, "B N P D"]
    compressed_exists: Bool[Tensor, "B P"]


class CompressiveTransformer(XLTransformer[CompressiveState]):
    """A Transformer-XL with a second cache behind the first: blocks of rows that leave the first are compressed to one
    row each (section 3).

    The compression network is trained by attention reconstruction alone: attention by content to compressed rows should
    give the same as attention to the old ones. No other parameter is trained by that loss, and the compression network
    by no other loss, so its scale is free: it is ``||attn(h, old) - attn(h, compressed)|| / sqrt(dim)``, the mean over
    layers and tokens (the paper's sum is far larger than the token losses, next to which it is shown and clipped).

    Ours: compressed rows are one position apart, like tokens; whole blocks leave the cache, a little early if a segment
    is not a whole number of blocks (the paper drops the remainder); caches that are not yet full are masked, not filled
    with zeros; and the choices of :class:`~memformer_pl.models.TransformerXL`.

    Args:
        vocab_size: Size of the vocabulary.
        dim: Width of tokens; even.
        heads: Attention heads; must divide ``dim``.
        ffn_dim: Width of the hidden layer after attention; by default four times ``dim``.
        feed_forward: Another feed-forward for some layers, such as :class:`~memformer_pl.layers.UltraMemory`:
            ``{class_path: UltraMemory, init_args: {keys: 64, ...}, layers: [1]}``, with layers counted from 0.
        layers: Number of blocks.
        memory_length: Number of cached tokens; at least ``compression``.
        compressed_length: Number of compressed rows; 0 gives a Transformer-XL.
        compression: Number of old rows that become one.
        compressor: ``conv``, ``dilated_conv``, ``max``, ``mean`` or ``most_used``.
        segment_length: The most tokens that a segment may hold.
        dropout: On the output of each branch of a layer, and on embeddings.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        heads: int,
        ffn_dim: int | None = None,
        feed_forward: dict[str, Any] | None = None,
        layers: int = 12,
        memory_length: int = 64,
        compressed_length: int = 64,
        compression: int = 4,
        compressor: Pooling = "conv",
        segment_length: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            segment_length=segment_length,
            layers=layers,
            memory_length=memory_length,
            block=BlockConfig(dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=dropout, feed_forward=feed_forward),
        )
        require_sizes(least=0, most=LARGEST_WIDTH, compressed_length=compressed_length)
        check_compression(compressor, compression)
        if compressed_length > 0 and memory_length < compression:
            raise UsageError(f"memory_length must be at least compression, got {memory_length=} and {compression=}")
        self.compressed_length, self.compression, self.compressor = compressed_length, compression, compressor
        compressors = (Compressor(pooling=compressor, dim=dim, rate=compression) for _ in range(layers))
        self.compressors = nn.ModuleList(compressors if compressed_length else ())

    def initial_state(self, lanes: int) -> CompressiveState:
        """Two empty caches, and no token before the first."""
        cache, compressed = (
            self.zeros(lanes, self.layers, rows, self.dim) for rows in (self.memory_length, self.compressed_length)
        )
        none = self.filled_with(0, lanes=lanes)
        return CompressiveState(cache, none, compressed, none, self.filled_with(ABSENT, lanes=lanes))

    def step(self, segment: Segment, state: CompressiveState) -> tuple[SegmentOutput, CompressiveState]:
        """Predict the segment from both caches, with the loss of attention reconstruction."""
        entering, next_state, inputs, evicted = self._run_lower_blocks(segment, state)
        reconstruction = self._reconstruction_loss(segment, inputs, evicted)
        return self.predict(segment, entering)._replace(auxiliary_loss=reconstruction), next_state

    def run_lower_blocks(self, segment: Segment, state: CompressiveState) -> tuple[LastBlockInput, CompressiveState]:
        """Run all blocks but the last, cache the inputs of each block, and compress rows that leave the cache."""
        return self._run_lower_blocks(segment, state)[:2]

    def xl_cache(self, state: CompressiveState) -> XLCache:
        """Compressed rows, followed by the others."""
        compressed_exists = filled_part(state.compressed_filled, rows=self.compressed_length)
        exists = torch.cat((compressed_exists, filled_part(state.filled, rows=self.memory_length)), dim=1)
        return XLCache(state.last, torch.cat((state.compressed, state.cache), dim=2), exists)

    def _run_lower_blocks(
        self, segment: Segment, state: CompressiveState
    ) -> tuple[LastBlockInput, CompressiveState, Float[Tensor, "B N L D"], Evicted]:
        state = detach(state)
        x, arrived = self.embedding(segment.tokens[:, :-1], state.last), segment.token_mask.sum(1)
        _, hidden, exists = self.xl_cache(state)
        keep = self.keep(self.seeds(segment), x, part=0, blocks=self.blocks)
        at = self.positions(exists, length=x.shape[1])
        inputs = self.block_inputs(drop(x, keep[0]), hidden, at, keep[1:])
        evicted = self._evict(segment, inputs.detach(), state)
        new_rows, old_rows = evicted.compressed_exists.sum(1), evicted.exists.sum(1)
        next_state = CompressiveState(
            push(state.cache, inputs, arrived),
            state.filled + arrived - old_rows,
            push(state.compressed, evicted.compressed, new_rows),
            (state.compressed_filled + new_rows).clamp(max=self.compressed_length),
            self.last_token(segment),
        )
        return LastBlockInput(inputs[:, -1], hidden[:, -1], at, keep[-1]), next_state, inputs, evicted

    def _evict(self, segment: Segment, inputs: Float[Tensor, "B N L D"], state: CompressiveState) -> Evicted:
        """The oldest blocks of cached and new rows, as many as must leave the cache."""
        arrived = segment.token_mask.sum(1)
        rate = self.compression if self.compressed_length else 1
        groups_B1 = (state.filled + arrived - self.memory_length + rate - 1).clamp(min=0)[:, None] // rate
        most = -(-inputs.shape[2] // rate)
        index = torch.arange(most * rate, device=inputs.device)
        exists, compressed_exists = index < groups_B1 * rate, index[:most] < groups_B1
        both = torch.cat((state.cache, inputs.to(state.cache.dtype)), dim=2)
        oldest_BO = (self.memory_length - state.filled[:, None] + index).clamp(max=both.shape[2] - 1)
        rows = both.take_along_dim(rearrange(oldest_BO, "B O -> B 1 O 1"), dim=2)
        rows = rows.masked_fill(~rearrange(exists, "B O -> B 1 O 1"), 0.0)
        compressed = [
            compressor(rows[:, n], self._usage(self.blocks[n], segment, inputs[:, n], rows[:, n], exists))
            for n, compressor in enumerate(self.compressors)
        ]
        return Evicted(rows, exists, torch.stack(compressed, dim=1) if compressed else rows, compressed_exists)

    def _reconstruction_loss(
        self, segment: Segment, inputs: Float[Tensor, "B N L D"], evicted: Evicted
    ) -> Float[Tensor, ""]:
        """The loss of attention reconstruction; 0 if there is nothing to train."""
        if next(self.compressors.parameters(), None) is None:
            return inputs.new_zeros(())
        distance_BL = inputs.new_zeros(segment.tokens.shape)
        for n, block in enumerate(self.blocks):
            x = inputs[:, n].detach()
            with torch.no_grad():
                wanted = attend_by_content(block, x, evicted.rows[:, n], evicted.exists)
            got = attend_by_content(block, x, evicted.compressed[:, n], evicted.compressed_exists)
            distance_BL = distance_BL + torch.linalg.vector_norm(wanted - got, dim=-1)
        counts = segment.token_mask & evicted.exists[:, :1]
        parts = counts.sum().clamp(min=1) * self.layers * math.sqrt(self.dim)
        return torch.where(counts, distance_BL, 0.0).sum() / parts

    @torch.no_grad()
    def _usage(
        self,
        block: nn.Module,
        segment: Segment,
        x: Float[Tensor, "B L D"],
        rows: Float[Tensor, "B O D"],
        exists: Bool[Tensor, "B O"],
    ) -> Float[Tensor, "B O"] | None:
        """The attention of the segment's tokens to each old row, by content; None unless ``most_used`` needs it."""
        if self.compressor != "most_used":
            return None
        query_BHLK, key_BHOK, _ = project(block, x, rows)
        weights_BHLO = attention_weights(query_BHLK, key_BHOK, at_least_one(exists))
        return (weights_BHLO * rearrange(segment.token_mask, "B L -> B 1 L 1")).sum((1, 2))


def attend_by_content(
    block: nn.Module, x: Float[Tensor, "B L D"], rows: Float[Tensor, "B O D"], exists: Bool[Tensor, "B O"]
) -> Float[Tensor, "B L D"]:
    """Attention of a layer's tokens to ``rows`` by content alone, without distances; the layer gets no gradient."""
    query_BHLK, key_BHOK, value_BHOK = project(block, x, rows)
    visible = at_least_one(exists)
    mixed_BHLK = F.scaled_dot_product_attention(query_BHLK, key_BHOK, value_BHOK, attn_mask=visible)
    return rearrange(mixed_BHLK, "B H L K -> B L (H K)")


def at_least_one(exists: Bool[Tensor, "B O"]) -> Bool[Tensor, "B 1 1 O"]:
    """The rows that exist, and always the first, since a softmax over nothing is NaN."""
    first = torch.arange(exists.shape[1], device=exists.device) == 0
    return rearrange(exists | first, "B O -> B 1 1 O")


def project(
    block: nn.Module, x: Float[Tensor, "B L D"], rows: Float[Tensor, "B O D"]
) -> tuple[Float[Tensor, "B H L K"], Float[Tensor, "B H O K"], Float[Tensor, "B H O K"]]:
    """A layer's queries of ``x``, and keys and values of ``rows``; the layer gets no gradient."""
    assert isinstance(block, RelativeBlock)
    attention = block.self_attention
    query = frozen(attention.to_query, frozen(block.self_norm, x))
    key_value = frozen(attention.to_key_value, frozen(block.self_norm, rows))
    query_BHLK = rearrange(query, "B L (H K) -> B H L K", H=attention.heads)
    key_BHOK, value_BHOK = rearrange(key_value, "B O (two H K) -> two B H O K", two=2, H=attention.heads)
    return query_BHLK, key_BHOK, value_BHOK


def frozen(module: nn.Module, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L E"]:
    """Apply a module to ``x``; its weights get no gradient."""
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    out: Tensor = functional_call(module, weights, (x,))
    return out
