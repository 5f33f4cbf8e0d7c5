"""The numbers do not depend on how many processes ran: two and four do what one with all the lanes does.

python -m pytest -m slow tests/training/test_many_ranks.py    # four of them
"""

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from faulty import Faulty
from lightning import Callback, Trainer
from models import LENGTH, VOCAB, memformer
from torch import Tensor, multiprocessing

from memformer_pl.callbacks import RunRecord
from memformer_pl.checkpoints.format import KEY
from memformer_pl.data import LaneLoader, Rollout
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.data.revisiting import Revisit
from memformer_pl.training.nonfinite import FILE
from memformer_pl.training.task import SegmentTask

WHOLE_RUN = True  # see tests/conftest.py
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

ROLLOUTS, HALF = 10, 5
LANES, GROUPS = 4, 2
FAILING_LANE = 3


class Case(NamedTuple):
    """A run of ten rollouts."""

    name: str
    precision: str = "64-true"
    accumulate: int = 1
    resumes_from: int = 0
    """The number of processes whose checkpoint after five rollouts it begins with; 0 for none."""
    fault: str | None = None
    """In the third rollout."""
    max_skipped: int = 5
    revisit: Revisit | None = None


SINGLE, DOUBLE = Case("single", precision="32-true"), Case("double")
ACCUMULATING = Case("accumulating", accumulate=2)
CASES = (SINGLE, DOUBLE, ACCUMULATING)
LOSS, MEMORY = (Case(fault, fault=fault) for fault in ("infinite loss", "nan memory"))
ENDS = Case("ends", fault="nan loss", max_skipped=1)
REVISITING = Case("revisiting", accumulate=2, revisit=Revisit(share=0.5, size=8))


class After(Callback):
    """Keeps what every rollout read and what was logged, and a checkpoint in the middle and at the end."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.documents: list[Tensor] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: SegmentTask, batch: Rollout, batch_idx: int) -> None:
        model, lanes = pl_module.model, LANES // trainer.world_size
        if self.case.fault and pl_module._rollouts == 2 and trainer.global_rank == FAILING_LANE // lanes:
            model.fault, model.lane, model.failing = self.case.fault, FAILING_LANE % lanes, [batch.segments[1].tokens]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: SegmentTask, outputs: object, batch: Rollout, _: int
    ) -> None:
        self.documents.append(batch.documents)
        if self.case.fault is None:  # a fault is found a rollout later, as without this callback
            pl_module.settle()
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if "tokens" not in name}
        self.logged.append(figures)
        if pl_module._rollouts in (HALF, ROLLOUTS):
            trainer.save_checkpoint(self.folder / f"{pl_module._rollouts}.ckpt")


def loader(rank: int, ranks: int, *, shuffle: bool = True, revisit: Revisit | None = None) -> LaneLoader:
    """Documents of 1 to 59 tokens: segments and lanes are ragged, and documents start everywhere.

    Those that are read again have at most 15, so that several are.
    """
    random, longest = np.random.default_rng(0), 60 if revisit is None else 16
    documents = [random.integers(VOCAB, size=length) for length in random.integers(1, longest, size=30)]
    packed, groups = PackedDocuments.from_arrays(documents), GROUPS if shuffle else 1
    sizes: dict[str, Any] = {"batch_size": LANES, "segment_length": LENGTH, "horizon": 3, "interleave": groups}
    return LaneLoader(packed, **sizes, shuffle=shuffle, revisit=revisit, rank=rank, world_size=ranks)


def place(root: Path, case: str, ranks: int, resumes_from: int = 0) -> Path:
    return root / f"{case} from {resumes_from}" / f"{ranks} ranks"


def train(case: Case, root: Path, *, rank: int, ranks: int) -> None:
    """Run a case on one rank of several, and save what it ends with."""
    folder = place(root, case.name, ranks, case.resumes_from)
    folder.mkdir(parents=True, exist_ok=True)
    model = memformer(encoder_layers=1, decoder_layers=1).float()
    model.__class__, model.failing = Faulty, []
    after = After(case, folder)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        strategy="ddp" if ranks > 1 else "auto",
        devices=ranks,
        precision=case.precision,
        max_steps=ROLLOUTS // case.accumulate if case.fault is None else ROLLOUTS - 1,
        val_check_interval=ROLLOUTS,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[after, RunRecord()],
        default_root_dir=folder,
        enable_model_summary=False,
        **quiet,
    )
    options = {
        "accumulate_grad_batches": case.accumulate,
        "max_skipped": case.max_skipped,
        "warmup_steps": 3,
        "learning_rate": 0.01,
    }
    task = SegmentTask(model=model, **options)
    begin = place(root, case.name, case.resumes_from) / f"{HALF}.ckpt" if case.resumes_from else None
    outcome = "ended"
    try:
        given = loader(rank, ranks, revisit=case.revisit)
        trainer.fit(task, given, loader(rank, ranks, shuffle=False), ckpt_path=begin)
    except FloatingPointError as error:
        outcome = str(error)
    kept = {"weights": dict(task.state_dict()), "documents": after.documents, "logged": after.logged}
    torch.save({**kept, "outcome": outcome}, folder / f"rank{rank}.pt")


def run_rank(rank: int, ranks: int, port: int, root: Path, cases: tuple[Case, ...]) -> None:
    """A process of several, started from outside, as Lightning finds it in the environment."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    for case in cases:
        train(case, root, rank=rank, ranks=ranks)
    torch.distributed.destroy_process_group()


