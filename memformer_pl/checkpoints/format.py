"""What this package adds to a Lightning checkpoint, and how a wrong one is refused."""

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
FORMAT = 5
ZIP = b"PK\x03\x04"
"""How every file of ``torch.save`` begins."""


def read(path: str | os.PathLike[str], *, mmap: bool = True) -> object:
    """The content of a checkpoint. No code in the file is run.

    Args:
        path: Of a file on disk.
        mmap: Leave tensors on disk until they are looked at.

    Raises:
        UsageError: There is no such file, or it is not a checkpoint; says what it is.
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
    except Exception as error:  # whatever the bytes provoke
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            what = f"holds {code[1]}, not tensors and numbers alone; nothing in it was run"
            raise UsageError(f"{str(path)!r} {what}") from error
        raise UsageError(f"{str(path)!r} is damaged, or is not a checkpoint") from error
    return content


def require_intact(path: str | os.PathLike[str]) -> None:
    """Look at the checksums of a checkpoint, which torch does not.

    Raises:
        UsageError: A byte has changed since it was written.
    """
    with zipfile.ZipFile(path) as file:
        if file.testzip() is not None:
            raise UsageError(f"{str(path)!r} is damaged: its bytes are not those that were written")


def ours(checkpoint: object) -> Mapping[str, Any]:
    """What this package added to a checkpoint.

    Raises:
        UsageError: The file is foreign, or of another format.
    """
    added = checkpoint.get(KEY) if isinstance(checkpoint, Mapping) else None
    if not isinstance(added, Mapping):
        raise UsageError(f"the checkpoint was not written by {KEY}: it has no entry of that name")
    if added.get("format") != FORMAT:
        differ = f"has format {added.get('format')}, this version reads format {FORMAT}"
        raise UsageError(
            f"the checkpoint {differ}, in which options and weights have other names: use the version that wrote it, or train again"
        )
    return added


def check(checkpoint: object, model: SegmentModel) -> Mapping[str, Any]:
    """What this package added to a checkpoint of the same model.

    Raises:
        UsageError: The file is foreign, of another format, or of another model; says which value differs.
    """
    added = ours(checkpoint)
    if differing := model.differences(added["model"]):
        raise UsageError(f"the checkpoint holds another model, and cannot be loaded: {', '.join(differing)}")
    return added


def check_file(path: str | os.PathLike[str], model: SegmentModel, *, resume: bool) -> None:
    """Refuse a file that holds no checkpoint of this model; if training is to resume, also one of weights alone.

    Raises:
        UsageError: Says what the file is, or which value differs.
    """
    content = read(path)
    check(content, model)
    if resume and "optimizer_states" not in cast(Mapping[str, object], content):
        raise UsageError(f"{str(path)!r} holds weights alone: it can be validated and tested, but not resumed")
