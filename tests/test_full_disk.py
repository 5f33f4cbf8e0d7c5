"""A failed write names the file and the system's reason, and leaves the earlier file unchanged."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import memformer

from memformer_pl.atomic_write import atomic_write
from memformer_pl.checkpoints.format import FORMAT, KEY
from memformer_pl.checkpoints.pretrained import load_pretrained, save_pretrained
from memformer_pl.data import Bytes
from memformer_pl.errors import UsageError
from memformer_pl.inference import saved_session
from memformer_pl.training.checkpoint_io import CheckpointFiles

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")

SMALL, LARGE = torch.arange(10), torch.zeros(100_000)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process gets larger: the system refuses as on a full disk, by another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def checkpoint(path: Path, content: torch.Tensor) -> None:
    CheckpointFiles().save_checkpoint({KEY: {"format": FORMAT}, "content": content}, path)


def memory(path: Path, content: torch.Tensor) -> None:
    saved_session.write(path, {"content": content}, memformer())


@pytest.mark.parametrize("write", [checkpoint, memory])
def test_a_full_disk_is_reported_and_the_earlier_file_stays(tmp_path: Path, write: Callable[..., None]) -> None:
    path = tmp_path / "new" / "file"
    with largest_file(50_000), pytest.raises(UsageError, match=r"new/file': File too large \(nothing was written\)"):
        write(path, LARGE)
    assert not list(path.parent.iterdir())
    write(path, SMALL)
    before = path.read_bytes()
    told = r"cannot write '.*/file': File too large \(the file that was there before is unchanged\)\. Make room"
    with largest_file(50_000), pytest.raises(UsageError, match=told):
        write(path, LARGE)
    assert path.read_bytes() == before
    assert names_in(path.parent) == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_the_reason_of_the_system_is_reported_and_not_that_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Full(type(tmp_path)):  # type: ignore[misc]  # a Path of this system
        """Opens files on a disk that takes only a little more."""

        def open(self, *args: Any, **options: Any) -> Any:
            file = super().open(*args, **options)
            return Throttled(file, number)

    monkeypatch.setattr("memformer_pl.atomic_write.Path", Full)
    with pytest.raises(UsageError, match=f"cannot write '.*file': {os.strerror(number)}"):
        checkpoint(tmp_path / "file", LARGE)
    assert not list(tmp_path.iterdir())


class Throttled:
    """A file that takes 1,000 bytes."""

    def __init__(self, file: Any, number: int) -> None:
        self.file, self.number, self.left = file, number, 1000

    def __enter__(self) -> "Throttled":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        self.left -= len(data)
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("write", [checkpoint, memory])
def test_a_path_that_is_not_writable_is_reported(tmp_path: Path, write: Callable[..., None]) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        UsageError, match=r"cannot write '.*file/below/it': creating its folder failed \(.*Not a direct"
    ):
        write(tmp_path / "file" / "below" / "it", SMALL)
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"cannot write '.*folder': Is a directory"):
        write(tmp_path / "folder", SMALL)
    assert names_in(tmp_path) == ["file", "folder"]


def test_what_else_goes_wrong_while_a_file_is_written_keeps_its_name(tmp_path: Path) -> None:
    for error in (PermissionError(errno.EACCES, "Permission denied", "a document"), KeyError("a bug")):
        with pytest.raises(type(error)) as raised:
            write_and_raise(tmp_path / "file", error)
        assert raised.value is error
    assert not list(tmp_path.iterdir())


def write_and_raise(path: Path, error: Exception) -> None:
    with atomic_write(path) as partial:
        partial.write_text("half of it")
        raise error


def test_an_export_to_a_full_disk_leaves_the_earlier_model(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    small = memformer()
    save_pretrained(small, folder, tokenizer="Bytes")
    (folder / "README.md").write_text("my own words")
    names = names_in(folder)
    large = memformer(vocab_size=5000)
    told = "cannot write '.*folder': .*File too large"
    with largest_file(50_000), pytest.raises(UsageError, match=told):
        save_pretrained(large, folder)
    assert names_in(folder) == names
    assert isinstance(load_pretrained(folder).tokenizer, Bytes)
    assert load_pretrained(folder).model.config() == small.config()
    save_pretrained(large, folder)
    assert load_pretrained(folder).model.config() == large.config()
    assert load_pretrained(folder).tokenizer is None
    assert names_in(folder) == names
    assert (folder / "README.md").read_text() == "my own words"


def test_a_folder_that_is_not_writable_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UsageError, match=r"cannot write '.*file/folder': .*Not a directory"):
        save_pretrained(memformer(), tmp_path / "file" / "folder")


def test_a_run_on_a_full_disk_ends_with_a_line_and_goes_on_when_there_is_room(
    command: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    words = ["fit", "--config", small, "--ckpt_path", "last", "--trainer.max_steps"]
    assert command(*words, 1).code == 0
    last = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    with largest_file(len(before) // 2):
        outcome = command(*words, 2)
    assert outcome.code == 1
    (error,) = outcome.errors
    assert "last.ckpt': File too large (the file that was there before is unchanged)" in error
    assert last.read_bytes() == before
    assert names_in(last.parent) == ["last.ckpt"]
    assert command(*words, 2).code == 0
