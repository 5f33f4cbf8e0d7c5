"""What this package adds to a Lightning checkpoint, and the checks of a file before it is used."""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from memformer_pl.contract import SegmentModel
from memformer_pl.errors import UsageError

KEY = "memformer_pl"
"""Entry of a checkpoint that holds what this package adds."""
FORMAT = 6
"""Format of that entry; since 6, self-attention has one weight for queries, keys and values."""
ZIP = b"PK\x03\x04"
"""First bytes of a file of ``torch.save``."""


def read(path: str | os.PathLike[str], *, mmap: bool = True) -> object:
    """Read a checkpoint without running code from the file.

    Args:
        path: A file on disk.
        mmap: Leave tensors on disk until they are used.

    Raises:
        UsageError: The file does not exist, or is not a checkpoint; says what is wrong with it.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {str(path)!r}")
    with path.open("rb") as file:
        cut_short = file.read(len(ZIP)) == ZIP and not zipfile.is_zipfile(file)
    if cut_short:
        raise UsageError(f"{str(path)!r} is a checkpoint that was cut short: its end is missing")
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # arbitrary bytes raise arbitrary exceptions
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            reason = f"holds {code[1]}, but a checkpoint holds only tensors and plain values; nothing in it was run"
            raise UsageError(f"{str(path)!r} {reason}") from error
        raise UsageError(f"{str(path)!r} is damaged, or is not a checkpoint") from error
    return content


def require_intact(path: str | os.PathLike[str]) -> None:
    """Verify the checksums of a checkpoint, which torch ignores.

    Raises:
        UsageError: A byte has changed since the file was written.
    """
    with zipfile.ZipFile(path) as file:
        if file.testzip() is not None:
            raise UsageError(f"{str(path)!r} is damaged: its checksums do not match")


def ours(checkpoint: object) -> Mapping[str, Any]:
    """Return what this package added to a checkpoint.

    Raises:
        UsageError: The file is foreign, or has another format.
    """
    added = checkpoint.get(KEY) if isinstance(checkpoint, Mapping) else None
    if not isinstance(added, Mapping):
        raise UsageError(f"the checkpoint was not written by {KEY}: it has no entry of that name")
    if added.get("format") != FORMAT:
        raise UsageError(
            f"the checkpoint has format {added.get('format')}, this version reads format {FORMAT}, in which weights "
            "have other names and shapes: use the version that wrote it, or train again"
        )
    return added


def check(checkpoint: object, model: SegmentModel) -> Mapping[str, Any]:
    """Return what this package added to a checkpoint, if that is of the same model.

    Raises:
        UsageError: The file is foreign, has another format, or holds another model; says which value differs.
    """
    added = ours(checkpoint)
    if differing := model.differences(added["model"]):
        raise UsageError(f"the checkpoint holds another model, and cannot be loaded: {', '.join(differing)}")
    return added


def check_file(path: str | os.PathLike[str], model: SegmentModel, *, resume: bool) -> None:
    """Check that a file is a checkpoint of this model; if training is to resume, that it holds more than weights.

    Raises:
        UsageError: Says what is wrong with the file, or which value differs.
    """
    content = read(path)
    check(content, model)
    if resume:
        require_resumable(content, path)


def require_resumable(checkpoint: object, path: str | os.PathLike[str]) -> None:
    """Refuse to resume from a checkpoint of this package that holds only weights.

    Raises:
        UsageError: It does.
    """
    if "optimizer_states" not in cast(Mapping[str, object], checkpoint):
        raise UsageError(f"{str(path)!r} holds only weights: it can be validated and tested, but not resumed")
