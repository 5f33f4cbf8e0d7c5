"""How far segments move memory, and how disturbances grow, is measured in mid-document."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import Outcome
from models import make_segment
from torch import Tensor

from memformer_pl.contract import Segment, SegmentModel, SegmentOutput
from memformer_pl.errors import UsageError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


class Carried(NamedTuple):
    memory: Tensor
    last: Tensor


class Tripling(SegmentModel[Carried]):
    """Makes its memory three times as long; the other field, which is not memory, is replaced."""

    unread = ("last",)

    def initial_state(self, lanes: int) -> Carried:
        return Carried(torch.ones(lanes, 2, 4, dtype=torch.float64), torch.zeros(lanes))

    def step(self, segment: Segment, state: Carried) -> tuple[SegmentOutput, Carried]:
        losses = 0.0 * state.memory.sum() * segment.token_mask
        output = SegmentOutput(losses, torch.zeros_like(segment.token_mask), losses.new_zeros(()))
        return output, Carried(3 * state.memory, torch.zeros_like(state.last))


def test_a_memory_that_triples_moves_by_twice_its_length_and_triples_disturbances(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import memory_stability

    read = [make_segment([4, 4, 0], document_start=[1, 1, 0]), make_segment([4, 4, 0], document_start=[0, 1, 0])]
    rollout = SimpleNamespace(segments=read, documents=torch.tensor([[5, 6, -1], [5, 7, -1]]))
    first, second = memory_stability.segments(Tripling(vocab_size=64, segment_length=16), iter([rollout]))
    assert first.shape == (2, 0)  # documents begin
    assert second[:, 0] == pytest.approx([2.0, 3.0], rel=1e-9)  # of the only lane in mid-document
    assert second.shape == (2, 1)


def test_runs_are_printed_and_one_without_memory_is_refused(
    small: Path,
    command: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import memory_stability

    folders = []
    for slots in (4, 0):
        options = [f"--model.model.init_args.slots={slots}", f"--trainer.logger.init_args.version={slots}_slots"]
        assert command("fit", f"--config={small}", *options).code == 0
        folders.append(small.parent / "run" / f"{slots}_slots")
    capsys.readouterr()
    memory_stability.main(folders[:1])
    head, _, line = capsys.readouterr().out.splitlines()
    assert head == "| run | memory moves by | a disturbance grows by | at the 90th percentile | at most |"
    assert line.startswith("| 4 slots | ")
    moved, grown, often, most = map(float, line.strip("| ").split(" | ")[1:])
    assert 0 < moved < 2
    assert 0 < grown <= often <= most < 2
    with pytest.raises(UsageError, match="0_slots has no memory: leave it out"):
        memory_stability.main(folders)
    assert not capsys.readouterr().out
