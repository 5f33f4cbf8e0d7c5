"""The figures of training: what is logged under which step, and what callbacks find, though results arrive late."""

from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tasks import small_memformer
from trainers import EPOCH, Run, train

from memformer_pl.callbacks import ProgressLines
from memformer_pl.training.flops import training_flops
from memformer_pl.training.task import SegmentTask

WHOLE_RUN = True  # see tests/conftest.py
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning"),
]


def fit(folder: Path, *callbacks: Callback, accumulate: int = 1, peak: float | None = None, **options: Any) -> Run:
    task = SegmentTask(model=small_memformer(), accumulate_grad_batches=accumulate, peak_flops=peak)
    return train(folder, *callbacks, task=task, **{"max_epochs": 2, "limit_val_batches": 0, **options})


def logged(folder: Path, *callbacks: Callback, every: int = 1, **options: Any) -> tuple[Run, list[dict[str, str]]]:
    """A run, and the rows of its log."""
    log = CSVLogger(folder, name=None, version="")
    run = fit(folder, *callbacks, logger=log, log_every_n_steps=every, **options)
    head, *rows = (line.split(",") for line in (folder / "metrics.csv").read_text().splitlines())
    return run, [dict(zip(head, row, strict=True)) for row in rows]


class Found(Callback):
    """Keeps the loss that a callback finds after each rollout."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


class Stop(Callback):
    """Ends the run after so many rollouts."""

    def __init__(self, rollouts: int) -> None:
        self.rollouts = rollouts

    def on_train_batch_end(self, trainer: Trainer, task: SegmentTask, *args: object) -> None:
        trainer.should_stop = task._rollouts == self.rollouts


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_figures_are_logged_under_the_rollout_and_the_epoch_that_they_belong_to(
    tmp_path: Path, every: int, accumulate: int
) -> None:
    run, rows = logged(tmp_path, every=every, accumulate=accumulate)
    due = [step for step in range(2 * EPOCH) if (step + 1) % every == 0]
    assert [int(row["step"]) for row in rows] == due
    assert [int(row["epoch"]) for row in rows] == [step // EPOCH for step in due]
    assert [float(row["train/loss"]) for row in rows] == [run.seen.losses[step] for step in due]
    # those of a step stay until the next one
    first = accumulate - 1
    assert [bool(row["train/gradient_norm"]) for row in rows] == [step >= first for step in due]
    norms = {row["train/gradient_norm"] for row in rows if row["train/gradient_norm"]}
    assert len(norms) == len({(step - first) // accumulate for step in due if step >= first})


def test_a_callback_finds_the_rollout_before_but_the_first_and_the_last_of_an_epoch_at_once(tmp_path: Path) -> None:
    found = Found()
    run = fit(tmp_path, found)
    losses = run.seen.losses
    expected = [losses[0], *losses[: EPOCH - 2], losses[EPOCH - 1]]
    assert found.losses[:EPOCH] == expected
    assert found.losses[EPOCH:] == [losses[EPOCH - 1], *losses[EPOCH:-2], losses[-1]]


def test_what_is_validated_or_saved_after_a_rollout_finds_it_at_once(tmp_path: Path) -> None:
    found = Found()
    run = fit(tmp_path, found, limit_val_batches=1, val_check_interval=2)
    assert found.losses[1::2] == run.seen.losses[1::2]
    best = ModelCheckpoint(tmp_path, "{step}", monitor="train/loss", every_n_train_steps=1, save_top_k=1)
    run = fit(tmp_path, best, enable_checkpointing=True)
    lowest = min(run.seen.losses)
    assert best.best_model_score == pytest.approx(lowest, rel=1e-12)
    assert Path(best.best_model_path).stem == f"step={run.seen.losses.index(lowest) + 1}"


def test_a_run_that_is_stopped_logs_its_last_rollout(tmp_path: Path) -> None:
    run, rows = logged(tmp_path, Stop(4), min_epochs=0)
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    assert float(rows[-1]["train/loss"]) == run.seen.losses[-1] == float(run.trainer.callback_metrics["train/loss"])
    run, rows = logged(tmp_path / "rarely", Stop(4), min_epochs=0, every=50)
    assert [int(row["step"]) for row in rows] == [3]  # as Lightning does


def test_training_can_be_stopped_by_its_own_loss(tmp_path: Path) -> None:
    stopping = EarlyStopping("train/loss", min_delta=100.0, patience=1, check_on_train_epoch_end=True)
    assert fit(tmp_path, stopping, max_epochs=9).read == [EPOCH] * 2


def test_learning_rates_of_two_sources_agree(tmp_path: Path) -> None:
    _, rows = logged(tmp_path, LearningRateMonitor())
    ours, theirs = (
        {row["step"]: float(row[name]) for row in rows if row[name]} for name in ("train/learning_rate", "lr-AdamW/pg1")
    )
    assert ours == theirs
    assert len(ours) == 2 * EPOCH


def test_mfu_is_shown_wherever_a_speed_is_if_the_peak_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rows = logged(tmp_path, ProgressLines(seconds=0.0), peak=1e9, enable_progress_bar=True)
    flops = training_flops(run.task.model)
    for row in rows:
        assert bool(row["train/mfu"]) == bool(row["train/tokens_per_second"])
        if row["train/mfu"]:
            assert float(row["train/mfu"]) == pytest.approx(float(row["train/tokens_per_second"]) * flops / 1e9)
    assert run.trainer.progress_bar_metrics["MFU"] == float(rows[-1]["train/mfu"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert all((" tokens/s  " in line) == ("% MFU" in line) for line in lines)
    assert f"  {float(rows[-1]['train/mfu']):.1%} MFU" in lines[-1]


def test_without_a_peak_no_mfu_is_shown(tmp_path: Path) -> None:
    run, rows = logged(tmp_path)
    assert not [name for name in (*rows[0], *run.trainer.progress_bar_metrics) if "mfu" in name.lower()]


@pytest.mark.parametrize("peak", [0.0, -1.0, float("inf"), float("nan")])
def test_a_peak_that_cannot_be_one_is_refused(peak: float) -> None:
    with pytest.raises(ValueError, match="peak_flops must be above 0"):
        SegmentTask(model=small_memformer(), peak_flops=peak)
