"""Initialise an encoder and its memory as an associative memory (ours: the paper does not specify initial weights).

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
"""Length of the bias that the norm before self-attention adds, so that a head can attend by position alone."""

PAIRS = 3
"""Number of fastest rotary pairs of channels by which the look-back head tells positions apart."""

STRENGTH = 3.5
"""Length of its queries and keys in each of these pairs: the previous token gets most of the attention."""

CONTENT = 0.2
"""Factor on attention by content in that head."""


@torch.no_grad()
def init_associative(layers: nn.ModuleList, *, rotary: RotaryPositions, writer: SlotWriter | None) -> None:
    """Initialise so that a written token records the token before it, and a reader finds it by that token.

    The first head of the first layer attends one token back. The keys of each layer's reader match its queries to what
    that head adds, as the writer stores it: a token attends to slots that hold what once followed a token like it. The
    two parts are learned fast, but each only once the other is there, so lookup takes long from random weights.

    Args:
        layers: The untrained encoder.
        rotary: Its rotary positions.
        writer: Writer of its memory; None without slots.
    """
    first = layers[0]
    assert isinstance(first, TransformerBlock)
    _init_look_back(first, rotary)
    if writer is None:
        return
    width = rotary.width
    attention = first.self_attention
    value_KD = attention.to_query_key_value.weight[-attention.to_query_key_value.in_features :][:width]
    follower_DD = writer.to_value.weight @ attention.to_out.weight[:, :width] @ value_KD
    follower_DD = F.normalize(follower_DD.flatten(), dim=0).view_as(follower_DD) * len(follower_DD) ** 0.5
    for layer in layers:
        assert isinstance(layer, TransformerBlock)
        reader = layer.memory_reader.attention
        reader.to_key_value.weight[: len(follower_DD)] = reader.to_query.weight @ follower_DD.T


def _init_look_back(layer: TransformerBlock, rotary: RotaryPositions) -> None:
    """Make the first head of a layer attend to the previous token: its queries and keys are nearly the same for all
    tokens, the keys rotated by one step more. Other heads and values do not see the bias of the norm."""
    attention, width = layer.self_attention, rotary.width
    dim = attention.to_query_key_value.in_features
    shared_D = F.normalize(torch.randn(dim), dim=0)
    layer.self_norm.bias.copy_(CONSTANT * shared_D)
    others_DD = torch.eye(dim) - torch.outer(shared_D, shared_D)
    whole = attention.to_query_key_value.weight
    whole.copy_(whole @ others_DD)
    query_K, key_K = look_back_vectors(rotary)
    for weight, position_K in ((whole[:dim], query_K), (whole[dim:], key_K)):
        weight[:width] = CONTENT * weight[:width] + torch.outer(position_K, shared_D) / CONSTANT


def look_back_vectors(rotary: RotaryPositions) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """A query and a key, the same for all tokens, whose product is largest if the key is one token before the query."""
    half = rotary.width // 2
    turns = rotary.base ** (-torch.arange(half) / half)
    strength = torch.where(torch.arange(half) < PAIRS, STRENGTH, 0.0)
    query_K = torch.cat((strength, torch.zeros(half)))
    return query_K, torch.cat((strength * turns.cos(), strength * turns.sin()))
