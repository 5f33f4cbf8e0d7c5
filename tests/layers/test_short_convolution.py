"""The short convolution: four tokens by hand, and what it carries from segment to segment."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.layers.short_convolution import TAPS, ShortConvolution

close = torch.testing.assert_close
CHANNELS = 3


def convolution() -> ShortConvolution:
    torch.manual_seed(0)
    return ShortConvolution(channels=CHANNELS).double()


def inputs(length: int, *, lanes: int = 2) -> Tensor:
    return torch.randn(lanes, length, CHANNELS, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


NOTHING = torch.zeros(2, TAPS - 1, CHANNELS, dtype=torch.float64)


def test_five_tokens_by_hand() -> None:
    layer, x = ShortConvolution(channels=1), torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])[None, :, None]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None])  # the last weight is that of the present token
    mixed, carried = layer(x, torch.zeros(1, 3, 1), torch.tensor([5]))
    close(mixed[0, :, 0], F.silu(torch.tensor([4.0, 43.0, 432.0, 4321.0, 43210.0])))
    assert carried[0, :, 0].tolist() == [100.0, 1000.0, 10000.0]


def test_it_is_that_of_torch() -> None:
    layer, x = convolution(), inputs(7)
    mixed, _ = layer(x, NOTHING, torch.tensor([7, 7]))
    padded = F.pad(x.mT, (TAPS - 1, 0))
    close(mixed, F.silu(F.conv1d(padded, layer.weight.T[:, None], groups=CHANNELS)).mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", range(8))
def test_two_segments_equal_one_with_the_gradient(cut: int) -> None:
    layer, x = convolution(), inputs(7).requires_grad_()
    whole, last = layer(x, NOTHING, torch.tensor([7, 7]))
    first, carried = layer(x[:, :cut], NOTHING, torch.tensor([cut, cut]))
    second, carried = layer(x[:, cut:], carried, torch.tensor([7 - cut, 7 - cut]))
    parts = torch.cat((first, second), dim=1)
    close((parts, carried), (whole, last), rtol=1e-12, atol=1e-12)
    weights = torch.arange(parts.numel()).view_as(parts)
    one, other = (torch.autograd.grad((each * weights).sum(), x)[0] for each in (whole, parts))
    close(other, one, rtol=1e-12, atol=1e-12)


def test_each_lane_carries_its_own_last_inputs() -> None:
    before, x = inputs(3), inputs(5)
    _, carried = convolution()(x, before, torch.tensor([0, 2]))
    assert torch.equal(carried[0], before[0])
    assert torch.equal(carried[1], torch.stack((before[1, 2], x[1, 0], x[1, 1])))
