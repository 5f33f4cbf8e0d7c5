"""Relative attention against a loop from the paper's equations, and by hand; what a cache keeps of each lane."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from memformer_pl.contract import ABSENT, Segment
from memformer_pl.layers.relative_attention import RelativeAttention, distances_to_keys, shift, sinusoid
from memformer_pl.layers.xl_cache import (
    cached_and_causal,
    filled_part,
    follow_caches,
    number_caches,
    push,
    take_rows,
)

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attention(*, dim: int = 8, heads: int = 2) -> RelativeAttention:
    """Relative attention in double precision, with biases as if it had been trained a little."""
    layer = RelativeAttention(dim=dim, heads=heads).double()
    for bias in (layer.content_bias, layer.distance_bias):
        torch.nn.init.normal_(bias)
    return layer


def causal(length: int, source: int) -> Tensor:
    return torch.ones(1, 1, length, source, dtype=torch.bool).tril(source - length)


def naive(layer: RelativeAttention, x: Tensor, source: Tensor, visible: Tensor) -> Tensor:
    """The four terms of section 3.3, one query, one key and one distance at a time."""
    dim, heads, (length, keys) = x.shape[-1], layer.heads, visible.shape[-2:]
    width = dim // heads
    w_key, w_value = layer.to_key_value.weight.split(dim)
    out = torch.zeros_like(x)
    for b, h, i in product(range(len(x)), range(heads), range(length)):
        of_head = slice(h * width, (h + 1) * width)
        q = layer.to_query.weight[of_head] @ x[b, i]
        u, v = layer.content_bias[h, 0], layer.distance_bias[h, 0]
        scores, values = [], []
        for j in range(keys):
            distance = i + (keys - length) - j
            angles = [distance * 10_000 ** (-2 * n / dim) for n in range(dim // 2)]
            sines = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles]).double()
            k, r = w_key[of_head] @ source[b, j], layer.to_distance.weight[of_head] @ sines
            if visible[min(b, len(visible) - 1), 0, i, j]:
                scores.append((q @ k + q @ r + u @ k + v @ r) / width**0.5)
                values.append(w_value[of_head] @ source[b, j])
        out[b, i, of_head] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out @ layer.to_out.weight.T


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (1, 4), (4, 0), (4, 2), (3, 7)])
def test_it_is_the_loop_over_the_four_terms_of_the_paper(length: int, cached: int) -> None:
    layer, source = attention(), torch.randn(2, cached + length, 8).double()
    visible = causal(length, cached + length).repeat(2, 1, 1, 1)
    visible[1, ..., : cached // 2] = False
    x = source[:, cached:]
    # the sinusoid is computed in float32
    close(layer(x, source, visible=visible), naive(layer, x, source, visible), rtol=0, atol=1e-6)


def test_two_tokens_by_hand() -> None:
    # Width 2, one head, no content: the score of distance d is sin d, by v = (1, 0). The second token sees the first
    # at distance 1, itself at 0: odds of exp(sin 1 / sqrt 2) to 1.
    layer, x = attention(dim=2, heads=1), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]).double()
    with torch.no_grad():
        for linear in (layer.to_query, layer.content_bias):
            (linear.weight if isinstance(linear, torch.nn.Linear) else linear).zero_()
        layer.distance_bias.copy_(torch.tensor([1.0, 0.0]))
        layer.to_distance.weight.copy_(torch.eye(2))
        layer.to_key_value.weight.copy_(torch.eye(2).repeat(2, 1))
        layer.to_out.weight.copy_(torch.eye(2))
    odds = math.exp(math.sin(1) / math.sqrt(2))
    expected = torch.tensor([[[1.0, 0.0], [odds / (odds + 1), 1 / (odds + 1)]]]).double()
    close(layer(x, x, visible=causal(2, 2)), expected, rtol=0, atol=1e-7)


def test_without_terms_of_distance_the_order_of_what_is_cached_does_not_matter() -> None:
    layer, source, order = attention(), torch.randn(2, 8, 8).double(), torch.tensor([2, 0, 4, 1, 3, 5, 6, 7])
    x, visible = source[:, 5:], causal(3, 8)
    assert not torch.allclose(layer(x, source[:, order], visible=visible), layer(x, source, visible=visible))
    torch.nn.init.zeros_(layer.to_distance.weight)
    close(layer(x, source[:, order], visible=visible), layer(x, source, visible=visible), rtol=1e-12, atol=1e-14)


def test_rows_are_shifted_so_that_the_last_stays() -> None:
    shifted = shift(torch.arange(12.0).view(1, 1, 3, 4))
    assert shifted[0, 0].tolist() == [[2, 3, 4], [5, 6, 7], [8, 9, 10]]


def test_sinusoids_that_were_computed_before_change_no_bit() -> None:
    layer, source, visible = attention(), torch.randn(2, 7, 8).double(), causal(3, 7)
    distances = distances_to_keys(7, like=source)
    assert torch.equal(distances, sinusoid(torch.tensor([6, 5, 4, 3, 2, 1, 0, -1]), dim=8).double())
    given = layer(source[:, 4:], source, visible=visible, distances=distances)
    assert torch.equal(given, layer(source[:, 4:], source, visible=visible))
    other = layer(source[:, 4:], source, visible=visible, distances=distances.flip(0))
    assert not torch.allclose(given, other)


def test_a_sinusoid_by_hand() -> None:
    expected = [[0, 0, 1, 1], [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]]
    close(sinusoid(torch.tensor([0, 2]), dim=4), torch.tensor(expected))


def test_the_weights_that_its_probe_shows_are_a_softmax_over_what_is_visible() -> None:
    layer, source, seen = attention(), torch.randn(2, 5, 8).double(), []
    layer.weights.register_forward_hook(lambda probe, args, value: seen.append(value.detach()))
    layer(source[:, 2:], source, visible=causal(3, 5))
    assert seen[0].shape == (2, 2, 3, 5)
    close(seen[0].sum(-1), torch.ones(2, 2, 3).double())
    assert not seen[0].masked_select(~causal(3, 5)).any()


def test_heads_must_divide_the_width_and_it_must_be_even() -> None:
    for heads in (0, 3):
        with pytest.raises(ValueError, match=f"heads must divide dim, got heads={heads} and dim=8"):
            RelativeAttention(dim=8, heads=heads)
    with pytest.raises(ValueError, match="relative positions need an even dim, got dim=9"):
        RelativeAttention(dim=9, heads=3)


def test_a_cache_keeps_the_last_rows_of_each_lane() -> None:
    cache, new = torch.tensor([[0.0, 0.0, 3.0], [1.0, 2.0, 3.0]])[..., None], torch.tensor([[4.0, 5.0], [4.0, 5.0]])
    kept = push(cache.expand(-1, -1, 2), new[..., None].expand(-1, -1, 2), torch.tensor([2, 1]))
    assert kept[..., 0].tolist() == [[3, 4, 5], [2, 3, 4]]
    assert torch.equal(kept[..., 0], kept[..., 1])
    longer = push(cache[:, 2:], new[..., None], torch.tensor([2, 0]))
    assert longer[..., 0].tolist() == [[5], [3]]


def test_a_cache_of_several_layers_carries_no_graph() -> None:
    cache, new = torch.randn(2, 4, 3, 8, requires_grad=True), torch.randn(2, 4, 5, 8, requires_grad=True)
    kept = push(cache, new, torch.tensor([5, 2]))
    assert not kept.requires_grad
    assert torch.equal(kept[0], new[0, :, 2:])
    assert torch.equal(kept[1], torch.cat((cache[1, :, 2:], new[1, :, :2]), dim=1))


def test_what_a_token_may_see_of_a_cache_and_of_its_segment() -> None:
    cached = filled_part(torch.tensor([0, 1, 2]), rows=2)
    assert cached.tolist() == [[False, False], [False, True], [True, True]]
    visible = cached_and_causal(cached, length=2).int()
    assert visible[:, 0].tolist() == [
        [[0, 0, 1, 0], [0, 0, 1, 1]],
        [[0, 1, 1, 0], [0, 1, 1, 1]],
        [[1, 1, 1, 0], [1, 1, 1, 1]],
    ]


def test_what_caches_hold_in_a_rollout_by_hand() -> None:
    # Two lanes and two rows. The second lane has read one token before; it reads one, then none, and then starts anew.
    masks = [[[1, 1], [1, 0]], [[1, 0], [0, 0]], [[1, 1], [1, 1]]]
    starts = [[0, 0], [0, 0], [0, 1]]
    segments = [
        Segment(torch.zeros(2, 2, dtype=torch.int64), torch.tensor(mask).bool(), torch.tensor(start).bool())
        for mask, start in zip(masks, starts, strict=True)
    ]
    entering = number_caches(torch.tensor([2, 1]), torch.tensor([8, 9]), rows=2)
    read = torch.tensor([[10, 20], [11, 21], [12, 22]]).unbind()
    caches = follow_caches(segments, entering, read)
    # rows that entered: 1 to 4; new ones: 5, 6 and 7, 8 of the first segment, and so on
    rows = torch.stack([cache.rows[..., 0] for cache in caches])
    assert rows.tolist() == [[[1, 2], [0, 4]], [[5, 6], [4, 7]], [[6, 9], [0, 0]], [[13, 14], [15, 16]]]
    assert [cache.last.tolist() for cache in caches] == [[8, 9], [10, 20], [11, ABSENT], [12, 22]]
    cache, new = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[..., None], torch.arange(5.0, 17.0).view(6, 2, 1)
    assert torch.equal(take_rows(rows, cache, new)[..., 0], rows.float())
