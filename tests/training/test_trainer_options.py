"""Every argument of Lightning's trainer does what it says, or is refused with what to do instead.

``test_trainer_callbacks.py`` has the callbacks that Lightning ships, ``test_ddp.py`` and ``test_many_ranks.py`` several
processes.
"""

import inspect
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch import callbacks as shipped
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import AsyncCheckpointIO, HalfPrecision, TorchSyncBatchNorm
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy
from tasks import loader, small_memformer, weights
from torch import nn
from trainers import EPOCH, Seen, bits_of, corpus, train, trainer_of

from memformer_pl.checkpoints.format import read
from memformer_pl.errors import UsageError
from memformer_pl.training.task import SegmentTask

WHOLE_RUN = True  # see tests/conftest.py
pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
]


class Refused(NamedTuple):
    """What the trainer is given, and the cure that the message names."""

    given: dict[str, Any]
    cure: str


def accelerator(folder: Path) -> None:
    for name in ("cpu", "auto"):
        assert train(folder, accelerator=name).trainer.global_step == 4


def strategy(folder: Path) -> None:
    plain, given = train(folder), train(folder, strategy=SingleDeviceStrategy("cpu"))
    assert torch.equal(weights(plain.task), weights(given.task))


def devices(folder: Path) -> None:
    assert train(folder, devices=1).trainer.num_devices == 1


def num_nodes(folder: Path) -> None:
    assert train(folder, num_nodes=1).trainer.world_size == 1


def precision(folder: Path) -> None:
    for name, dtype in (("32-true", torch.float32), ("64-true", torch.float64), ("bf16-true", torch.bfloat16)):
        run = train(folder, task=SegmentTask(model=small_memformer().float()), precision=name)
        assert {parameter.dtype for parameter in run.task.parameters()} == {dtype}
    assert (
        train(folder, task=SegmentTask(model=small_memformer().float()), precision="bf16-mixed").trainer.global_step
        == 4
    )


def logger(folder: Path) -> None:
    train(folder, logger=CSVLogger(folder, name=None, version=""), log_every_n_steps=1)
    assert "train/bits_per_byte" in (folder / "metrics.csv").read_text()
    train(folder / "tensorboard", logger=True)
    assert list((folder / "tensorboard").rglob("events.out*"))


def callbacks(folder: Path) -> None:
    one, other = Seen(), Seen()
    for given in (one, [one, other]):
        trainer_of(folder, callbacks=given, limit_val_batches=0).fit(
            SegmentTask(model=small_memformer()), loader(), loader(shuffle=False)
        )
    assert len(one.rollouts) == 8
    assert len(other.rollouts) == 4


def fast_dev_run(folder: Path) -> None:
    for given, rollouts in ((True, 1), (3, 3)):
        run = train(folder, fast_dev_run=given, logger=True, enable_checkpointing=True)
        assert (run.read, run.seen.validations, run.seen.sane) == ([rollouts], [rollouts], 0)
    assert not list(folder.iterdir())


def max_epochs(folder: Path) -> None:
    assert train(folder, max_epochs=2).read == [EPOCH, EPOCH]
    assert train(folder, max_epochs=0).read == []


