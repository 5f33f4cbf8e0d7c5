"""Another optimizer and another learning-rate schedule train, resume bit for bit, or are refused with a reason."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from identical import assert_identical
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoringPlateau
from lightning.pytorch.loggers import CSVLogger
from models import infini_attention
from tasks import loader, small_memformer, weights
from torch.nn import Linear
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from trainers import Run, train

from memformer_pl.checkpoints.format import KEY, read
from memformer_pl.contract import SegmentModel
from memformer_pl.errors import OptionError, UsageError
from memformer_pl.training.lr_schedule import WarmupCosine, lr_factor
from memformer_pl.training.optimizer import parameter_groups
from memformer_pl.training.task import SegmentTask

WHOLE_RUN = True  # see tests/conftest.py
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning"),
    # torch's own: SequentialLR advances the schedules in it with the step number
    pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning"),
]

MONITOR = ("--model.lr_scheduler.init_args.monitor", "validation/loss")
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def warm_up_then_steps(optimizer: torch.optim.Optimizer) -> LRScheduler:
    schedules = [LinearLR(optimizer, 0.25, total_iters=2), StepLR(optimizer, 2, gamma=0.5)]
    return SequentialLR(optimizer, schedules, milestones=[2])


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": SGD,
    "Adam": partial(torch.optim.Adam, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "Adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    "NAdam": partial(torch.optim.NAdam, lr=1e-2),
}
SCHEDULES: dict[str, Callable[..., LRScheduler]] = {
    "StepLR": partial(StepLR, step_size=2, gamma=0.5),
    "MultiStepLR": partial(MultiStepLR, milestones=[1, 3]),
    "CosineAnnealingLR": partial(CosineAnnealingLR, T_max=6),
    "OneCycleLR": partial(OneCycleLR, max_lr=0.01, total_steps=6),
    "SequentialLR": warm_up_then_steps,
    "WarmupCosine": partial(WarmupCosine, warmup_steps=1, total_steps=6),
    "ReduceLROnPlateau": partial(ReduceLROnPlateau, patience=0, threshold=100.0, threshold_mode="abs"),
}
ALIKE = ("MultiStepLR", "CosineAnnealingLR", "SequentialLR")
"""Kept and restored as StepLR is."""


class Rates(Callback):
    """Keeps the learning rates with which steps are taken."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, task: SegmentTask, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def run(
    folder: Path,
    *callbacks: Callback,
    build: Callable[..., SegmentModel] = small_memformer,
    steps: int = 6,
    resume: Path | None = None,
    **options: Any,
) -> Run:
    """Train for six steps, with a checkpoint after each and a validation after every second."""
    keeper = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    often: dict[str, Any] = {"val_check_interval": 2, "check_val_every_n_epoch": None, "enable_checkpointing": True}
    task = SegmentTask(model=build(dropout=0.2), **options)
    return train(folder, keeper, *callbacks, task=task, resume=resume, max_steps=steps, **often)


def assert_resumes(folder: Path, **options: Any) -> Run:
    """A run that is resumed in the middle ends, bit for bit, like one that is not interrupted."""
    before = weights(SegmentTask(model=small_memformer(dropout=0.2)))
    whole_rates, resumed_rates = Rates(), Rates()
    whole = run(folder / "whole", whole_rates, **options)
    resumed = run(folder / "resumed", resumed_rates, resume=folder / "whole" / "step=3.ckpt", **options)
    contents = [read(folder / name / "step=6.ckpt") for name in ("resumed", "whole")]
    for entry in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", KEY):
        assert_identical(*(content[entry] for content in contents if isinstance(content, dict)), where=entry)
    assert resumed_rates.rates == whole_rates.rates[3:]
    assert torch.equal(weights(resumed.task), weights(whole.task))
    assert not torch.equal(weights(whole.task), before)
    return whole


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_optimizer_trains_and_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    whole = assert_resumes(tmp_path, optimizer=OPTIMIZERS[name])
    assert type(whole.trainer.optimizers[0]).__name__ == name


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.slow if name in ("MultiStepLR", "CosineAnnealingLR", "SequentialLR") else ()
        )
        for name in SCHEDULES
    ],
)
def test_another_schedule_trains_and_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    whole = assert_resumes(tmp_path, lr_scheduler=SCHEDULES[name])
    assert type(whole.trainer.lr_scheduler_configs[0].scheduler).__name__ == name


