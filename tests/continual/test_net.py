"""The expanding network: what grows, what is frozen, and what it weighs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memformer_pl.continual.backbones import Backbone, ConvNet, ResNet
from memformer_pl.continual.exemplars import METHODS
from memformer_pl.continual.net import ExpandingNet
from memformer_pl.errors import UsageError


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small(*sizes: int, shares: bool = True, grows: bool = True) -> ExpandingNet:
    return ExpandingNet(ConvNet(shallow=[4], deep=[6, 5]), sizes=sizes, shares=shares, grows=grows)


def test_the_parts_of_resnet32_have_the_parameters_of_the_paper() -> None:
    backbone = ResNet()
    shallow, deep = size(backbone.build_shallow()), size(backbone.build_deep())
    assert (shallow, deep, shallow + deep) == (112_016, 351_488, 463_504)


@pytest.mark.parametrize(
    ("backbone", "pixels"), [(ResNet(blocks=2), 32), (ConvNet(channels=3), 8)], ids=["res", "conv"]
)
def test_a_backbone_turns_images_into_its_features(backbone: Backbone, pixels: int) -> None:
    maps = backbone.build_shallow()(torch.rand(2, 3, pixels, pixels))
    assert backbone.build_deep()(maps).shape == (2, backbone.features)


def test_a_residual_block_is_its_shortcut_where_its_convolutions_are_zero() -> None:
    block = ResNet().build_deep()[0].eval()
    nn.init.zeros_(block.layers[-1].weight)
    maps = torch.rand(2, 32, 8, 8)
    made = block(maps)
    assert torch.equal(made[:, :32], maps[:, :, ::2, ::2])
    assert made.shape == (2, 64, 4, 4)
    assert not made[:, 32:].any()


@pytest.mark.parametrize("method", ["memo", "der", "replay"])
def test_the_stored_bytes_are_four_for_each_parameter_of_the_parts(method: str) -> None:
    kind = METHODS[method]
    net = ExpandingNet(ConvNet(), sizes=[2, 3, 1], shares=kind.shares, grows=kind.grows)
    assert net.stored_bytes(3) == 4 * (size(net) - size(net.head) - size(net.auxiliary or nn.Identity()))
    assert len(net.parts) == (3 if kind.grows else 1)


def test_a_new_part_is_a_copy_of_the_last_and_all_before_it_are_frozen() -> None:
    net = small(2, 2, 3)
    for one, other in zip(net.parts[1].state_dict().values(), net.parts[2].state_dict().values(), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
    assert [all(p.requires_grad for p in part.parameters()) for part in net.parts] == [False, False, True]
    assert all(p.requires_grad for p in net.shallow.parameters())
    assert [part.training for part in net.train().parts] == [False, False, True]
    assert not any(module.training for part in net.parts[:-1] for module in part.modules())


@pytest.mark.parametrize("shares", [True, False])
def test_training_changes_nothing_of_a_frozen_part_and_goes_on_with_the_shared_one(shares: bool) -> None:
    net = small(2, 2, shares=shares).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=0.1
    )
    for _ in range(3):
        scores = net(torch.rand(8, 1, 8, 8))
        assert scores.auxiliary is not None
        targets = torch.randint(4, (8,))
        (F.cross_entropy(scores.logits, targets) + F.cross_entropy(scores.auxiliary, targets.clamp(max=2))).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("parts.0")}
    assert not {name for name in changed if name.startswith("parts.0")}
    assert {name for name in before if name.startswith(("parts.1", "shallow", "head", "auxiliary"))} == changed


def test_a_head_keeps_the_old_weights_and_with_zero_new_columns_the_old_logits() -> None:
    net = small(3).eval()
    images = torch.rand(4, 1, 8, 8)
    old, weight = net(images).logits, net.head.weight.clone()
    net.grow(2)
    assert net(images).logits.shape == (4, 5)
    assert torch.equal(net.head.weight[:3, :5], weight)
    assert not torch.allclose(net(images).logits[:, :3], old)  # the new columns are random
    with torch.no_grad():
        net.head.weight[:3, 5:] = 0
    torch.testing.assert_close(net(images).logits[:, :3], old)


def test_the_auxiliary_head_sees_the_newest_part_alone() -> None:
    net = small(2, 3).eval()
    images = torch.rand(4, 1, 8, 8)
    before = net(images)
    with torch.no_grad():
        for parameter in net.parts[0].parameters():
            parameter.mul_(2)
    after = net(images)
    assert before.auxiliary is not None
    assert before.auxiliary.shape == (4, 4)
    assert torch.equal(after.auxiliary, before.auxiliary)
    assert not torch.allclose(after.logits, before.logits)


def test_a_network_that_does_not_grow_has_one_part_and_no_auxiliary_head() -> None:
    net = small(2, 3, grows=False)
    assert (len(net.parts), net.head.in_features, net.head.out_features, net.auxiliary) == (1, 5, 5, None)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_alignment_brings_new_weights_to_the_mean_norm_of_the_old() -> None:
    net = small(2, 1)
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.weight[0, 0], net.head.weight[1, 1], net.head.weight[2, 2] = 2, 4, 6
    old = net.head.weight[:2].clone()
    assert net.align() == 0.5
    assert torch.equal(net.head.weight[:2], old)
    assert net.head.weight[2].norm() == 3


def test_growth_draws_the_same_on_every_device_and_keeps_the_precision() -> None:
    net = small(2).double()
    net.grow(2)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: small(), r"each task must have at least one class, got \[\]"),
        (lambda: small(2, 0), r"each task must have at least one class, got \[2, 0\]"),
        (lambda: ConvNet(shallow=[]), "shallow must list at least one width"),
        (lambda: ConvNet(deep=[16, 0]), "deep must be at least 1, got 0"),
        (lambda: ResNet(blocks=0), "blocks must be at least 1, got 0"),
    ],
)
def test_sizes_out_of_range_are_refused(made: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        made()  # type: ignore[operator]
