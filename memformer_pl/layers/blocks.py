"""The layers of encoder and decoder, which are pre-norm residual branches, and what stands at the end of them."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.layers.attention import Attention
from memformer_pl.layers.memory import SlotReader
from memformer_pl.layers.positions import Rotation
from memformer_pl.recurrence import Reading, Segment


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
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
        if self.heads < 1 or self.dim < 1 or self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got heads={self.heads} and dim={self.dim}")
        if self.ffn_dim < 1:
            raise ValueError(f"ffn_dim must be at least 1, got {self.ffn_dim}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")


class FeedForward(nn.Module):
    """A hidden layer for each token by itself."""

    def __init__(self, *, dim: int, hidden: int) -> None:
        super().__init__()
        self.expand, self.contract = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """What the hidden layer makes of each token."""
        out: Tensor = self.contract(F.gelu(self.expand(x)))
        return out


class EncoderLayer(nn.Module):
    """Tokens read each other in both directions, then memory where there is one, then think by themselves (the
    paper's figure of the encoder)."""

    def __init__(self, sizes: LayerSizes, *, reads_memory: bool) -> None:
        super().__init__()
        dim, heads = sizes.dim, sizes.heads
        self.self_norm, self.self_attention = nn.LayerNorm(dim), Attention(dim=dim, heads=heads)
        if reads_memory:
            self.memory_norm, self.memory_reader = nn.LayerNorm(dim), SlotReader(dim=dim, heads=heads)
        self.reads_memory = reads_memory
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), FeedForward(dim=dim, hidden=sizes.ffn_dim)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        memory: Float[Tensor, "B M D"],
        *,
        visible: Bool[Tensor, "B 1 1 L"],
        rotation: Rotation,
    ) -> Float[Tensor, "B L D"]:
        """The tokens one layer further up."""
        normed = self.self_norm(x)
        x = x + self.dropout(self.self_attention(normed, normed, visible=visible, rotations=(rotation, rotation)))
        if self.reads_memory:
            x = x + self.dropout(self.memory_reader(self.memory_norm(x), memory))
        out: Tensor = x + self.dropout(self.ffn(self.ffn_norm(x)))
        return out


class DecoderLayer(nn.Module):
    """Tokens read those before them, then the encoded previous segment, then think by themselves."""

    def __init__(self, sizes: LayerSizes) -> None:
        super().__init__()
        dim, heads = sizes.dim, sizes.heads
        self.self_norm, self.self_attention = nn.LayerNorm(dim), Attention(dim=dim, heads=heads)
        self.cross_norm, self.cross_attention = nn.LayerNorm(dim), Attention(dim=dim, heads=heads)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), FeedForward(dim=dim, hidden=sizes.ffn_dim)
        self.dropout = nn.Dropout(sizes.dropout)

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


def token_reading(logits_BLV: Float[Tensor, "B L V"], segment: Segment) -> Reading:
    """The reading of a model that gives every token of a segment a distribution.

    Losses are at least float32: the next bfloat16 after 7 nats is 7.03.
    """
    wide_BLV = logits_BLV.to(torch.promote_types(logits_BLV.dtype, torch.float32))
    losses_BL = F.cross_entropy(wide_BLV.flatten(0, 1), segment.tokens.flatten(), reduction="none")
    losses_BL = losses_BL.view_as(segment.tokens).masked_fill(~segment.present, 0.0)
    correct_BL = (logits_BLV.detach().argmax(-1) == segment.tokens) & segment.present
    return Reading(losses_BL, correct_BL, losses_BL.new_zeros(()))
