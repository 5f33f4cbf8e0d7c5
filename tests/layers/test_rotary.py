"""Rotary positions: what they turn by, their table, and where it goes with its module."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memformer_pl.layers import RotaryPositions, Rotation

close = torch.testing.assert_close


def turn(x: Tensor, positions: Tensor) -> Tensor:
    first, last = (int(position) for position in positions.aminmax())
    return RotaryPositions(width=x.shape[-1], first=first, last=last)(positions).turn(x)


def equal(a: Rotation, b: Rotation) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def test_a_pair_of_channels_turns_by_one_radian_a_token() -> None:
    turned = turn(torch.tensor([1.0, 0.0]).expand(1, 3, 1, 2), torch.tensor([[0, 1, -2]]))
    angles = torch.tensor([0.0, 1.0, -2.0])
    close(turned[0, :, 0], torch.stack((angles.cos(), angles.sin()), dim=-1))


def test_scores_depend_on_the_distance_of_two_tokens_alone() -> None:
    query, key = torch.randn(2, 1, 1, 1, 8).expand(-1, 1, 6, 1, 8)
    positions = torch.arange(6)[None]

    def scores(shift: int) -> Tensor:
        return turn(query, positions + shift)[0, :, 0] @ turn(key, positions + shift)[0, :, 0].T

    here = scores(0)
    for shift in (-7, 3, 50):
        close(scores(shift), here, rtol=0, atol=1e-4)
    for distance in range(-5, 6):
        diagonal = here.diagonal(distance)
        close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    by_distance = torch.stack([here.diagonal(distance)[0] for distance in range(-5, 6)])
    assert torch.pdist(by_distance[:, None]).min() > 1e-3


def test_turning_keeps_length_and_precision() -> None:
    x = torch.randn(2, 5, 3, 8)
    turned = turn(x, torch.arange(5).expand(2, -1))
    close(turned.norm(dim=-1), x.norm(dim=-1))
    assert turn(x.bfloat16(), torch.arange(5).expand(2, -1)).dtype == torch.bfloat16


def test_the_gradient_of_turning_is_right_once_and_twice_and_under_vmap() -> None:
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    rotation = RotaryPositions(width=4, first=-5, last=2)(torch.tensor([[-5, 0, 2], [1, 1, -1]]))
    assert torch.autograd.gradcheck(rotation.turn, x)
    assert torch.autograd.gradgradcheck(rotation.turn, x)
    many = torch.randn(5, *x.shape)
    assert torch.equal(torch.func.vmap(rotation.turn)(many), torch.stack([rotation.turn(each) for each in many]))
    grad = torch.func.grad(lambda x: rotation.turn(x).pow(3).sum())
    close(torch.func.vmap(grad)(many), torch.stack([grad(each) for each in many]))


def test_rotary_positions_need_pairs_of_channels() -> None:
    with pytest.raises(ValueError, match="even width, got width=3"):
        RotaryPositions(width=3, first=0, last=1)


def test_the_table_holds_the_sines_and_cosines_of_every_position() -> None:
    positions = torch.tensor([[-3, 0, 4], [2, 2, -1]])
    rotation = RotaryPositions(width=6, first=-3, last=4, base=100.0)(positions)
    angle = torch.tensor([[[p * 100 ** (-2 * n / 6) for n in range(3)] for p in lane] for lane in positions.tolist()])
    close(rotation.cos, torch.cat((angle.cos(), angle.cos()), dim=-1)[:, :, None], rtol=0, atol=1e-6)
    close(rotation.sin, torch.cat((-angle.sin(), angle.sin()), dim=-1)[:, :, None], rtol=0, atol=1e-6)


def test_the_slowest_pair_turns_by_the_inverse_of_the_base() -> None:
    cos, sin = (field[0, 0, 0] for field in RotaryPositions(width=1024, first=1, last=1).span(1, 2))
    assert cos[511].item() == pytest.approx(1.0, abs=1e-7)
    assert sin[1023].item() == pytest.approx(math.sin(10_000 ** -(1022 / 1024)), rel=1e-5)


def test_a_span_is_what_its_positions_give_without_a_copy() -> None:
    rotary = RotaryPositions(width=4, first=-3, last=5)
    for first, stop in ((-3, 6), (-1, 4), (2, 3)):
        assert equal(rotary.span(first, stop), rotary(torch.arange(first, stop)[None]))
    assert rotary.span(-1, 4).cos.untyped_storage().data_ptr() == rotary.span(-3, 0).cos.untyped_storage().data_ptr()
    assert equal(rotary.span(-3, 6).rows(slice(2, 7)), rotary.span(-1, 4))


@pytest.mark.parametrize(
    "change",
    [nn.Module.double, nn.Module.bfloat16, nn.Module.half, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
)
def test_the_table_is_the_same_after_a_copy_and_in_every_precision(change: Callable[[nn.Module], nn.Module]) -> None:
    rotary = RotaryPositions(width=4, first=-3, last=5)
    before = rotary.span(-3, 6)
    after = change(nn.Sequential(rotary, nn.Linear(2, 2)))[0]
    assert equal(after.span(-3, 6), before)
    assert before.cos.dtype == torch.float32


def test_the_table_follows_its_module_to_another_device_and_back() -> None:
    rotary = RotaryPositions(width=4, first=-3, last=5)
    before = rotary.span(-3, 6)
    assert {field.device.type for field in nn.Sequential(rotary).to("meta")[0].span(-3, 6)} == {"meta"}
    assert equal(rotary.to_empty(device="cpu").span(-3, 6), before)
    with torch.device("meta"):
        built = RotaryPositions(width=4, first=-3, last=5)
    assert built.span(-3, 6).cos.is_meta
    assert equal(built.to_empty(device="cpu").span(-3, 6), before)


def test_the_table_is_no_weight() -> None:
    assert not RotaryPositions(width=4, first=0, last=1).state_dict()
