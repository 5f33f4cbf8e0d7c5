"""Dropout is a function of a seed and a place: how many entries it drops, and on what they depend."""

from itertools import combinations

import pytest
import torch
from models import make_segment, split_mix
from torch import Tensor

from memformer_pl.layers import add_update, draw_keep, draw_seeds, drop
from memformer_pl.layers.dropout import STREAM, random_bits

close = torch.testing.assert_close


def keep_of(
    *shape: int, seeds: tuple[int, ...] = (7,), rate: float = 0.5, part: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The factors ``[B, L, D]`` of one branch."""
    (keep,) = draw_keep(torch.tensor(seeds), torch.ones(*shape, dtype=dtype), rate=rate, part=part, branches=[1])
    assert keep is not None
    return keep[0]


def test_random_bits_are_those_that_are_published_of_splitmix64() -> None:
    bits = random_bits(torch.tensor([0, 1234567]), first=0, count=3)
    assert [[number % 2**64 for number in stream] for stream in bits.tolist()] == [
        [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F],
        [6457827717110365317, 3203168211198807973, 9817491932198370423],
    ]


@pytest.mark.parametrize("first", [0, 5, 7 * STREAM, 4000 * STREAM + 3])
def test_random_bits_of_any_seed_and_place_are_those_of_splitmix64(first: int) -> None:
    seeds = [0, 1, 2**62 - 1, 2**63 - 1, -(2**63), -1]
    bits = random_bits(torch.tensor(seeds), first=first, count=4)
    assert bits.tolist() == [[split_mix(seed, first + n) for n in range(4)] for seed in seeds]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_as_many_are_dropped_as_should_be_independently_and_the_mean_stays(rate: float, dtype: torch.dtype) -> None:
    n = 1_000_003
    keep = keep_of(1, n, 1, rate=rate, dtype=dtype).flatten()
    zero, factor = keep == 0, keep.max().item()
    assert keep.dtype == dtype
    assert torch.equal(keep, factor * (~zero).to(dtype))
    # the mean is one of what is drawn, not of what was asked for: a rate is rounded to a multiple of 2^-16
    assert factor * (1 - round(rate * 2**16) / 2**16) == pytest.approx(1, rel=torch.finfo(dtype).eps)
    assert abs(keep.double().mean() - 1) < 5 * (rate / (1 - rate) / n) ** 0.5 + torch.finfo(dtype).eps
    # also of neighbours, which come from one random number
    for together, expected in ((zero, rate), *((zero[k:] & zero[:-k], rate * rate) for k in (1, 2, 3, 4))):
        spread = (expected * (1 - expected) / len(together)) ** 0.5
        assert abs(together.double().mean() - expected) < 6 * spread


def test_other_seeds_parts_branches_and_lanes_drop_other_entries_independently() -> None:
    lanes, length, dim = 2, 300, 100
    like, zeros = torch.ones(lanes, length, dim), []
    for seed, part in ((7, 0), (8, 0), (7, 1), (2**62 - 1, 5)):
        for keep in draw_keep(torch.tensor([seed]), like, rate=0.3, part=part, branches=[1, 2]):
            zeros.extend((keep == 0).flatten(0, 1))
    assert len(zeros) == 4 * 3 * lanes
    for a, b in combinations(zeros, 2):
        spread = (0.09 * 0.91 / a.numel()) ** 0.5
        assert abs((a & b).double().mean() - 0.09) < 6 * spread


def test_several_seeds_draw_for_each_segment_what_its_seed_draws_alone() -> None:
    seeds, branches = torch.tensor([3, 2**62 - 1, 5]), [1, 3, 2]
    together = draw_keep(seeds, torch.ones(6, 3, 5), rate=0.4, part=2, branches=branches)
    alone = [draw_keep(seeds[n : n + 1], torch.ones(2, 3, 5), rate=0.4, part=2, branches=branches) for n in range(3)]
    assert [tuple(keep.shape) for keep in together] == [(1, 6, 3, 5), (3, 6, 3, 5), (2, 6, 3, 5)]
    for keep, apart in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(keep, torch.cat(apart, dim=1))


def test_the_same_entries_are_dropped_in_every_precision_and_at_every_call() -> None:
    state = torch.get_rng_state()
    dropped = [keep_of(2, 3, 5, dtype=dtype) == 0 for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(dropped[0], dropped[1])
    assert torch.equal(dropped[0], dropped[2])


def test_dropout_at_the_ends_of_its_chances() -> None:
    assert torch.equal(keep_of(1, 1000, 100, rate=1e-9), torch.ones(1, 1000, 100).double())
    keep = keep_of(1, 1000, 100, rate=0.999999)
    assert keep.max() in (0, 65536)
    assert (keep > 0).sum() < 10


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    segment, state = make_segment([5, 3])._replace(seeds=torch.tensor([1])), torch.get_rng_state()
    for each in (segment, segment._replace(seeds=None)):
        assert draw_seeds(each, rate=0.0, training=True) is None
        assert draw_seeds(each, rate=0.5, training=False) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert draw_keep(None, torch.ones(2, 5, 4), rate=0.5, part=0, branches=[1, 2]) == [None, None]


def test_seeds_are_those_of_the_segment_or_one_number_of_the_default_stream() -> None:
    segment, seeds, state = make_segment([5, 3]), torch.tensor([1, 2]), torch.get_rng_state()
    assert draw_seeds(segment._replace(seeds=seeds), rate=0.5, training=True) is seeds
    assert torch.equal(torch.get_rng_state(), state)
    drawn = [draw_seeds(segment, rate=0.5, training=True) for _ in range(100)]
    assert {(tuple(seed.shape), seed.dtype) for seed in drawn} == {((1,), torch.int64)}
    assert len({int(seed) for seed in drawn}) == 100
    torch.set_rng_state(state)
    assert torch.equal(torch.randint(1 << 62, (1,)), drawn[0])


def test_an_update_is_added_where_it_is_kept_and_everywhere_without_dropout() -> None:
    x, update, keep = (
        torch.randn(2, 3, 4),
        torch.randn(2, 3, 4),
        torch.stack((keep_of(2, 3, 4), keep_of(2, 3, 4, part=1))),
    )
    for branch in (0, 1, -1):
        close(add_update(x, update, keep.float(), branch), x + update * keep.float()[branch])
    assert torch.equal(add_update(x, update, None, 1), x + update)
    assert torch.equal(drop(x, keep.float()), x * keep.float()[0])
    assert drop(x, None) is x


def test_the_gradient_of_an_update_is_right_once_and_twice_and_under_vmap() -> None:
    x, update = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    keep = keep_of(2, 3, 4)[None]
    assert torch.autograd.gradcheck(lambda x, update: add_update(x, update, keep, 0), (x, update))
    assert torch.autograd.gradgradcheck(lambda x, update: add_update(x, update, keep, 0), (x, update))
    many = torch.randn(2, 5, 2, 3, 4, dtype=torch.float64)
    added = torch.func.vmap(lambda x, update: add_update(x, update, keep, 0))(*many)
    close(added, many[0] + many[1] * keep[0])
    grad = torch.func.grad(lambda x, update: add_update(x, update, keep, 0).sum(), argnums=(0, 1))
    of_x, of_update = torch.func.vmap(grad)(*many)
    assert torch.equal(of_x, torch.ones_like(many[0]))
    assert torch.equal(of_update, keep.expand_as(many[0]))


def test_under_autocast_each_gradient_has_the_precision_of_what_it_is_of() -> None:
    x, update = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4).bfloat16().requires_grad_()
    keep = keep_of(2, 3, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = add_update(x, update, keep[None], 0)
    out.sum().backward()
    assert out.dtype == x.grad.dtype == torch.float32
    assert torch.equal(update.grad, keep.bfloat16())
    close(out, x + update.float() * keep)