def in_processes(ranks: int, root: Path, *cases: Case) -> None:
    """Run cases one after the other, each on all ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(run_rank, args=(ranks, port, root, cases), nprocs=ranks)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one rank does, and two, and each from where the other was."""
    folder = tmp_path_factory.mktemp("ranks")
    for case in (SINGLE, ACCUMULATING, MEMORY, REVISITING):
        train(case, folder, rank=0, ranks=1)
    resumed = [case._replace(resumes_from=1) for case in (ACCUMULATING, REVISITING)]
    in_processes(2, folder, SINGLE, ACCUMULATING, MEMORY, ENDS, REVISITING, *resumed)
    for case in (ACCUMULATING, REVISITING):
        train(case._replace(resumes_from=2), folder, rank=0, ranks=1)
    return folder


def kept(root: Path, case: str, ranks: int, resumes_from: int = 0) -> list[Mapping[str, Any]]:
    """What each rank ended with."""
    folder = place(root, case, ranks, resumes_from)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]


def assert_like_one_rank(root: Path, case: Case, ranks: int, resumes_from: int = 0) -> None:
    """Weights, what each global lane reads and carries, and what is logged, are those of one rank with all lanes."""
    tolerance = 1e-6 if case.precision == "32-true" else 1e-12
    (one,), many = kept(root, case.name, 1), kept(root, case.name, ranks, resumes_from)
    for name, expected in one["weights"].items():
        assert expected.dtype == (torch.float32 if case.precision == "32-true" else torch.float64)
        assert all(torch.equal(rank["weights"][name], many[0]["weights"][name]) for rank in many), name
        torch.testing.assert_close(many[0]["weights"][name], expected, rtol=0, atol=tolerance)
    read = [torch.cat(documents, dim=1) for documents in zip(*(rank["documents"] for rank in many), strict=True)]
    assert len(read) == ROLLOUTS - (HALF if resumes_from else 0)
    assert all(map(torch.equal, read, one["documents"][-len(read) :]))
    for rank in many:
        for got, expected in zip(rank["logged"], one["logged"][-len(read) :], strict=True):
            assert got == pytest.approx(expected, rel=10 * tolerance, nan_ok=True)
    ends = [place(root, case.name, 1), place(root, case.name, ranks, resumes_from)]
    states = [torch.load(end / f"{ROLLOUTS}.ckpt", weights_only=True)[KEY]["states"] for end in ends]
    assert list(states[0]) == list(range(GROUPS))
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=10 * tolerance)


def test_rollouts_are_ragged_and_weights_move(root: Path) -> None:
    """Else the tests below would show little."""
    given = [rollout.segments for rollout, _ in zip(loader(0, 1), range(ROLLOUTS), strict=False)]
    tokens = torch.stack([torch.stack([segment.token_mask.sum(1) for segment in segments]) for segments in given])
    assert len(tokens.unique()) == LENGTH
    # the halves of a rollout have unequal shares of its tokens
    first, second = tokens.sum(1)[:, :2].sum(1), tokens.sum(1)[:, 2:].sum(1)
    assert int((first != second).sum()) >= 5
    (one,) = kept(root, SINGLE.name, 1)
    start = memformer(encoder_layers=1, decoder_layers=1).float().state_dict()
    moved = {name: float((one["weights"][f"model.{name}"] - value).abs().max()) for name, value in start.items()}
    assert min(moved.values()) > 0.01