def test_both_at_once_train_and_resume_bit_for_bit(tmp_path: Path) -> None:
    assert_resumes(tmp_path, optimizer=SGD, lr_scheduler=SCHEDULES["StepLR"], accumulate_grad_batches=2)


@pytest.mark.parametrize("options", [{}, {"optimizer": SGD, "lr_scheduler": SCHEDULES["StepLR"]}], ids=["", "others"])
def test_a_learning_rate_of_its_own_is_resumed_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = assert_resumes(tmp_path, build=infini_attention, **options)
    common, _, own = (group["lr"] for group in whole.trainer.optimizers[0].param_groups)
    assert own == pytest.approx(10 * common, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"optimizer": SGD}], ids=["", "others"])
def test_chosen_factors_are_resumed_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = assert_resumes(tmp_path, learning_rate_factors={"model.writer.*": 3.0}, **options)
    common, _, *own = (group["lr"] for group in whole.trainer.optimizers[0].param_groups)
    assert own == pytest.approx([3 * common] * 2, rel=1e-12)


def test_a_resumed_run_takes_factors_from_its_own_configuration(tmp_path: Path) -> None:
    run(tmp_path, learning_rate_factors={"model.writer.*": 3.0}, weight_decay=0.5)
    now = {"learning_rate_factors": {"model.writer.*": 2.0}, "weight_decay": 0.25}
    resumed = run(tmp_path / "resumed", resume=tmp_path / "step=4.ckpt", steps=8, **now)
    common, _, *own = (group["lr"] for group in resumed.trainer.optimizers[0].param_groups)
    assert own == pytest.approx([2 * common] * 2, rel=1e-12)
    assert [group["weight_decay"] for group in resumed.trainer.optimizers[0].param_groups] == [0.25, 0.0, 0.25, 0.0]


def test_a_resumed_run_takes_a_falling_factor_from_its_own_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Linear, "learning_rates", {"weight": (4.0, 1.0)}, raising=False)
    run(tmp_path, learning_rate_factors={"model.writer.*.weight": 3.0})
    now = {"learning_rate_factors": {"model.writer.*.weight": 0.5}}
    resumed = run(tmp_path / "resumed", resume=tmp_path / "step=4.ckpt", steps=8, **now)
    falls = [group["lr_fall"] for group in resumed.trainer.optimizers[0].param_groups if "lr_fall" in group]
    assert falls == [(4.0, 1.0), (2.0, 0.5)]


def test_a_checkpoint_of_other_patterns_is_refused(tmp_path: Path) -> None:
    """Their groups may have equal sizes, and then torch would give parameters the moments of others."""
    run(tmp_path, steps=2, learning_rate_factors={"model.writer.to_key.*": 3.0})
    told = r"learning_rate_factors for \['model.writer.to_key.\*'\], this run for \['model.writer.to_query.\*'\]"
    with pytest.raises(UsageError, match=f"cannot resume: the checkpoint has {told}"):
        run(
            tmp_path / "resumed",
            resume=tmp_path / "step=2.ckpt",
            learning_rate_factors={"model.writer.to_query.*": 3.0},
        )


def test_another_optimizer_gets_the_groups_that_decay_and_do_not(tmp_path: Path) -> None:
    whole = run(tmp_path, optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=0.3))
    groups = whole.trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    expected = [[id(p) for p in group["params"]] for group in parameter_groups(whole.task)]
    assert [[id(p) for p in group["params"]] for group in groups] == expected


def test_sgd_takes_the_step_that_the_gradient_gives(tmp_path: Path) -> None:
    """With a gradient clipped to length 1e-3, the weights move by the learning rate times 1e-3."""
    options = {"lr_scheduler": partial(ConstantLR, factor=1.0), "gradient_clip_val": 1e-3}
    task = SegmentTask(model=small_memformer(), optimizer=partial(torch.optim.SGD, lr=0.5), **options)
    before = weights(task)
    train(tmp_path, task=task, max_steps=1)
    assert float((weights(task) - before).norm()) == pytest.approx(0.5e-3, rel=1e-2)


def test_a_schedule_advances_with_steps_and_not_with_rollouts(tmp_path: Path) -> None:
    rates = Rates()
    run(tmp_path, rates, optimizer=SGD, lr_scheduler=SCHEDULES["StepLR"], accumulate_grad_batches=3)
    assert rates.rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])


