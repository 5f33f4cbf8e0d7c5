"""A step whose outcome the host does not know yet: a flag on the device, and counts that can be restored."""

import pytest
import torch
from lightning.pytorch.loops.progress import _ReadyCompletedTracker
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from memformer_pl.data.lanes import LaneLoader
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.training.arriving import Arriving
from memformer_pl.training.optimizer import skipped_unless, skips_on_device
from memformer_pl.training.stepping import capture_counts

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def stepped(kind: type[Adam], takes: list[bool | None], device: str) -> list[Tensor]:
    """Weights, moments and counts after steps that are taken, skipped by the flag, or taken without a flag (None)."""
    weight = nn.Parameter(torch.linspace(-1, 1, 5, device=device))
    optimizer = kind([weight], lr=0.1, fused=True, weight_decay=0.1)
    for number, take in enumerate(takes):
        weight.grad = torch.full_like(weight, torch.nan if take is False else number - 1.5)
        if take is None:
            optimizer.step()
        else:
            with skipped_unless(torch.tensor(take, device=device), optimizer):
                optimizer.step()
    return [weight.detach(), *optimizer.state[weight].values()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_the_flag_skips_a_step_on_the_device_and_changes_nothing_else(kind: type[Adam], device: str) -> None:
    plain = stepped(kind, [None, None], device)
    for flagged in ([True, True], [True, True, False], [True, True, False, False]):
        assert all(map(torch.equal, stepped(kind, flagged, device), plain)), flagged
    first, *moments, steps = stepped(kind, [False], device)
    assert torch.equal(first, torch.linspace(-1, 1, 5, device=device))
    assert not any(moment.any() for moment in (*moments, steps))


def test_only_fused_adam_is_trusted_to_skip() -> None:
    weights = [nn.Parameter(torch.zeros(2))]
    trusted: list[Optimizer] = [AdamW(weights, fused=True), Adam(weights, fused=True)]
    others: list[Optimizer] = [AdamW(weights), SGD(weights), SGD(weights, fused=True, momentum=0.9)]
    rate = torch.tensor(0.1)  # a schedule would change it in place, so that it could not be restored
    assert all(map(skips_on_device, trusted))
    assert not any(map(skips_on_device, [*others, AdamW(weights, lr=rate, fused=True)]))


def test_the_flag_does_not_stay() -> None:
    optimizer = AdamW([nn.Parameter(torch.zeros(2))], fused=True)
    with pytest.raises(RuntimeError, match="interrupted"), skipped_unless(torch.tensor(False), optimizer):
        raise RuntimeError("interrupted")
    assert not hasattr(optimizer, "found_inf")


def test_counts_of_a_step_are_restored_with_all_options_that_a_schedule_sets() -> None:
    optimizer, count = AdamW([nn.Parameter(torch.zeros(2))], lr=0.1, fused=True), _ReadyCompletedTracker()
    scheduler = OneCycleLR(optimizer, max_lr=0.3, total_steps=9)  # it sets betas too
    seen: list[tuple[float, float]] = []
    for skipped in (False, True, True, False, False):
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
        uncount = capture_counts(optimizer, scheduler, [count])
        optimizer.step()
        scheduler.step()
        count.increment_by(1)
        if skipped:
            uncount()
    assert seen[1] == seen[2] == seen[3]
    assert len(set(seen)) == 3
    assert (count.completed, scheduler.last_epoch) == (3, 3)


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_arrive_whatever_is_computed_after_them(device: str) -> None:
    loss, count = torch.tensor(1.5, device=device), torch.tensor(7, device=device)
    arriving = Arriving(loss=loss, count=count, finite=loss.isfinite())
    torch.randn(100, 100, device=device) @ torch.randn(100, 100, device=device)
    assert arriving.wait() == {"loss": 1.5, "count": 7.0, "finite": 1.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_rollout_arrives_on_a_gpu_whole() -> None:
    documents = PackedDocuments.from_arrays([torch.arange(40).numpy(), torch.arange(40, 70).numpy()])
    rollout = next(iter(LaneLoader(documents, batch_size=2, segment_length=4, horizon=3)))
    moved = rollout.to(torch.device("cuda"))
    assert moved.documents.is_cuda
    torch.testing.assert_close(moved.to(torch.device("cpu")), rollout, rtol=0, atol=0)
