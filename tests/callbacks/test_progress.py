"""Lines of progress for a log: when they are printed, what they say, and on which process."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import Progress, TextColumn
from tasks import small_memformer
from trainers import EPOCH, train

from memformer_pl.callbacks import ProgressLines, SegmentProgressBar
from memformer_pl.callbacks.progress import short_number, step_of
from memformer_pl.training.task import SegmentTask

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

LINE = r"step \d( of \d)?  \d\.\d{3} bits/byte(  [\d,.]+ tokens/s)?( +\d+:\d\d:\d\d left)?"


class Clock:
    """A clock that only moves when it is told."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


class Pass(Callback):
    """Every rollout of training takes so many seconds."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def on_train_batch_start(self, *args: object) -> None:
        self.clock.seconds += self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("memformer_pl.callbacks.progress.time", made)
    return made


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def run(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    options = {"limit_val_batches": 0, "max_steps": 6, **options}
    return train(folder, *callbacks, enable_progress_bar=True, **options).trainer


def test_a_line_is_printed_at_each_interval_and_not_before(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, Pass(clock, 10.0), ProgressLines(seconds=20.0))
    printed = lines(capsys)
    assert [line.split("  ")[0] for line in printed] == ["step 2 of 6", "step 4 of 6", "step 6 of 6"]
    assert all(re.fullmatch(LINE, line) for line in printed)
    run(tmp_path, Pass(clock, 10.0), ProgressLines())
    assert [line.split("  ")[0] for line in lines(capsys)] == ["step 3 of 6", "step 6 of 6"]  # 30 seconds by default
    run(tmp_path, Pass(clock, 1.0), ProgressLines())
    assert lines(capsys) == []


def test_a_line_has_step_bits_per_byte_tokens_per_second_and_time_left(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = run(tmp_path, Pass(clock, 100.0), ProgressLines(seconds=0.0))
    first, *_, last = printed = lines(capsys)
    assert len(printed) == 6
    # five steps of 100 seconds are left; the first rollout has no speed yet
    assert re.fullmatch(r"step 1 of 6  \d\.\d{3} bits/byte  0:08:20 left", first)
    assert re.fullmatch(r"step 6 of 6  \d\.\d{3} bits/byte  [\d,.]+ tokens/s  0:00:00 left", last)
    metrics = trainer.progress_bar_metrics
    assert f"  {short_number(float(metrics['bits/byte']))} bits/byte  " in last
    assert f"  {short_number(float(metrics['tokens/s']))} tokens/s  " in last


def test_a_run_without_a_last_step_has_no_time_left(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, Pass(clock, 10.0), ProgressLines(seconds=0.0), max_steps=-1, max_epochs=1)
    assert [line.split("  ")[0] for line in lines(capsys)] == [f"step {step}" for step in range(1, EPOCH + 1)]


def test_rollouts_that_do_not_complete_a_step_are_not_counted_as_steps(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    task = SegmentTask(model=small_memformer(), accumulate_grad_batches=2)
    run(tmp_path, Pass(clock, 10.0), ProgressLines(seconds=0.0), task=task, max_steps=2)
    first, *others = lines(capsys)
    assert re.fullmatch(r"step 0 of 2  \d\.\d{3} bits/byte", first)
    assert [line.split("  ")[0] for line in others] == ["step 1 of 2", "step 1 of 2", "step 2 of 2"]


def test_a_validation_is_counted_and_its_result_printed(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"limit_val_batches": 2, "val_check_interval": 3, "num_sanity_val_steps": 2, "max_steps": 3}
    trainer = run(tmp_path, ProgressLines(seconds=0.0), **options)
    *_, one, two, result = printed = lines(capsys)
    assert [one, two] == ["step 3 of 3  validation 1 of 2", "step 3 of 3  validation 2 of 2"]
    bits = short_number(float(trainer.callback_metrics["validation/bits_per_byte"]))
    assert result == f"step 3 of 3  validation {bits} bits/byte"
    assert len(printed) == 3 + 3  # nothing of the check before training


@pytest.mark.parametrize("other", ["disabled", "rank"])
def test_other_ranks_print_nothing(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    progress = ProgressLines(seconds=0.0)
    if other == "rank":
        monkeypatch.setattr(Trainer, "is_global_zero", property(lambda trainer: False))
    else:
        progress.disable()
    run(tmp_path, Pass(clock, 10.0), progress, limit_val_batches=1, val_check_interval=3)
    assert lines(capsys) == []
    progress.enable()
    monkeypatch.undo()
    run(tmp_path, progress)
    assert len(lines(capsys)) == 6


def test_lightning_takes_either_for_its_progress_bar(tmp_path: Path) -> None:
    for kind in (ProgressLines, SegmentProgressBar):
        bar: ProgressBar = kind()
        assert run(tmp_path, bar, max_steps=1).progress_bar_callback is bar


@pytest.mark.parametrize(
    ("peak", "shown", "end"),
    [
        (None, {}, "0.00it/s  step: 12000 bits/byte: 2.346 tokens/s: 123,456"),
        (1e12, {"MFU": 0.4123}, "-:--:--  step: 12000 bits/byte: 2.346 tokens/s: 123,456 MFU: 41%"),
    ],
)
def test_the_bar_fits_a_hundred_columns_with_mfu_too(peak: float | None, shown: dict[str, float], end: str) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    task = SegmentTask(model=small_memformer(), peak_flops=peak)
    trainer.strategy.connect(task)
    task.trainer = trainer
    trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = 12000
    trainer.progress_bar_metrics.update({"bits/byte": 2.34567, "tokens/s": 123456.0, **shown})
    bar = SegmentProgressBar()
    metrics = " ".join(f"{name}: {value}" for name, value in bar.get_metrics(trainer, task).items())
    progress, console = Progress(*bar.configure_columns(trainer), TextColumn(metrics)), Console(width=200)
    progress.add_task("Epoch 12/-2", total=15000, completed=12000)
    with console.capture() as printed:
        console.print(progress.make_tasks_table(progress.tasks))
    line = printed.get().rstrip()
    assert line.startswith("Epoch 12   ━")
    assert line.endswith(end)
    assert len(line) <= 100


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0.000"), (2.34567, "2.346"), (99.9994, "99.999"), (100.0, "100"), (12345.6, "12,346")],
)
def test_numbers_are_short(value: float, expected: str) -> None:
    assert short_number(value) == expected


def test_steps_are_named_with_their_total_if_there_is_one(make_trainer: Callable[..., Trainer]) -> None:
    assert step_of(make_trainer(max_steps=1200)) == "step 0 of 1,200"
    assert step_of(make_trainer(max_steps=-1, max_epochs=1)) == "step 0"


@pytest.fixture
def make_trainer() -> Callable[..., Trainer]:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lambda **options: Trainer(accelerator="cpu", **quiet, **options)