def test_the_default_schedule_follows_another_optimizer(tmp_path: Path) -> None:
    rates = Rates()
    run(tmp_path, rates, optimizer=SGD, warmup_steps=2)
    expected = [0.1 * lr_factor(step, warmup_steps=2, total_steps=6) for step in range(6)]
    assert rates.rates == pytest.approx(expected, rel=1e-12)


def test_the_monitor_of_lightning_logs_the_default_curve(tmp_path: Path) -> None:
    log = CSVLogger(tmp_path, name=None, version="")
    monitor = LearningRateMonitor()
    task = SegmentTask(model=small_memformer(), learning_rate=0.02, warmup_steps=3)
    train(tmp_path, monitor, task=task, max_steps=6, logger=log, log_every_n_steps=1, limit_val_batches=0)
    head, *rows = (line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines())
    logged = [dict(zip(head, row, strict=True)) for row in rows]
    expected = [0.02 * lr_factor(step, warmup_steps=3, total_steps=6) for step in range(6)]
    for name in ("lr-AdamW/pg1", "lr-AdamW/pg2", "train/learning_rate"):
        assert [float(row[name]) for row in logged if row[name]] == pytest.approx(expected, rel=1e-6)


def test_a_resumed_run_takes_learning_rate_schedule_and_decay_from_its_own_configuration(tmp_path: Path) -> None:
    rates = Rates()
    run(tmp_path, learning_rate=0.01, warmup_steps=2, weight_decay=0.5)
    now = {"learning_rate": 0.3, "warmup_steps": 9, "weight_decay": 0.25}
    resumed = run(tmp_path / "resumed", rates, resume=tmp_path / "step=4.ckpt", steps=8, **now)
    expected = [0.3 * lr_factor(step, warmup_steps=9, total_steps=8) for step in range(4, 8)]
    assert rates.rates == pytest.approx(expected, rel=1e-12)
    assert [group["weight_decay"] for group in resumed.trainer.optimizers[0].param_groups] == [0.25, 0.0]


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({}, {"optimizer": SGD}, r"optimizer torch\.optim\.adamw\.AdamW, this run has torch\.optim\.sgd\.SGD"),
        ({"optimizer": SGD}, {}, r"optimizer torch\.optim\.sgd\.SGD, this run has torch\.optim\.adamw\.AdamW"),
        (
            {"lr_scheduler": SCHEDULES["StepLR"]},
            {},
            r"lr_scheduler torch\.optim\.lr_scheduler\.StepLR, this run has .*WarmupCosine; choose the same class",
        ),
        (
            {"lr_scheduler": SCHEDULES["StepLR"]},
            {"lr_scheduler": SCHEDULES["CosineAnnealingLR"]},
            r"lr_scheduler .*StepLR, this run has torch\.optim\.lr_scheduler\.CosineAnnealingLR",
        ),
    ],
)
def test_a_checkpoint_of_another_class_is_refused(
    tmp_path: Path, before: dict[str, Any], now: dict[str, Any], told: str
) -> None:
    run(tmp_path, steps=2, **before)
    with pytest.raises(UsageError, match=f"cannot resume: the checkpoint was trained with {told}"):
        run(tmp_path / "resumed", resume=tmp_path / "step=2.ckpt", **now)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"learning_rate": 0.1, "optimizer": SGD},
            "learning_rate=0.1 has no effect beside optimizer: set learning_rate to null (in Python None), and lr in",
        ),
        (
            {"weight_decay": 0.0, "optimizer": SGD},
            "weight_decay=0.0 has no effect beside optimizer: set weight_decay to null (in Python None), and weight_de",
        ),
        (
            {"warmup_steps": 0, "lr_scheduler": SCHEDULES["StepLR"]},
            "warmup_steps=0 has no effect beside lr_scheduler: set warmup_steps to null (in Python None)",
        ),
    ],
)
def test_shorthand_beside_what_it_is_short_for_is_refused_with_what_to_do(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as refused:
        SegmentTask(model=small_memformer(), **options)
    assert told in str(refused.value)
    assert "init_args of" in str(refused.value)


@pytest.mark.parametrize("options", [{"learning_rate": 0.0}, {"learning_rate": float("inf")}, {"weight_decay": -0.1}])
def test_impossible_values_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="learning_rate must be above 0 and weight_decay at least 0, got"):
        SegmentTask(model=small_memformer(), **options)


