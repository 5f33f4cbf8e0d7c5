"""Files are written whole or not at all, found by the word last, and refused where they are not what they should be."""

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from models import memformer
from refusals import refused
from tasks import loader

from memformer_pl.callbacks import LastCheckpoint
from memformer_pl.callbacks.last_checkpoint import find_last
from memformer_pl.checkpoints.format import FORMAT, KEY, read
from memformer_pl.training.checkpoint_io import CheckpointFiles
from memformer_pl.training.task import SegmentTask

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

Command = Callable[..., Any]


class Code:
    """Unpickled as anybody would, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.trace),)


def fit(folder: Path, *, steps: int = 1, ckpt_path: object = None, plugins: Sequence[object] = ()) -> Trainer:
    """Train from Python, keeping a last checkpoint."""
    trainer = Trainer(
        accelerator="cpu",
        precision="64-true",
        max_steps=steps,
        limit_val_batches=0,
        default_root_dir=folder,
        callbacks=[LastCheckpoint()],
        plugins=list(plugins),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(SegmentTask(model=memformer()), loader(interleave=2), loader(shuffle=False), ckpt_path=ckpt_path)
    return trainer


@pytest.fixture
def written(command: Command, small: Path, tmp_path: Path) -> Path:
    """The last checkpoint of a run of one step."""
    assert command("fit", "--config", small, "--trainer.max_steps", "1").code == 0
    return tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_code_in_a_file_is_refused_and_not_run(
    command: Command, small: Path, tmp_path: Path, written: Path, save: Callable[[object, Path], None]
) -> None:
    trace, path = tmp_path / "trace", written
    told = r"holds \w+\.mkdir, .* nothing in it was run" if save is torch.save else "nothing in it was run|is damaged"
    save({**torch.load(path, weights_only=True), "more": Code(trace)}, path)
    for name in ("fit", "validate", "test"):
        for words in (path, "last"):
            line = refused(command(name, "--config", small, "--ckpt_path", words), code=1)
            assert re.search(told, line)
    for load in (read, CheckpointFiles().load_checkpoint):
        with pytest.raises(ValueError, match=told):
            load(path)
    with pytest.raises(ValueError, match=told):
        fit(tmp_path, ckpt_path=path)
    assert not trace.exists()
    # the proof that it was dangerous
    with path.open("rb") as file:
        torch.load(file, weights_only=False) if save is torch.save else pickle.load(file)
    assert trace.exists()


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_file_that_was_cut_short_is_refused_as_such(
    command: Command, small: Path, written: Path, share: float
) -> None:
    whole = written.read_bytes()
    written.write_bytes(whole[: int(len(whole) * share)])
    for path in (written, "last"):
        line = refused(command("fit", "--config", small, "--ckpt_path", path), code=1)
        assert "last.ckpt' is a checkpoint that was cut short" in line


def test_a_byte_that_has_changed_on_the_disk_is_found(command: Command, small: Path, written: Path) -> None:
    with zipfile.ZipFile(written) as file:
        tensors = [entry for entry in file.infolist() if "/data/" in entry.filename]
    largest = max(tensors, key=lambda entry: entry.file_size)
    changed = bytearray(written.read_bytes())
    changed[largest.header_offset + largest.file_size] ^= 1
    written.write_bytes(changed)
    for name in ("fit", "analyze"):
        line = refused(command(name, "--config", small, "--ckpt_path", "last"), code=1)
        assert "last.ckpt' is damaged: its checksums do not match" in line


def test_an_older_or_foreign_or_weights_only_file_is_refused_by_the_word_last_too(
    command: Command, small: Path, written: Path
) -> None:
    whole = torch.load(written, weights_only=True)
    last = ["--config", small, "--ckpt_path", "last"]
    for content, expected in (
        ({**whole, KEY: {**whole[KEY], "format": FORMAT - 1}}, f"has format {FORMAT - 1}, this version reads"),
        ({name: value for name, value in whole.items() if name != KEY}, "was not written by memformer_pl"),
        ({name: value for name, value in whole.items() if name != "optimizer_states"}, "holds only weights"),
    ):
        torch.save(content, written)
        assert expected in refused(command("fit", *last), code=1)
    assert command("validate", *last).code == 0  # weights are enough


def test_without_a_last_checkpoint_a_fit_begins_and_others_are_refused(
    command: Command, small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = ["--config", small, "--ckpt_path", "last"]
    for name in ("validate", "test"):
        assert "ckpt_path is last, but there is no last checkpoint in" in refused(command(name, *last), code=1)
    for steps, told in ((1, "starting from the beginning"), (2, "Restored all states"), (2, "Restored all states")):
        caplog.clear()
        assert command("fit", *last, "--trainer.max_steps", steps).code == 0
        assert told in caplog.text
    assert command("validate", *last).code == 0
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["last.ckpt"]


def test_last_is_the_file_that_was_kept_for_it_else_the_newest_of_that_name(tmp_path: Path) -> None:
    keepers = [ModelCheckpoint(dirpath=tmp_path / "kept", save_last=True), LastCheckpoint()]
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=keepers, logger=False)
    assert find_last(trainer) is None
    files = [tmp_path / name for name in ("kept/last.ckpt", "kept/last-v1.ckpt", "checkpoints/last.ckpt")]
    for age, file in enumerate(files):
        file.parent.mkdir(exist_ok=True)
        file.touch()
        os.utime(file, (100 - age, 100 - age))
    for expected in (files[2], files[0], files[1]):
        assert find_last(trainer) == str(expected)
        expected.unlink()


def test_last_is_refused_where_every_start_has_a_folder_of_its_own(command: Command, small: Path) -> None:
    for options in (["--trainer.logger", "true"], ["--trainer.logger.init_args.version", "null"]):
        outcome = command("fit", "--config", small, "--ckpt_path", "last", *options)
        assert "every start of this run logs to a new folder" in refused(outcome, code=2)


def test_a_requeued_job_looks_for_the_last_checkpoint_without_an_option(
    command: Command,
    small: Path,
    written: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for count, code in (("0", 1), ("1", 0)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", count)
        caplog.clear()
        assert command("fit", "--config", small, "--trainer.max_steps", "1").code == code
        assert ("Restored all states" in caplog.text) == (code == 0)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, path = CheckpointFiles(), tmp_path / "folder" / "some.ckpt"
    content = {KEY: {"format": FORMAT}, "weights": torch.arange(1000)}
    files.save_checkpoint(content, path)

    def fail(content: object, file: Any) -> None:
        file.write(b"half of it")
        raise RuntimeError("a bug")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        files.save_checkpoint({**content, "weights": torch.zeros(1000)}, path)
    assert [path.name for path in path.parent.iterdir()] == ["some.ckpt"]
    assert torch.equal(files.load_checkpoint(path)["weights"], torch.arange(1000))


class Others(TorchCheckpointIO):
    """Files as a user wants them."""


def test_every_trainer_of_a_task_writes_that_way_unless_it_was_told_another(tmp_path: Path) -> None:
    assert type(fit(tmp_path / "ours").strategy.checkpoint_io) is CheckpointFiles
    assert type(fit(tmp_path / "others", plugins=[Others()]).strategy.checkpoint_io) is Others


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_from_python_a_run_resumes_with_the_word_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for steps, restored in ((2, False), (3, True)):
        assert fit(tmp_path, steps=steps, ckpt_path="last").global_step == steps
        assert ("Restored all states" in caplog.text) == restored
    assert read(tmp_path / "checkpoints" / "last.ckpt")[KEY]["rollouts"] == 3
