"""Every callback that Lightning ships does what it says, or is refused with what to do instead."""

import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from identical import assert_identical
from lightning import Callback, Trainer
from lightning.pytorch import callbacks as shipped
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from tasks import loader, small_memformer, weights
from trainers import EPOCH, Seen, train, trainer_of

from memformer_pl.checkpoints.format import KEY, read
from memformer_pl.data.lanes import Rollout
from memformer_pl.errors import UsageError
from memformer_pl.training.lr_schedule import lr_factor
from memformer_pl.training.task import SegmentTask
from memformer_pl.training.trainer_checks import CALLBACKS

WHOLE_RUN = True  # see tests/conftest.py
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning"),
    pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`, you need to define:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning"),
    # with an OnExceptionCheckpoint, lightning looks for a last checkpoint unasked, and says so
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model:UserWarning"),
    pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


def logged(folder: Path, *callbacks: Callback, **given: Any) -> list[dict[str, str]]:
    """The rows that a run logs with callbacks, of every rollout."""
    log = CSVLogger(folder, name=None, version="")
    train(folder, *callbacks, logger=log, log_every_n_steps=1, **given)
    head, *rows = (line.split(",") for line in (folder / "metrics.csv").read_text().splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


class Freeze(shipped.BaseFinetuning):
    """Trains the table of tokens from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[torch.Tensor] = []

    def freeze_before_training(self, pl_module: SegmentTask) -> None:
        self.freeze(pl_module.model.embedding)

    def finetune_function(self, pl_module: SegmentTask, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.embedding, optimizer)
        self.at.append(pl_module.model.embedding.weight.detach().clone())


def base_finetuning(folder: Path) -> None:
    frozen = Freeze()
    run = train(folder, frozen, max_epochs=2)
    first, second = frozen.at
    assert torch.equal(first, second)
    assert not torch.equal(second, run.task.model.embedding.weight)


def callback(folder: Path) -> None:
    run = train(folder)  # `Seen` is one
    assert len(run.seen.losses) == 4
    assert all(math.isfinite(loss) for loss in run.seen.losses)
    assert float(run.trainer.callback_metrics["train/loss"]) == run.seen.losses[-1]


class Counter(shipped.Checkpoint):
    """Keeps what a callback may keep in a checkpoint."""

    def __init__(self) -> None:
        self.rollouts = 0

    def on_train_batch_end(self, *args: object) -> None:
        self.rollouts += 1

    def state_dict(self) -> dict[str, int]:
        return {"rollouts": self.rollouts}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self.rollouts = state_dict["rollouts"]


def checkpoint(folder: Path) -> None:
    kept = shipped.ModelCheckpoint(folder, save_last=True, every_n_train_steps=2)
    resumed = Counter()
    train(folder, Counter(), kept, enable_checkpointing=True)
    train(folder, resumed, kept, max_steps=6, enable_checkpointing=True, resume=folder / "last.ckpt")
    assert resumed.rollouts == 6


def device_stats_monitor(folder: Path) -> None:
    rows = logged(folder, shipped.DeviceStatsMonitor(cpu_stats=True))
    assert any(name.startswith("DeviceStatsMonitor") for name in rows[0])


def early_stopping(folder: Path) -> None:
    stop = shipped.EarlyStopping("validation/bits_per_byte", min_delta=100.0, patience=2)
    assert train(folder, stop, max_epochs=9).read == [EPOCH] * 3
    with pytest.raises(RuntimeError, match=r"val_loss` which is not available.*validation/bits_per_byte"):
        train(folder, shipped.EarlyStopping("val_loss"), max_epochs=9)


def lambda_callback(folder: Path) -> None:
    epochs: list[int] = []
    train(folder, shipped.LambdaCallback(on_train_epoch_end=lambda trainer, _: epochs.append(1)), max_epochs=3)
    assert len(epochs) == 3


def learning_rate_monitor(folder: Path) -> None:
    rates = [1e-3 * lr_factor(step, warmup_steps=100, total_steps=4) for step in range(4)]
    for interval in (None, "step"):
        monitor = shipped.LearningRateMonitor(logging_interval=interval)
        rows = logged(folder / str(interval), monitor, limit_val_batches=0)
        for name in ("lr-AdamW/pg1", "lr-AdamW/pg2", "train/learning_rate"):
            assert [float(row[name]) for row in rows if row[name]] == pytest.approx(rates)


def model_checkpoint(folder: Path) -> None:
    best = shipped.ModelCheckpoint(folder, "{epoch}", monitor="validation/bits_per_byte", save_top_k=2)
    train(folder, best, max_epochs=3, enable_checkpointing=True)
    assert sorted(path.name for path in folder.iterdir()) == ["epoch=1.ckpt", "epoch=2.ckpt"]


def model_summary(folder: Path) -> None:
    for kind in (shipped.ModelSummary, shipped.RichModelSummary):
        assert train(folder, kind(max_depth=2), enable_model_summary=True).trainer.global_step == 4


class Interrupt(Callback):
    def on_train_batch_start(self, trainer: Trainer, task: SegmentTask, batch: Rollout, batch_idx: int) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("no more")


def interrupted(folder: Path, *callbacks: Callback, **given: Any) -> None:
    with pytest.raises(RuntimeError, match="no more"):
        train(folder, Interrupt(), *callbacks, enable_checkpointing=True, **given)


def on_exception_checkpoint(folder: Path) -> None:
    interrupted(folder, shipped.OnExceptionCheckpoint(folder, filename="broken"))
    assert train(folder, resume=folder / "broken.ckpt").trainer.global_step == 4


