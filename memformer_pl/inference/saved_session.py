"""Saved sessions: files of tensors (safetensors) that say which model they belong to.

A file without its header, one that was cut short, and one in which a bit has changed are refused with the reason.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from memformer_pl.atomic_write import atomic_write
from memformer_pl.contract import SegmentModel
from memformer_pl.errors import UsageError

FORMAT = "memformer_pl session 3"


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], model: SegmentModel) -> None:
    """Write tensors that belong to a model, or nothing.

    Raises:
        UsageError: The file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "model": json.dumps(model.config()),
        "weights": fingerprint(model.state_dict()),
    }
    with atomic_write(path) as partial:
        # a file object says why a disk takes no more
        partial.write_bytes(save(tensors, metadata={**header, "checksum": checksum(header, tensors)}))


def read(path: str | os.PathLike[str], model: SegmentModel) -> dict[str, Tensor]:
    """The tensors of a file that :func:`write` has written for the same model.

    Raises:
        UsageError: There is no such file, it is damaged or foreign, or it is of another model; says what differs.
    """
    name = repr(str(path))
    if not Path(path).is_file():
        raise UsageError(f"there is no saved session {name}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
    except Exception as error:  # whatever the bytes provoke
        raise UsageError(f"{name} is damaged, or is not a saved session: {error}") from error
    if header.get("format") != FORMAT:
        told = f"it has format {header.get('format')!r}, not {FORMAT!r}. Let the model read the text again"
        raise UsageError(f"this version cannot read {name}: {told}")
    if header.pop("checksum", None) != checksum(header, tensors):
        raise UsageError(f"{name} is damaged: its bytes are not those that were written")
    if differing := model.differences(json.loads(header["model"])):
        raise UsageError(f"{name} belongs to another model: {', '.join(differing)}")
    if header["weights"] != fingerprint(model.state_dict()):
        raise UsageError(f"{name} belongs to a model with other weights, or of another precision")
    # a tensor of a file lies wherever its header ends, and a matrix product rounds by how its operands are aligned
    return {key: tensor.clone() for key, tensor in tensors.items()}


def checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """A hash of all that is in a file."""
    return hashlib.sha256(f"{sorted(header.items())} {fingerprint(tensors)}".encode()).hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
