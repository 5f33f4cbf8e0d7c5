"""What this package adds to a Lightning checkpoint, how files are written whole, and how a wrong one is refused."""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from memformer_pl.recurrence import SegmentModel
from memformer_pl.whole_files import whole

KEY = "memformer_pl"
FORMAT = 2
ZIP = b"PK\x03\x04"
"""How every file of ``torch.save`` begins."""


def read(path: str | os.PathLike[str], *, mmap: bool = True) -> object:
    """The content of a checkpoint. No code in the file is run.

    Args:
        path: Of a file on disk.
        mmap: Leave tensors on disk until they are looked at.

    Raises:
        ValueError: There is no such file, or it is no checkpoint; says what it is.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {str(path)!r}")
    with path.open("rb") as file:
        cut_short = file.read(len(ZIP)) == ZIP and not zipfile.is_zipfile(file)
    if cut_short:
        raise ValueError(f"{str(path)!r} is a checkpoint that was cut short: its end is missing")
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever the bytes provoke
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            what = f"holds {code[1]}, not tensors and numbers alone; nothing in it was run"
            raise ValueError(f"{str(path)!r} {what}") from error
        raise ValueError(f"{str(path)!r} is no checkpoint, or is damaged") from error
    return content


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint beside the one that it replaces, and reads it as data alone.

    Killed while it writes, a process leaves the old file whole. Lightning's own way is safe only where temporary files
    lie on the same disk, and leaves one there for every kill. Files that are on no disk (``s3://...``) are left to it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object | None = None
    ) -> None:
        """Write a file, or nothing."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole(path) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """The content of a checkpoint, on the CPU. No code in the file is run, whatever ``weights_only`` says.

        Raises:
            ValueError: The file is damaged, or no checkpoint of this package.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=True)
        content = read(path, mmap=False)
        ours(content)
        with zipfile.ZipFile(path) as file:  # torch does not look at the checksums
            if file.testzip() is not None:
                raise ValueError(f"{str(path)!r} is damaged: its bytes are not those that were written")
        return content  # type: ignore[return-value]  # it has been looked at


def install(strategy: Strategy) -> None:
    """Have a trainer's checkpoints written and read by :class:`CheckpointFiles`, unless it was told another way."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = CheckpointFiles()


def ours(checkpoint: object) -> Mapping[str, Any]:
    """What this package added to a checkpoint.

    Raises:
        ValueError: The file is foreign, or of another format.
    """
    added = checkpoint.get(KEY) if isinstance(checkpoint, Mapping) else None
    if not isinstance(added, Mapping):
        raise ValueError(f"the checkpoint was not written by {KEY}: it has no entry of that name")
    if added.get("format") != FORMAT:
        raise ValueError(f"the checkpoint has format {added.get('format')}, this version reads format {FORMAT}")
    return added


def check(checkpoint: object, model: SegmentModel) -> Mapping[str, Any]:
    """What this package added to a checkpoint of the same model.

    Raises:
        ValueError: The file is foreign, of another format, or of another model; says which value differs.
    """
    added = ours(checkpoint)
    if differing := model.differences(added["model"]):
        raise ValueError(f"the checkpoint holds another model, and cannot be loaded: {', '.join(differing)}")
    return added


def check_file(path: str | os.PathLike[str], model: SegmentModel, *, resume: bool) -> None:
    """Refuse a file that holds no checkpoint of this model; if training is to resume, also one of weights alone.

    Raises:
        ValueError: Says what the file is, or which value differs.
    """
    content = read(path)
    check(content, model)
    if resume and "optimizer_states" not in cast(Mapping[str, object], content):
        raise ValueError(f"{str(path)!r} holds weights alone: it can be validated and tested, but not resumed")
