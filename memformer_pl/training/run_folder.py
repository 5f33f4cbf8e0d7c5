"""A run does not replace the files of another one, and does not mix its own with them."""

import os
from collections.abc import Mapping
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from memformer_pl.checkpoints.format import read
from memformer_pl.errors import UsageError

RESULTS = ("documents.csv", "record.json")
"""What callbacks write beside the logs at the end of a run."""
LOGS = ("checkpoints/last.ckpt", "events.out.tfevents.*", "metrics.csv", "*/step=*.npz", "skipped.json")
"""What is written as a run goes along: in the way of one that keeps no ``last.ckpt`` itself, else that alone counts."""
EMPTY_LOG = 100
"""Bytes: a file of TensorBoard in which nothing has been logged yet has 88."""

File = str | os.PathLike[str]


def check_folder(trainer: Trainer, *, begins: File | None) -> None:
    """Refuse to train where files of another run would be replaced or mixed with those of this run. Collective.

    A trainer that has trained before goes on with its own run. Without a checkpoint, what a run with
    ``LastCheckpoint`` has logged is of no use: it was killed before the first one, and may begin again.

    Args:
        trainer: Is to train.
        begins: The checkpoint that it goes on from.

    Raises:
        UsageError: Says which file it is, and what to type.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # all ranks have to ask
    trained = trainer.fit_loop.total_batch_idx >= 0
    told = ""
    if trainer.is_global_zero and not trained and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        told = _in_the_way(trainer, folder, begins)
    if told := trainer.strategy.broadcast(told):
        raise UsageError(told)


def _in_the_way(trainer: Trainer, folder: Path, begins: File | None) -> str:
    """Which file of another run stands in the way, and what to do; empty if there is none."""
    keepers = [keeper for keeper in trainer.checkpoint_callbacks if isinstance(keeper, ModelCheckpoint)]
    # those that write `last.ckpt` by that very name, whatever is there
    keepers = [keeper for keeper in keepers if keeper.save_last and not keeper._enable_version_counter]
    for keeper in keepers:
        for last in keeper._find_last_checkpoints(trainer):
            if _is_same(last, begins):
                return ""
            if Path(last).stem == ModelCheckpoint.CHECKPOINT_NAME_LAST:
                told = f"{last!r} is the checkpoint of another run{_step(last)}, which this run would replace"
                return f"{told}. Add --ckpt_path last (in Python ckpt_path='last') to go on, or {_elsewhere(trainer)}"
    if begins is not None and Path(begins).absolute().is_relative_to(folder.absolute()):
        return ""
    for name in RESULTS if keepers else RESULTS + LOGS:
        for path in sorted(folder.glob(name)):
            if path.stat().st_size > EMPTY_LOG or "tfevents" not in name:
                told = f"{str(path)!r} is of another run, and this run would replace it or add to it"
                return f"{told}. Add {_elsewhere(trainer)}"
    return ""


def _elsewhere(trainer: Trainer) -> str:
    if not trainer.loggers:
        return "--trainer.default_root_dir FOLDER for a folder of its own, or move that file away"
    if not isinstance(trainer.loggers[0], TensorBoardLogger | CSVLogger):
        return "--trainer.logger.init_args.save_dir FOLDER for a folder of its own, or move that file away"
    return f"--trainer.logger.init_args.version NAME for a folder of its own, or remove {trainer.loggers[0].log_dir!r}"


def _is_same(path: str, begins: File | None) -> bool:
    if begins is None or path == str(begins):
        return begins is not None
    return Path(path).exists() and Path(begins).exists() and Path(path).samefile(begins)


def _step(path: str) -> str:
    """How far a checkpoint has come, if that can be read."""
    try:
        content = read(path)
    except UsageError:
        return ""
    return f" at step {content['global_step']}" if isinstance(content, Mapping) and "global_step" in content else ""
