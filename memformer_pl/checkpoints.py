"""What this package adds to a Lightning checkpoint, and how a file is refused that does not fit."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memformer_pl.recurrence import SegmentModel

KEY = "memformer_pl"
FORMAT = 2


def read(path: str | os.PathLike[str]) -> object:
    """The content of a checkpoint. Tensors stay on disk until they are looked at; no code in the file is run.

    Raises:
        ValueError: There is no such file, or it is no checkpoint.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {str(path)!r}")
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # whatever the bytes provoke
        raise ValueError(f"{str(path)!r} is no checkpoint, or is damaged") from error
    return content


def check(checkpoint: object, model: SegmentModel) -> Mapping[str, Any]:
    """What this package added to a checkpoint of the same model.

    Raises:
        ValueError: The file is foreign, of another format, or of another model; says which value differs.
    """
    ours = checkpoint.get(KEY) if isinstance(checkpoint, Mapping) else None
    if not isinstance(ours, Mapping):
        raise ValueError(f"the checkpoint was not written by {KEY}: it has no entry of that name")
    if ours.get("format") != FORMAT:
        raise ValueError(f"the checkpoint has format {ours.get('format')}, this version reads format {FORMAT}")
    saved, present = ours["model"], model.config()
    differing = [
        f"{name} (was {saved.get(name)!r}, is {present.get(name)!r})"
        for name in dict.fromkeys((*saved, *present))
        if saved.get(name) != present.get(name)
    ]
    if differing:
        raise ValueError(f"the checkpoint holds another model, and cannot be loaded: {', '.join(differing)}")
    return ours
