"""Attention by hand: among tokens, to another source, masks in every form, and the probe."""

import math

import pytest
import torch
from models import identities, shown
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.layers import (
    Attention,
    CrossAttention,
    Positions,
    RotaryPositions,
    SelfAttention,
    as_bias,
    causal_mask,
    rotated_keys_values,
)

close = torch.testing.assert_close


def random_mask(*shape: int) -> Tensor:
    """A mask under which every query sees something."""
    visible = torch.rand(*shape) < 0.6
    visible[..., 0] = True
    return visible


def test_two_tokens_read_each_other_as_worked_out_by_hand() -> None:
    # Queries, keys and values are the tokens. A token scores a^2 / sqrt(2) = ln 3 for itself and 0 for the other: it
    # takes 3/4 of itself and 1/4 of the other; where it may not see the other, all of itself.
    a = math.sqrt(math.sqrt(2) * math.log(3))
    x, visible = torch.tensor([[[a, 0.0], [0.0, a]]]).double(), causal_mask(2, device=torch.device("cpu"))
    among, across = SelfAttention(dim=2, heads=1).double(), CrossAttention(dim=2, heads=1).double()
    identities(among.to_query_key_value, among.to_out, across.to_query, across.to_key_value, across.to_out)
    both = torch.tensor([[[0.75 * a, 0.25 * a], [0.25 * a, 0.75 * a]]]).double()
    close(among(*among.project(x), Positions()), both)
    close(across(x, across.keys_values(x)), both)
    causal = torch.tensor([[[a, 0.0], [0.25 * a, 0.75 * a]]]).double()
    for at in (Positions(causal=True), Positions(visible), Positions(as_bias(visible, x))):
        close(among(*among.project(x), at), causal)
        close(across(x, across.keys_values(x), visible=visible if at.causal else at.visible), causal)


@pytest.mark.parametrize("rotated", [False, True])
def test_the_weight_of_self_attention_makes_queries_then_keys_then_values_each_head_by_head(rotated: bool) -> None:
    attention, x = SelfAttention(dim=8, heads=2).double(), torch.randn(2, 3, 8).double()
    rotation = RotaryPositions(width=4, first=0, last=2).span(0, 3) if rotated else None
    query, (key, value) = attention.project(x, rotation)
    for got, weight, turns in zip(
        (query, key, value), attention.to_query_key_value.weight.split(8), (1, 1, 0), strict=True
    ):
        expected = (x @ weight.T).unflatten(-1, (2, 4))
        expected = rotation.turn(expected) if rotation is not None and turns else expected
        close(got, expected.transpose(1, 2), rtol=1e-12, atol=1e-14)


def test_keys_and_values_for_all_layers_at_once_are_those_of_each_layer() -> None:
    layers, source = [CrossAttention(dim=8, heads=2).double() for _ in range(3)], torch.randn(2, 5, 8).double()
    rotation = RotaryPositions(width=4, first=-5, last=0)(torch.tensor([[-5, -4, -3, -2, -1], [-3, -2, -1, 0, 0]]))
    together = rotated_keys_values(layers, source, rotation)
    assert len(together) == 3
    for attention, (keys, values) in zip(layers, together, strict=True):
        key, value = attention.keys_values(source)
        close(keys, rotation.turn(key.transpose(1, 2)).transpose(1, 2), rtol=1e-12, atol=1e-14)
        close(values, value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_the_probed_weights_are_those_that_make_the_output(masked: bool, rotated: bool) -> None:
    attention, x, source = CrossAttention(dim=8, heads=2), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    visible = random_mask(2, 1, 3, 5) if masked else None
    positions = RotaryPositions(width=4, first=0, last=4)
    rotation = positions.span(0, 3) if rotated else None
    keys, values = rotated_keys_values([attention], source, positions.span(0, 5))[0]
    keys_values = (keys, values) if rotated else attention.keys_values(source)
    unwatched = attention(x, keys_values, visible=visible, rotation=rotation)
    weights = shown(attention.weights)
    assert torch.equal(attention(x, keys_values, visible=visible, rotation=rotation), unwatched)
    close(weights[0].sum(-1), torch.ones(2, 2, 3))
    assert visible is None or not weights[0].masked_select(~visible).any()
    close(attention.to_out((weights[0] @ values).transpose(1, 2).flatten(2)), unwatched)
    if visible is not None:
        attention(x, keys_values, visible=as_bias(visible, x), rotation=rotation)
        close(weights[1], weights[0])


def test_the_probe_shows_causal_weights_where_there_is_no_mask() -> None:
    attention, x = SelfAttention(dim=8, heads=2), torch.randn(2, 3, 8)
    query, keys_values = attention.project(x)
    unwatched, weights = attention(query, keys_values, Positions(causal=True)), shown(attention.weights)
    assert torch.equal(attention(query, keys_values, Positions(causal=True)), unwatched)
    assert torch.equal(weights[0] > 0, torch.ones(2, 2, 3, 3).tril().bool())
    close(attention.to_out((weights[0] @ keys_values[1]).transpose(1, 2).flatten(2)), unwatched)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mask_as_a_bias_gives_what_the_mask_gives_in_every_precision(dtype: torch.dtype, autocast: bool) -> None:
    attention, x, source = CrossAttention(dim=8, heads=2).to(dtype), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    visible = random_mask(2, 1, 1, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        keys_values, bias = attention.keys_values(source.to(dtype)), as_bias(visible, x.to(dtype))
        assert bias.dtype == keys_values[0].dtype
        assert torch.equal(bias == 0, visible)
        assert torch.equal(bias == -torch.inf, ~visible)
        out = attention(x.to(dtype), keys_values, visible=bias)
        close(out, attention(x.to(dtype), keys_values, visible=visible))
        hidden = attention(
            x.to(dtype), tuple(F.pad(field[:, :, :1], (0, 0, 0, 4)) for field in keys_values), visible=bias
        )
    assert not torch.equal(out, hidden)


def test_heads_must_divide_the_width() -> None:
    for heads in (0, 3, -2):
        for kind in (Attention, SelfAttention, CrossAttention):
            with pytest.raises(ValueError, match=f"heads must divide dim, got heads={heads} and dim=8"):
                kind(dim=8, heads=heads)
