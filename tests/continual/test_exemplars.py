"""Exemplars: which are chosen, and how many a budget leaves room for, to the byte."""

import numpy as np
import pytest
import torch

from memformer_pl.continual.backbones import ResNet
from memformer_pl.continual.exemplars import METHODS, exemplars_for, herd
from memformer_pl.continual.net import ExpandingNet
from memformer_pl.continual.task import auxiliary_targets
from memformer_pl.errors import OptionError

IMAGE = 32 * 32 * 3
DER_10 = 2_000 * IMAGE + 10 * 463_504 * 4
"""Bytes of DER after ten tasks, with 2,000 exemplars."""
DER_20 = 2_000 * IMAGE + 20 * 463_504 * 4


def room(method: str, budget: int | None, tasks: int = 10) -> int | None:
    kind = METHODS[method]
    net = ExpandingNet(ResNet(), sizes=[1], shares=kind.shares, grows=kind.grows)
    return exemplars_for(method, budget, model_bytes=net.stored_bytes(tasks), image_bytes=IMAGE)


def test_herding_follows_the_mean() -> None:
    features = np.array([(1, 0), (0, 1), (0.8, 0.6)])
    assert features.mean(0) == pytest.approx((0.6, 0.533), abs=1e-3)
    assert herd(features, 3) == herd(features, 9) == [2, 1, 0]
    assert herd(features, 2) == [2, 1]
    assert herd(features, 0) == []


def test_herding_takes_the_first_of_equally_good_ones() -> None:
    assert herd(np.ones((4, 2)), 3) == [0, 1, 2]


def test_auxiliary_targets_are_zero_for_every_known_class() -> None:
    assert auxiliary_targets(torch.tensor([0, 3, 4, 5]), known=4).tolist() == [0, 0, 1, 2]


def test_a_model_is_worth_603_exemplars() -> None:
    assert 463_504 * 4 // IMAGE == 603
    assert room("replay", 2 * 463_504 * 4) == 603


@pytest.mark.parametrize(
    ("method", "tasks", "exemplars"),
    [("der", 10, 2_000), ("memo", 10, 3_312), ("replay", 10, 7_431), ("der", 20, 2_000), ("memo", 20, 4_771)],
)
def test_memory_aligned_budgets_of_the_paper(method: str, tasks: int, exemplars: int) -> None:
    assert room(method, DER_10 if tasks == 10 else DER_20, tasks) == exemplars


@pytest.mark.parametrize("method", ["memo", "der", "replay"])
def test_a_budget_holds_to_the_byte(method: str) -> None:
    kind = METHODS[method]
    model = ExpandingNet(ResNet(), sizes=[1], shares=kind.shares, grows=kind.grows).stored_bytes(10)
    assert [room(method, model + more) for more in (0, IMAGE - 1, IMAGE, 2 * IMAGE)] == [0, 0, 1, 2]
    said = f"{method} stores a model of {model:,} bytes, more than the budget of {model - 1:,}: raise budget"
    with pytest.raises(OptionError, match=said):
        room(method, model - 1)


def test_a_budget_is_needed_by_methods_that_keep_exemplars_and_by_no_others() -> None:
    with pytest.raises(OptionError, match="memo needs a budget: the bytes of its model, 14,507,584, and of its"):
        room("memo", None)
    with pytest.raises(OptionError, match="joint keeps everything, whatever the budget: set budget to null, got 7"):
        room("joint", 7)
    with pytest.raises(OptionError, match="fine_tuning keeps nothing"):
        room("fine_tuning", 7)
    assert (room("joint", None), room("fine_tuning", None)) == (None, 0)
