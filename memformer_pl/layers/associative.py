"""How an untrained encoder and its memory begin as an associative memory (ours: the paper does not say how weights
begin).

D  width     K  width of a head
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.layers.memory import SlotWriter
from memformer_pl.layers.rotary import RotaryPositions
from memformer_pl.layers.transformer import TransformerBlock

CONSTANT = 4.0
"""Length of what the norm before self-attention adds to every token, so that a head can attend by place alone."""

PAIRS = 3
"""Pairs of channels, those that turn the fastest, by which the head that looks back tells places apart."""

STRENGTH = 3.5
"""Length of its queries and keys in each of these pairs: the token before gets most of the attention."""

CONTENT = 0.2
"""What is left in that head of attention by content."""


@torch.no_grad()
def init_associative(layers: nn.ModuleList, *, rotary: RotaryPositions, writer: SlotWriter | None) -> None:
    """Start the encoder so that a token that was written tells which token stood before it, and is found by that.

    The first head of the first layer looks one token back. Each layer's reader starts with the keys of its queries, as
    the writer leaves what that head has added: so a token attends to slots that hold what once followed on a token
    like it. Each by itself is learned fast, but only where the other is already there; begun at random, the two
    are what lookup waits for.

    Args:
        layers: The encoder, untrained.
        rotary: Its rotary positions.
        writer: Of its memory; None where there are no slots.
    """
    first = layers[0]
    assert isinstance(first, TransformerBlock)
    _look_back(first, rotary)
    if writer is None:
        return
    width = rotary.width
    attention = first.self_attention
    value_KD = attention.to_key_value.weight[-attention.to_key_value.in_features :][:width]
    followed_DD = writer.to_value.weight @ attention.to_out.weight[:, :width] @ value_KD
    followed_DD = F.normalize(followed_DD.flatten(), dim=0).view_as(followed_DD) * len(followed_DD) ** 0.5
    for layer in layers:
        assert isinstance(layer, TransformerBlock)
        reader = layer.memory_reader.attention
        reader.to_key_value.weight[: len(followed_DD)] = reader.to_query.weight @ followed_DD.T


def _look_back(layer: TransformerBlock, rotary: RotaryPositions) -> None:
    """Turn the first head of a layer to the token before: its queries and keys are nearly the same for all tokens, the
    keys turned one step further. What the norm adds for that is hidden from all other heads, and from values."""
    attention, width = layer.self_attention, rotary.width
    dim = attention.to_query.in_features
    shared_D = F.normalize(torch.randn(dim), dim=0)
    layer.self_norm.bias.copy_(CONSTANT * shared_D)
    others_DD = torch.eye(dim) - torch.outer(shared_D, shared_D)
    for projection in (attention.to_query, attention.to_key_value):
        projection.weight.copy_(projection.weight @ others_DD)
    query_K, key_K = looking_back(rotary)
    for weight, place_K in ((attention.to_query.weight, query_K), (attention.to_key_value.weight, key_K)):
        weight[:width] = CONTENT * weight[:width] + torch.outer(place_K, shared_D) / CONSTANT


def looking_back(rotary: RotaryPositions) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """A query and a key, the same for all tokens, whose product is largest where the key stands one token before."""
    half = rotary.width // 2
    turns = rotary.base ** (-torch.arange(half) / half)
    strength = torch.where(torch.arange(half) < PAIRS, STRENGTH, 0.0)
    query_K = torch.cat((strength, torch.zeros(half)))
    return query_K, torch.cat((strength * turns.cos(), strength * turns.sin()))
