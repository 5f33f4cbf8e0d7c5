"""When the checkpoint is written from which a run goes on: so that nothing that is due is left out."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, Trainer
from tasks import loader, small_memformer

from memformer_pl.callbacks import LastCheckpoint
from memformer_pl.checkpoints.format import KEY
from memformer_pl.training.checkpoint_io import CheckpointFiles
from memformer_pl.training.task import SegmentTask

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")


class Copies(CheckpointFiles):
    """Keeps a copy of every file that is written, and after how many rollouts it was."""

    def __init__(self) -> None:
        self.rollouts: list[int] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: object = None) -> None:
        super().save_checkpoint(checkpoint, path, storage_options)
        self.rollouts.append(checkpoint[KEY]["rollouts"])
        shutil.copy(path, Path(path).with_name(f"{len(self.rollouts)}.copy"))


class Diary(Callback):
    """Notes after how many rollouts there was a validation, and whether the run came to its end."""

    def __init__(self) -> None:
        self.entries: list[object] = []

    def on_validation_end(self, trainer: Trainer, pl_module: SegmentTask) -> None:
        if not trainer.sanity_checking:
            self.entries.append(pl_module._rollouts)

    def on_train_end(self, trainer: Trainer, pl_module: SegmentTask) -> None:
        self.entries.append("end")


def run(folder: Path, checkpoint: Path | None = None, **options: Any) -> tuple[list[object], list[int]]:
    """Train for eight rollouts, six of which are an epoch; the diary, and when checkpoints were written."""
    diary, copies = Diary(), Copies()
    usual = {"max_steps": 8, "val_check_interval": 3, "check_val_every_n_epoch": None, "limit_val_batches": 1}
    trainer = Trainer(
        **{**usual, **options},
        plugins=[copies],
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[LastCheckpoint(seconds=0.0), diary],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        SegmentTask(model=small_memformer(dropout=0.2)),
        loader(interleave=2),
        loader(shuffle=False),
        ckpt_path=checkpoint,
    )
    return diary.entries, copies.rollouts


@pytest.mark.parametrize(
    ("options", "written", "diary"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7, 8], [3, 6, "end"]),
        ({"max_steps": 6}, [1, 2, 3, 4, 5, 6], [3, 6, "end"]),
        ({"max_steps": -1, "max_epochs": 1}, [1, 2, 3, 4, 5, 6, 6], [3, 6, "end"]),
        ({"limit_val_batches": 0}, [1, 2, 3, 4, 5, 6, 7, 8], ["end"]),
    ],
)
def test_a_run_that_resumes_from_any_checkpoint_skips_nothing_that_is_due(
    tmp_path: Path, options: dict[str, Any], written: list[int], diary: list[object]
) -> None:
    """Neither a validation nor the end, when reports are written. Lightning would, from a checkpoint just before."""
    assert run(tmp_path / "whole", **options) == (diary, written)
    for place in (2, 3, len(written) - 1):
        left = [entry for entry in diary if entry == "end" or entry > written[place - 1]]
        copy = tmp_path / "whole" / "checkpoints" / f"{place}.copy"
        assert run(tmp_path / f"resumed_{place}", copy, **options)[0] == left, place