class Bar(shipped.ProgressBar):
    """The least that is one."""

    shown = 0

    def disable(self) -> None:
        """Nothing is drawn."""

    def enable(self) -> None:
        """Likewise."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: SegmentTask, *args: object) -> None:
        self.shown += "bits/byte" in self.get_metrics(trainer, pl_module)


def progress_bar(folder: Path) -> None:
    bar = Bar()
    train(folder, bar, enable_progress_bar=True)
    assert bar.shown == 4
    for other in (shipped.RichProgressBar(), shipped.TQDMProgressBar()):
        assert train(folder, other, enable_progress_bar=True).trainer.progress_bar_callback is other


def throughput_monitor(folder: Path) -> None:
    of_rollout = {"batch_size_fn": lambda rollout: rollout.documents.shape[1], "window_size": 2}
    rows = logged(folder, shipped.ThroughputMonitor(**of_rollout), limit_val_batches=0)
    samples = [float(row["train/samples"]) for row in rows if row["train/samples"]]
    assert samples == [2, 4, 6, 8]  # rollouts of two lanes


def timer(folder: Path) -> None:
    assert train(folder, shipped.Timer(timedelta(seconds=0)), max_steps=9).trainer.global_step == 0
    assert train(folder, shipped.Timer(timedelta(hours=1)), max_steps=3).trainer.global_step == 3


def weight_averaging(folder: Path) -> None:
    """A run that is resumed ends as one that was not interrupted, and what is validated and kept is the average."""
    for name, average in (
        ("mean", shipped.WeightAveraging),
        ("moving", lambda: shipped.EMAWeightAveraging(decay=0.5)),
    ):
        through, broken = (folder / name / run for run in ("through", "broken"))
        each = {"save_last": True, "every_n_train_steps": 1}
        whole = train(folder, average(), shipped.ModelCheckpoint(through, **each), enable_checkpointing=True)
        interrupted(folder, average(), shipped.ModelCheckpoint(broken, **each))
        goes_on = shipped.ModelCheckpoint(broken, **each)
        train(folder, average(), goes_on, enable_checkpointing=True, resume=broken / "last.ckpt")
        contents = [read(run / "last.ckpt") for run in (broken, through)]
        for entry in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", KEY):
            assert_identical(*(content[entry] for content in contents if isinstance(content, dict)), where=entry)
        kept = SegmentTask.load_from_checkpoint(through / "last.ckpt")
        assert torch.equal(weights(kept), weights(whole.task).to(weights(kept)))
        assert not torch.equal(weights(train(folder).task), weights(whole.task))


WORKING: dict[str, Callable[[Path], None]] = {
    "BaseFinetuning": base_finetuning,
    "Callback": callback,
    "Checkpoint": checkpoint,
    "DeviceStatsMonitor": device_stats_monitor,
    "EMAWeightAveraging": weight_averaging,
    "EarlyStopping": early_stopping,
    "LambdaCallback": lambda_callback,
    "LearningRateMonitor": learning_rate_monitor,
    "ModelCheckpoint": model_checkpoint,
    "ModelSummary": model_summary,
    "OnExceptionCheckpoint": on_exception_checkpoint,
    "ProgressBar": progress_bar,
    "RichModelSummary": model_summary,
    "RichProgressBar": progress_bar,
    "TQDMProgressBar": progress_bar,
    "ThroughputMonitor": throughput_monitor,
    "Timer": timer,
    "WeightAveraging": weight_averaging,
}
"""What is tried for the callback of that name."""


class Writer(shipped.BasePredictionWriter):
    """Writes nothing."""


class OwnFinder(shipped.LearningRateFinder):
    """What is derived from one that is refused is refused."""


REFUSED: tuple[tuple[Callable[[], Callback], str], ...] = (
    (shipped.BackboneFinetuning, "derive a callback from BaseFinetuning"),
    (lambda: Writer("batch"), "use `python -m memformer_pl predict`"),
    (shipped.BatchSizeFinder, "set --data.batch_size (in Python SegmentData(batch_size=...))"),
    (
        lambda: shipped.GradientAccumulationScheduler({0: 2}),
        "set --model.accumulate_grad_batches (in Python SegmentTask(",
    ),
    (shipped.LearningRateFinder, "compare short runs with different --model.learning_rate"),
    (OwnFinder, "compare short runs with different --model.learning_rate"),
    (lambda: shipped.ModelPruning("l1_unstructured"), "prune the trained model with torch.nn.utils.prune"),
    (shipped.SpikeDetection, "see --model.max_skipped"),
    (lambda: shipped.StochasticWeightAveraging(1e-3), "use WeightAveraging or EMAWeightAveraging"),
)
"""What is refused, and the cure."""


def test_every_callback_of_lightning_is_tried_or_refused() -> None:
    refused = {kind.__name__ for kind in CALLBACKS}
    assert set(WORKING) | refused == set(shipped.__all__)
    assert not set(WORKING) & refused
    assert {kind for build, _ in REFUSED for kind in type(build()).__mro__} >= set(CALLBACKS)


@pytest.mark.parametrize("check", dict.fromkeys(WORKING.values()), ids=lambda check: check.__name__)
def test_a_callback_does_what_it_says(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.parametrize(("build", "cure"), REFUSED)
def test_a_callback_that_would_do_nothing_or_the_wrong_thing_is_refused_with_a_cure(
    build: Callable[[], Callback], cure: str, tmp_path: Path
) -> None:
    given = build()
    with pytest.raises(UsageError, match=f"callback {type(given).__name__} is not supported") as refused:
        train(tmp_path, given)
    assert cure in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_what_a_tuner_does_is_refused_too(tmp_path: Path) -> None:
    for name in ("lr_find", "scale_batch_size"):
        with pytest.raises(UsageError, match="Finder is not supported"):
            getattr(Tuner(trainer_of(tmp_path, Seen())), name)(SegmentTask(model=small_memformer()), loader())