def test_a_plateau_lowers_the_rate_after_validations(tmp_path: Path) -> None:
    """The threshold is out of reach, so every validation after the first is one without progress."""
    rates = Rates()
    run(tmp_path, rates, optimizer=SGD, lr_scheduler=SCHEDULES["ReduceLROnPlateau"], steps=8)
    assert rates.rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_the_check_before_training_and_other_validations_do_not_count_for_a_plateau(tmp_path: Path) -> None:
    options = {"optimizer": SGD, "lr_scheduler": SCHEDULES["ReduceLROnPlateau"]}
    task = SegmentTask(model=small_memformer(), **options)
    trainer = train(tmp_path, task=task, max_steps=1, num_sanity_val_steps=2).trainer
    scheduler = trainer.lr_scheduler_configs[0].scheduler
    assert (scheduler.last_epoch, scheduler.best) == (0, float("inf"))
    trainer.validate(task, loader(shuffle=False), verbose=False)
    assert scheduler.last_epoch == 0


def test_a_plateau_follows_the_metric_that_it_names(tmp_path: Path) -> None:
    plateau = partial(MonitoringPlateau, monitor="validation/accuracy", mode="max", patience=0, threshold=100.0)
    rates = Rates()
    done = run(tmp_path, rates, lr_scheduler=plateau, optimizer=SGD)
    best = done.trainer.lr_scheduler_configs[0].scheduler.best
    assert 0 <= best <= 1
    assert rates.rates[-1] == pytest.approx(0.01)


def test_a_plateau_refuses_a_metric_that_nobody_logs(tmp_path: Path) -> None:
    plateau = partial(MonitoringPlateau, monitor="val_loss")
    with pytest.raises(OptionError, match=r"monitors 'val_loss', which is not logged: choose one of .*validation/loss"):
        run(tmp_path, lr_scheduler=plateau)


def test_a_run_with_another_optimizer_is_loaded_and_trained_on(tmp_path: Path) -> None:
    options = {"optimizer": SGD, "lr_scheduler": SCHEDULES["StepLR"]}
    done = run(tmp_path, **options)
    path = tmp_path / "step=6.ckpt"
    loaded = SegmentTask.load_from_checkpoint(path)
    assert torch.equal(weights(loaded).double(), weights(done.task).to(weights(loaded)).double())
    assert loaded.optimization.optimizer is None
    again = SegmentTask.load_from_checkpoint(path, **options)
    assert again.optimization.optimizer is SGD
    assert train(tmp_path / "more", task=again, max_steps=2).trainer.global_step == 2


@pytest.mark.parametrize(
    ("words", "optimizer", "schedule"),
    [
        (["--model.optimizer", "torch.optim.SGD", "--model.optimizer.init_args.lr", "0.1"], "SGD", "WarmupCosine"),
        (
            ["--model.lr_scheduler", "CosineAnnealingLR", "--model.lr_scheduler.T_max", "4"],
            "AdamW",
            "CosineAnnealingLR",
        ),
        (
            [*("--model.lr_scheduler", "lightning.pytorch.cli.ReduceLROnPlateau"), *MONITOR],
            *("AdamW", "ReduceLROnPlateau"),
        ),
    ],
)
def test_the_command_line_chooses_them_by_class_path(
    command: Callable[..., Any], small: Path, tmp_path: Path, words: list[str], optimizer: str, schedule: str
) -> None:
    more = ["--model.warmup_steps", "null"] if schedule != "WarmupCosine" else []
    outcome = command("fit", "--config", small, *words, *more)
    assert outcome.code == 0, outcome.output
    content = torch.load(tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert [name.rpartition(".")[2] for name in content[KEY]["optimizer"]] == [optimizer, schedule]
    # the configuration that the run saved starts it again, and goes on
    saved = tmp_path / "run" / "version_0" / "config.yaml"
    assert command("fit", "--config", saved, "--ckpt_path", "last", "--trainer.max_steps", "5").code == 0


def test_the_command_line_refuses_shorthand_beside_an_optimizer_in_one_line(
    command: Callable[..., Any], small: Path
) -> None:
    words = ["--model.optimizer", "torch.optim.SGD", "--model.learning_rate", "0.1"]
    outcome = command("fit", "--config", small, *words)
    assert outcome.code == 2
    (line,) = outcome.errors
    assert "learning_rate=0.1 has no effect beside optimizer: set learning_rate to null" in line