@pytest.mark.parametrize("case", [SINGLE, ACCUMULATING], ids=lambda case: case.name)
def test_two_ranks_end_where_one_rank_with_all_lanes_ends(root: Path, case: Case) -> None:
    assert_like_one_rank(root, case, 2)


def test_a_run_resumes_with_twice_or_half_the_ranks_in_the_middle_of_a_step(root: Path) -> None:
    assert_like_one_rank(root, ACCUMULATING, 2, resumes_from=1)
    assert_like_one_rank(root, ACCUMULATING, 1, resumes_from=2)


def test_what_is_read_again_does_not_depend_on_the_number_of_ranks(root: Path) -> None:
    assert_like_one_rank(root, REVISITING, 2)
    assert_like_one_rank(root, REVISITING, 2, resumes_from=1)
    assert_like_one_rank(root, REVISITING, 1, resumes_from=2)
    (one,) = kept(root, REVISITING.name, 1)
    drawn = torch.stack(one["documents"])[:, :, 1::2]
    assert len(drawn[drawn >= 0].unique()) > 5
    ends = [place(root, REVISITING.name, ranks) / f"{ROLLOUTS}.ckpt" for ranks in (1, 2)]
    revisits = [torch.load(end, weights_only=True)[KEY]["revisits"] for end in ends]
    torch.testing.assert_close(revisits[1], revisits[0], rtol=0, atol=1e-11)


def test_a_fault_on_one_rank_is_skipped_by_all_and_blamed_on_its_lane(root: Path) -> None:
    assert_like_one_rank(root, MEMORY, 2)
    reports = [json.loads((place(root, MEMORY.name, ranks) / FILE).read_text()) for ranks in (1, 2)]
    assert reports[0] == reports[1]
    ((rollout,),) = (step["rollouts"] for step in reports[1]["steps"])
    assert [lane["lane"] for lane in rollout["lanes"]] == [FAILING_LANE]
    for rank in kept(root, MEMORY.name, 2):
        assert [figures["train/skipped"] for figures in rank["logged"]] == [0.0] * 3 + [1.0] * (ROLLOUTS - 3)


def test_a_run_that_has_to_end_ends_on_all_ranks_with_the_same_words(root: Path) -> None:
    one, two = (rank["outcome"] for rank in kept(root, ENDS.name, 2))
    assert one == two
    assert "skipped 1 steps in a row" in one
    assert f"rollout 2 in lane {FAILING_LANE}" in one
    record = json.loads((place(root, ENDS.name, 2) / "record.json").read_text())
    assert record["diverged"]
    assert record["steps"] == 2


@pytest.fixture(scope="module")
def more(root: Path) -> Path:
    """The same of one, two and four ranks, and of each from where another was."""
    for case in (DOUBLE, LOSS):
        train(case, root, rank=0, ranks=1)
    in_processes(2, root, DOUBLE, LOSS)
    in_processes(4, root, *CASES, LOSS, MEMORY, *(c._replace(resumes_from=n) for c in CASES for n in (1, 2)))
    in_processes(2, root, *(case._replace(resumes_from=n) for case in CASES for n in (1, 4)))
    for case in CASES:
        for ranks in (2, 4):
            train(case._replace(resumes_from=ranks), root, rank=0, ranks=1)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("ranks", "resumes_from"), [(a, b) for a in (1, 2, 4) for b in (0, 1, 2, 4) if a != b and (a, b) != (1, 0)]
)
def test_one_two_and_four_ranks_end_alike_from_wherever_they_resume(
    more: Path, ranks: int, resumes_from: int, case: Case
) -> None:
    assert_like_one_rank(more, case, ranks, resumes_from=resumes_from)


@pytest.mark.slow
@pytest.mark.parametrize("case", [LOSS, MEMORY], ids=lambda case: case.name)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_fault_on_one_of_many_ranks_is_skipped_by_all(more: Path, ranks: int, case: Case) -> None:
    assert_like_one_rank(more, case, ranks)
