"""A run in the folder of another one replaces nothing there: it goes on from its checkpoint, or is refused."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tasks import loader, small_memformer

from memformer_pl.callbacks import LastCheckpoint
from memformer_pl.checkpoints.format import read
from memformer_pl.errors import UsageError
from memformer_pl.training.run_folder import check_folder
from memformer_pl.training.task import SegmentTask

pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec:FutureWarning",
    "ignore:Experiment logs directory",
    "ignore:Checkpoint directory",
    "ignore:Using ModelCheckpoint with manual optimization",
)

REFUSED = "is the checkpoint of another run at step 2, which this run would replace"


def trainer_in(folder: Path, *callbacks: Callback, steps: int = 2, **options: Any) -> Trainer:
    """One that keeps everything in a fixed folder."""
    usual: dict[str, Any] = {"logger": False, "default_root_dir": folder, "limit_val_batches": 0}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", max_steps=steps, callbacks=list(callbacks), **quiet, **{**usual, **options})


def fit(trainer: Trainer, ckpt_path: object = None) -> Trainer:
    trainer.fit(
        SegmentTask(model=small_memformer(dropout=0.2)),
        loader(interleave=2),
        loader(shuffle=False),
        ckpt_path=ckpt_path,
    )
    return trainer


def content(folder: Path) -> dict[str, bytes]:
    """All files, but those of TensorBoard in which nothing was logged: Lightning begins one before it asks anybody."""
    files = (path for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name)
    return {str(path): path.read_bytes() for path in files}


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The folder of a run of two steps."""
    fit(trainer_in(tmp_path / "run", LastCheckpoint()))
    return tmp_path / "run"


def test_the_same_command_again_is_refused_and_says_what_to_type(
    command: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    words = ["fit", "--config", small, "--trainer.callbacks+=ClosingReport", "--trainer.max_steps"]
    assert command(*words, 2).code == 0
    before = content(tmp_path / "run")
    assert {"config.yaml", "documents.csv", "last.ckpt"} <= {Path(name).name for name in before}
    outcome = command(*words, 1)
    assert outcome.code != 0
    (error,) = outcome.errors
    assert re.search(rf"version_0/checkpoints/last\.ckpt' {REFUSED}", error)
    assert re.search(r"Add --ckpt_path last .* or --trainer\.logger\.init_args\.version NAME .* or remove '", error)
    assert content(tmp_path / "run") == before
    assert command(*words, 3, "--ckpt_path", "last").code == 0
    assert command(*words, 1, "--trainer.logger.init_args.version", "another").code == 0
    assert read(tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt")["global_step"] == 3  # type: ignore[index]
    assert (tmp_path / "run" / "another" / "documents.csv").exists()


def test_a_run_that_begins_from_another_file_is_refused_alike(first: Path, tmp_path: Path) -> None:
    last = first / "checkpoints" / "last.ckpt"
    copies = [tmp_path / "copy.ckpt", first / "checkpoints" / "copy.ckpt"]
    link = tmp_path / "link.ckpt"
    for copy in copies:
        shutil.copy(last, copy)
        with pytest.raises(UsageError, match=REFUSED):
            fit(trainer_in(first, LastCheckpoint(), steps=3), copy)
    assert last.read_bytes() == copies[0].read_bytes()
    link.symlink_to(last)
    for steps, path in enumerate((last, link, "last"), start=3):
        assert fit(trainer_in(first, LastCheckpoint(), steps=steps), path).global_step == steps
    # into a folder of its own, from wherever it likes
    assert fit(trainer_in(tmp_path / "new", LastCheckpoint(), steps=4), copies[0]).global_step == 4


def test_a_trainer_that_trains_again_continues_its_own_run(tmp_path: Path) -> None:
    trainer = fit(trainer_in(tmp_path, LastCheckpoint()))
    trainer.fit_loop.epoch_loop.max_steps = 4
    assert fit(trainer).global_step == 4
    assert read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 4  # type: ignore[index]
    with pytest.raises(UsageError, match="at step 4, which"):
        fit(trainer_in(tmp_path, LastCheckpoint()))


def test_a_trial_writes_nothing_and_is_not_refused(first: Path) -> None:
    before = content(first)
    fit(trainer_in(first, LastCheckpoint(), fast_dev_run=True))
    assert content(first) == before


def test_a_checkpoint_that_cannot_be_read_is_not_replaced_either(first: Path) -> None:
    last = first / "checkpoints" / "last.ckpt"
    last.write_text("of an earlier version")
    with pytest.raises(UsageError, match="is the checkpoint of another run, which this run would replace"):
        fit(trainer_in(first, LastCheckpoint()))
    assert last.read_text() == "of an earlier version"


def test_whatever_else_writes_last_by_that_very_name_is_refused_too(first: Path) -> None:
    with pytest.raises(UsageError, match=REFUSED):
        fit(trainer_in(first, ModelCheckpoint(save_last=True, enable_version_counter=False)))
    with pytest.raises(UsageError, match=r"last\.ckpt' belongs to another run"):
        fit(trainer_in(first, ModelCheckpoint()))


@pytest.mark.parametrize("name", ["documents.csv", "record.json", "checkpoints/last.ckpt", "watch/step=3.npz"])
def test_results_of_a_run_without_checkpoints_are_not_replaced(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("of an earlier run")
    trainer = trainer_in(tmp_path, enable_checkpointing=False)
    with pytest.raises(UsageError, match=rf"{name}' belongs to another run, .* Add --trainer\.default_root_dir FOLDER"):
        fit(trainer)
    assert path.read_text() == "of an earlier run"
    path.unlink()
    assert fit(trainer_in(tmp_path, enable_checkpointing=False)).global_step == 2


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_logs_of_two_runs_are_not_mixed(tmp_path: Path, kind: Any) -> None:
    def trainer(version: str) -> Trainer:
        logger = kind(tmp_path, name="run", version=version)
        return trainer_in(tmp_path, logger=logger, log_every_n_steps=1, enable_checkpointing=False)

    fit(trainer("one"))
    with pytest.raises(UsageError, match=r"belongs to another run, .* Add --trainer\.logger\.init_args\.version NAME"):
        check_folder(trainer("one"), resume_from=None)
    fit(trainer("two"))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    for name in ("skipped.json", "config.yaml", "watch/step=1.npz", "events.out.tfevents.1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("of a run without a checkpoint" * 10)
    with pytest.warns(match="there is no last checkpoint available"):
        assert fit(trainer_in(tmp_path, LastCheckpoint()), "last").global_step == 2


def test_a_run_that_resumes_from_its_own_folder_keeps_the_files_there(tmp_path: Path) -> None:
    fit(trainer_in(tmp_path, ModelCheckpoint(filename="kept")))
    (tmp_path / "documents.csv").write_text("of this run")
    kept = tmp_path / "checkpoints" / "kept.ckpt"
    assert fit(trainer_in(tmp_path, ModelCheckpoint(), steps=3), kept).global_step == 3
    shutil.copy(kept, tmp_path.parent / "elsewhere.ckpt")
    with pytest.raises(UsageError, match=r"documents\.csv' belongs to another run"):
        fit(trainer_in(tmp_path, ModelCheckpoint(), steps=3), tmp_path.parent / "elsewhere.ckpt")
