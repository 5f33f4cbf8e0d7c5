"""Keep a run from replacing the files of another run, or mixing its own with them."""

import os
from collections.abc import Mapping
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from memformer_pl.checkpoints.format import read
from memformer_pl.errors import UsageError

RESULTS = ("documents.csv", "record.json")
"""Files that callbacks write beside the logs at the end of a run."""
LOGS = ("checkpoints/last.ckpt", "events.out.tfevents.*", "metrics.csv", "*/step=*.npz", "skipped.json")
"""Files that a run writes as it trains. They block only a run that keeps no ``last.ckpt`` of its own."""
EMPTY_LOG = 100
"""Largest size in bytes of a TensorBoard file without entries; it has 88."""

File = str | os.PathLike[str]


def folder_of(trainer: Trainer) -> Path | None:
    """The folder for the files of a run; None if there is none, or if the run is to leave nothing (``fast_dev_run``).
    Collective."""
    folder = trainer.log_dir
    return None if folder is None or trainer.fast_dev_run else Path(folder)  # type: ignore[attr-defined]


def check_folder(trainer: Trainer, *, resume_from: File | None) -> None:
    """Refuse to train where files of another run would be replaced, or mixed with those of this run. Collective.

    A trainer that has trained before continues its own run. The logs of a run with ``LastCheckpoint`` but without a
    checkpoint do not block: that run was killed before its first checkpoint, and has to start again.

    Args:
        trainer: The trainer that is about to train.
        resume_from: The checkpoint from which it resumes.

    Raises:
        UsageError: Names the file, and what to type.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # all ranks must evaluate this
    has_trained = trainer.fit_loop.total_batch_idx >= 0
    message = ""
    if trainer.is_global_zero and not has_trained and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        message = _conflict(trainer, folder, resume_from)
    if message := trainer.strategy.broadcast(message):
        raise UsageError(message)


def _conflict(trainer: Trainer, folder: Path, resume_from: File | None) -> str:
    """Say which file of another run is in the way, and what to do; empty if there is none."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    # those that overwrite `last.ckpt` rather than number it
    overwriting = [callback for callback in callbacks if callback.save_last and not callback._enable_version_counter]
    for callback in overwriting:
        for last in callback._find_last_checkpoints(trainer):
            if _is_same(last, resume_from):
                return ""
            if Path(last).stem == ModelCheckpoint.CHECKPOINT_NAME_LAST:
                problem = f"{last!r} is the checkpoint of another run{_step(last)}, which this run would replace"
                resume = "Add --ckpt_path last (in Python ckpt_path='last') to continue it"
                return f"{problem}. {resume}, or {_other_folder(trainer)}"
    if resume_from is not None and Path(resume_from).absolute().is_relative_to(folder.absolute()):
        return ""
    for name in RESULTS if overwriting else RESULTS + LOGS:
        for path in sorted(folder.glob(name)):
            if path.stat().st_size > EMPTY_LOG or "tfevents" not in name:
                problem = f"{str(path)!r} belongs to another run, and this run would replace it or add to it"
                return f"{problem}. Add {_other_folder(trainer)}"
    return ""


def _other_folder(trainer: Trainer) -> str:
    if not trainer.loggers:
        return "--trainer.default_root_dir FOLDER to use another folder, or move that file away"
    if not isinstance(trainer.loggers[0], TensorBoardLogger | CSVLogger):
        return "--trainer.logger.init_args.save_dir FOLDER to use another folder, or move that file away"
    return f"--trainer.logger.init_args.version NAME to use another folder, or remove {trainer.loggers[0].log_dir!r}"


def _is_same(path: str, resume_from: File | None) -> bool:
    if resume_from is None or path == str(resume_from):
        return resume_from is not None
    return Path(path).exists() and Path(resume_from).exists() and Path(path).samefile(resume_from)


def _step(path: str) -> str:
    """The step of a checkpoint, in words; empty if the file cannot be read."""
    try:
        content = read(path)
    except UsageError:
        return ""
    return f" at step {content['global_step']}" if isinstance(content, Mapping) and "global_step" in content else ""
