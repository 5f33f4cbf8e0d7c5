"""Runs of a small model in Lightning's trainer with default arguments, and a record of what they read."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Callback, Trainer
from tasks import loader, small_memformer

from memformer_pl.data import Rollout
from memformer_pl.training.task import SegmentTask

EPOCH = 6
"""Rollouts of an epoch, in training as in validation."""


class Seen(Callback):
    """Keeps which rollouts were read, and when."""

    def __init__(self) -> None:
        self.epochs: list[list[list[int]]] = []
        self.validations: list[int] = []
        self.sane = self.tested = 0
        self.losses: list[float] = []

    def on_train_epoch_start(self, *args: object) -> None:
        self.epochs.append([])

    def on_train_batch_start(self, trainer: Trainer, task: SegmentTask, batch: Rollout, batch_idx: int) -> None:
        if not self.epochs:  # a run that resumes in the middle of an epoch
            self.epochs.append([])
        self.epochs[-1].append([*batch.documents.flatten().tolist(), *batch.firsts.flatten().tolist()])

    def on_train_batch_end(self, trainer: Trainer, task: SegmentTask, outputs: Any, *args: object) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_validation_epoch_start(self, trainer: Trainer, task: SegmentTask) -> None:
        if not trainer.sanity_checking:
            self.validations.append(0)

    def on_validation_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.sanity_checking:
            self.sane += 1
        else:
            self.validations[-1] += 1

    def on_test_batch_end(self, *args: object) -> None:
        self.tested += 1

    @property
    def rollouts(self) -> list[list[int]]:
        return [rollout for epoch in self.epochs for rollout in epoch]


class Run(NamedTuple):
    trainer: Trainer
    task: SegmentTask
    seen: Seen

    @property
    def read(self) -> list[int]:
        """Rollouts of each epoch."""
        return [len(epoch) for epoch in self.seen.epochs]


def trainer_of(folder: Path, *callbacks: Callback, **given: Any) -> Trainer:
    """A trainer with these arguments, which is quiet and quick unless they say otherwise."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    options: dict[str, Any] = {"accelerator": "cpu", "precision": "64-true", "default_root_dir": folder, **quiet}
    if not {"max_steps", "max_epochs", "max_time"} & set(given):
        options["max_steps"] = 4
    return Trainer(**{**options, "callbacks": list(callbacks), **given})


def train(
    folder: Path, *callbacks: Callback, task: SegmentTask | None = None, resume: Path | None = None, **given: Any
) -> Run:
    """Train a small model for four steps or as given, with the validations that Lightning runs by default."""
    torch.manual_seed(0)
    seen, task = Seen(), task or SegmentTask(model=small_memformer(dropout=0.2))
    trainer = trainer_of(folder, seen, *callbacks, **given)
    trainer.fit(task, loader(), loader(shuffle=False), ckpt_path=resume)
    return Run(trainer, task, seen)


def corpus(count: int) -> list[list[int]]:
    """The first rollouts of the corpus, over as many passes as needed."""
    rollouts, given = [], loader()
    while len(rollouts) < count:
        rollouts += [[*w.documents.flatten().tolist(), *w.firsts.flatten().tolist()] for w in given]
    return rollouts[:count]


def bits_of(rollouts: int | None, run: Run) -> float:
    """Bits per byte of the first rollouts of the validation, computed outside the trainer."""
    given = loader(shuffle=False)
    chosen = [rollout for rollout, _ in zip(given, range(rollouts or EPOCH), strict=False)]
    nats, tokens, _ = run.task.read_documents(chosen, documents=len(given.documents)).compute().sum(1).tolist()
    return float(nats / tokens / torch.log(torch.tensor(2.0, dtype=torch.float64)))