class Stop(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        trainer.should_stop = True


def min_epochs(folder: Path) -> None:
    assert train(folder, Stop(), min_epochs=2, max_epochs=3).read == [EPOCH, EPOCH]


def min_steps(folder: Path) -> None:
    assert train(folder, Stop(), min_steps=3, min_epochs=0, max_epochs=3).trainer.global_step == 3
    assert train(folder, Stop(), min_steps=1, max_epochs=3).trainer.global_step == EPOCH  # an epoch, unless told


def max_steps(folder: Path) -> None:
    for steps in (0, 3, EPOCH + 1):
        run = train(folder, task=SegmentTask(model=small_memformer(), accumulate_grad_batches=2), max_steps=steps)
        assert (run.trainer.global_step, len(run.seen.rollouts)) == (steps, 2 * steps)


def max_time(folder: Path) -> None:
    assert train(folder, max_time=timedelta(seconds=0.3)).trainer.global_step > 0
    assert train(folder, max_time="00:00:00:00").trainer.global_step == 0


def limit_train_batches(folder: Path) -> None:
    for given, rollouts in ((2, 2), (0.5, 3), (4, 4), (5, 5), (1.0, EPOCH), (100, EPOCH)):
        run = train(folder, limit_train_batches=given, max_epochs=3)
        assert run.read == [rollouts] * 3
        assert len(run.seen.validations) == 3
        assert run.seen.rollouts == corpus(3 * rollouts)  # every epoch goes on where the one before stopped
    assert train(folder, limit_train_batches=0).read == []


def limit_val_batches(folder: Path) -> None:
    for given, rollouts in ((2, 2), (0.5, 3), (1.0, EPOCH), (100, EPOCH)):
        run = train(folder, limit_val_batches=given, max_epochs=1)
        assert run.seen.validations == [rollouts]
        assert float(run.trainer.callback_metrics["validation/bits_per_byte"]) == pytest.approx(bits_of(rollouts, run))
    assert train(folder, limit_val_batches=0, max_epochs=1).seen.validations == []


def limit_test_batches(folder: Path) -> None:
    for given, rollouts in ((2, 2), (0.5, 3), (1.0, EPOCH), (0, 0)):
        seen = Seen()
        found = trainer_of(folder, seen, limit_test_batches=given).test(
            SegmentTask(model=small_memformer()), loader(shuffle=False), verbose=False
        )
        assert seen.tested == rollouts
        assert bool(found) == bool(rollouts)


def overfit_batches(folder: Path) -> None:
    for given, rollouts in ((2, 2), (0.5, 3), (1.0, EPOCH)):
        run = train(folder, overfit_batches=given, max_epochs=3)
        assert run.seen.epochs == [corpus(rollouts)] * 3
        assert run.seen.validations == [rollouts] * 3  # of the validation, as Lightning has it
    easy = SegmentTask(model=small_memformer(), warmup_steps=0, learning_rate=0.03)
    losses = train(folder, task=easy, overfit_batches=1, max_epochs=40).seen.losses
    assert losses[-1] < losses[0] / 2


def val_check_interval(folder: Path) -> None:
    assert len(train(folder, val_check_interval=2, max_epochs=1).seen.validations) == 3
    assert len(train(folder, val_check_interval=0.5, max_epochs=2).seen.validations) == 4
    assert len(train(folder, val_check_interval=timedelta(seconds=0), max_epochs=1).seen.validations) == EPOCH
    with pytest.raises(ValueError, match="set `check_val_every_n_epoch=None`"):
        train(folder, val_check_interval=EPOCH + 1)


def check_val_every_n_epoch(folder: Path) -> None:
    assert len(train(folder, check_val_every_n_epoch=2, max_epochs=4).seen.validations) == 2
    over = {"check_val_every_n_epoch": None, "val_check_interval": EPOCH + 1}
    assert len(train(folder, **over, max_epochs=4).seen.validations) == 4 * EPOCH // (EPOCH + 1)


def num_sanity_val_steps(folder: Path) -> None:
    without = train(folder, num_sanity_val_steps=0)
    for given, rollouts in ((1, 1), (2, 2), (-1, EPOCH)):
        run = train(folder, num_sanity_val_steps=given)
        assert run.seen.sane == rollouts
        assert torch.equal(weights(run.task), weights(without.task))


def log_every_n_steps(folder: Path) -> None:
    for given, steps in ((1, 4), (2, 2)):
        log = CSVLogger(folder, name=str(given), version="")
        train(folder, logger=log, log_every_n_steps=given, limit_val_batches=0)
        assert len((folder / str(given) / "metrics.csv").read_text().splitlines()) == 1 + steps


def enable_checkpointing(folder: Path) -> None:
    train(folder, enable_checkpointing=True, max_epochs=1)
    assert len(list(folder.rglob("*.ckpt"))) == 1


def enable_progress_bar(folder: Path) -> None:
    assert train(folder, enable_progress_bar=True).trainer.progress_bar_callback is not None
    assert train(folder, enable_progress_bar=False).trainer.progress_bar_callback is None


def enable_model_summary(folder: Path) -> None:
    trainer = train(folder, enable_model_summary=True).trainer
    assert any(isinstance(callback, shipped.ModelSummary) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def deterministic(folder: Path) -> None:
    try:
        for given in (True, "warn"):
            one, other = (train(folder, deterministic=given) for _ in range(2))
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.equal(weights(one.task), weights(other.task))
    finally:
        torch.use_deterministic_algorithms(False)


def benchmark(folder: Path) -> None:
    before = torch.backends.cudnn.benchmark
    try:
        assert train(folder, benchmark=not before).trainer.global_step == 4
        assert torch.backends.cudnn.benchmark != before
    finally:
        torch.backends.cudnn.benchmark = before


def inference_mode(folder: Path) -> None:
    name = "validation/bits_per_byte"
    one, other = (train(folder, inference_mode=given, max_epochs=1).trainer for given in (True, False))
    assert float(one.callback_metrics[name]) == float(other.callback_metrics[name])


def use_distributed_sampler(folder: Path) -> None:
    assert all(train(folder, use_distributed_sampler=given).seen.rollouts == corpus(4) for given in (True, False))


def profiler(folder: Path) -> None:
    train(folder, profiler=SimpleProfiler(dirpath=folder, filename="profile"))
    assert "SegmentTask.on_train_start" in (folder / "fit-profile.txt").read_text()
    for name in ("simple", "advanced", "pytorch"):
        assert train(folder, profiler=name).trainer.global_step == 4


def detect_anomaly(folder: Path) -> None:
    plain, given = train(folder), train(folder, detect_anomaly=True)
    assert torch.equal(weights(plain.task), weights(given.task))
    broken = small_memformer()
    nn.init.constant_(broken.embedding.weight, 1e200)  # its square overflows
    with pytest.raises(RuntimeError, match="returned nan values"):
        train(folder, task=SegmentTask(model=broken), detect_anomaly=True)


def barebones(folder: Path) -> None:
    trainer = Trainer(accelerator="cpu", precision="64-true", max_steps=4, barebones=True)
    trainer.fit(SegmentTask(model=small_memformer()), loader(), loader(shuffle=False))
    assert trainer.global_step == 4


def plugins(folder: Path) -> None:
    kept = shipped.ModelCheckpoint(folder, save_last=True, every_n_train_steps=2)
    through = train(folder, kept, plugins=[AsyncCheckpointIO()], enable_checkpointing=True)
    content = read(folder / "last.ckpt")
    assert isinstance(content, dict)
    assert torch.equal(content["state_dict"]["model.start"], through.task.state_dict()["model.start"])


def default_root_dir(folder: Path) -> None:
    train(folder / "here", enable_checkpointing=True, max_epochs=1)
    assert list((folder / "here" / "checkpoints").iterdir())


def enable_autolog_hparams(folder: Path) -> None:
    for given in (True, False):
        log = CSVLogger(folder, name=str(given), version="")
        train(folder, logger=log, enable_autolog_hparams=given)
    written = (folder / "True" / "hparams.yaml").read_text()
    assert "learning_rate: null" in written
    assert "gradient_clip_val: 1.0" in written
    assert "slots: 3" in written
    assert not (folder / "False" / "hparams.yaml").exists()


CLIP = "set --model.gradient_clip_val 0.5 (in Python SegmentTask(gradient_clip_val=0.5))"
WORKING: tuple[Callable[[Path], None], ...] = (
    *(accelerator, barebones, benchmark, callbacks, check_val_every_n_epoch, default_root_dir, detect_anomaly),
    *(deterministic, devices, enable_autolog_hparams, enable_checkpointing, enable_model_summary, enable_progress_bar),
    *(fast_dev_run, inference_mode, limit_test_batches, limit_train_batches, limit_val_batches, log_every_n_steps),
    *(logger, max_epochs, max_steps, max_time, min_epochs, min_steps, num_nodes, num_sanity_val_steps),
    *(overfit_batches, plugins, precision, profiler, strategy, use_distributed_sampler, val_check_interval),
)
"""What an argument of the same name does, tried."""
REFUSED: tuple[Refused, ...] = (
    Refused(
        {"accumulate_grad_batches": 2},
        "set --model.accumulate_grad_batches 2 (in Python SegmentTask(accumulate_grad_batches=2))",
    ),
    Refused({"gradient_clip_val": 0.5}, CLIP),
    Refused(
        {"gradient_clip_val": 0},
        "set --model.gradient_clip_val inf (in Python SegmentTask(gradient_clip_val=math.inf))",
    ),
    Refused({"gradient_clip_algorithm": "value"}, "clipped by the norm of all of them together, to at most --model"),
    Refused({"limit_predict_batches": 1}, "leave it out; SegmentTask has no predict loop"),
    Refused({"limit_predict_batches": 0.5}, "leave it out; SegmentTask has no predict loop"),
    Refused({"model_registry": "mine"}, "`python -m memformer_pl export`"),
    Refused({"plugins": [HalfPrecision("16-true")]}, "choose one of 32-true, 64-true, bf16-mixed, bf16-true"),
    Refused({"plugins": [TorchSyncBatchNorm()]}, "normalize by layer"),
    Refused({"precision": "16-true"}, "choose one of 32-true, 64-true, bf16-mixed, bf16-true"),
    Refused({"reload_dataloaders_every_n_epochs": 1}, "leave it at 0"),
    Refused({"sync_batchnorm": True}, "normalize by layer"),
)
"""What is refused, and the cure."""


def test_every_argument_of_the_trainer_is_tried_or_refused() -> None:
    arguments = set(inspect.signature(lightning.Trainer.__init__).parameters) - {"self"}
    assert {check.__name__ for check in WORKING} | {name for case in REFUSED for name in case.given} == arguments


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning")
@pytest.mark.filterwarnings("ignore:You are trying to `self.log.*barebones:UserWarning")
@pytest.mark.parametrize("check", WORKING, ids=lambda check: check.__name__)
def test_an_argument_of_the_trainer_does_what_it_says(check: Callable[[Path], None], tmp_path: Path) -> None:
    check(tmp_path)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: "".join(case.given))
def test_an_argument_that_would_do_nothing_or_the_wrong_thing_is_refused_with_a_cure(
    case: Refused, tmp_path: Path
) -> None:
    (name,) = case.given
    given = {"precision": None, **case.given} if name == "plugins" else case.given
    trainer = trainer_of(tmp_path, **given)
    for run in (trainer.fit, trainer.validate, trainer.test):
        with pytest.raises(UsageError, match="is not supported") as refused:
            run(SegmentTask(model=small_memformer()), loader(shuffle=False))
        assert case.cure in str(refused.value)


def test_an_argument_that_is_refused_is_refused_on_the_command_line_too(
    command: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    for words, cure in (
        (("--trainer.gradient_clip_val", "0.5"), CLIP),
        (("--trainer.accumulate_grad_batches", "2"), "set --model.accumulate_grad_batches 2"),
        (("--trainer.callbacks+=LearningRateFinder",), "compare short runs with different --model.learning_rate"),
        (("--trainer.callbacks+=BatchSizeFinder",), "set --data.batch_size"),
    ):
        outcome = command("fit", "--config", small, *words)
        assert outcome.code in (1, 2)
        assert len(outcome.errors) == 1
        assert cure in outcome.errors[0]
        assert "Traceback" not in outcome.output
    assert not (tmp_path / "run").exists()
