"""Saved sessions: safetensors files that record which model they belong to.

A file without its header, a truncated file, and one in which a bit has changed are refused with the reason.
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
from memformer_pl.contract import SegmentModel, State
from memformer_pl.errors import UsageError

FORMAT = "memformer_pl session 4"
"""Format of a file; since 4, it belongs to a model whose self-attention has one weight for queries, keys and values."""


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], model: SegmentModel) -> None:
    """Write the tensors of a session of ``model``, atomically.

    Raises:
        UsageError: The file cannot be written; an older file stays.
    """
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "model": json.dumps(model.config()),
        "weights": fingerprint(model.state_dict()),
    }
    with atomic_write(path) as partial:
        # unlike safetensors, Path.write_bytes reports a full disk as such
        partial.write_bytes(save(tensors, metadata={**header, "checksum": checksum(header, tensors)}))


def read(path: str | os.PathLike[str], model: SegmentModel) -> dict[str, Tensor]:
    """Read a file that :func:`write` has written for the same model.

    Raises:
        UsageError: There is no such file, it is damaged or not a saved session, or it belongs to another model; the
            message lists the differences.
    """
    name = repr(str(path))
    if not Path(path).is_file():
        raise UsageError(f"there is no saved session {name}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    except Exception as error:  # damaged bytes may raise anything
        raise UsageError(f"{name} is damaged, or is not a saved session: {error}") from error
    if header.get("format") != FORMAT:
        told = f"it has format {header.get('format')!r}, not {FORMAT!r}. Let the model read the text again"
        raise UsageError(f"{name} is not a saved session that this version reads: {told}")
    if header.pop("checksum", None) != checksum(header, tensors):
        raise UsageError(f"{name} is damaged: its bytes are not those that were written")
    if differing := model.differences(json.loads(header["model"])):
        raise UsageError(f"{name} belongs to another model: {', '.join(differing)}")
    if header["weights"] != fingerprint(model.state_dict()):
        raise UsageError(f"{name} belongs to a model with other weights, or another precision")
    # tensors of a file are aligned arbitrarily, and the rounding of matrix products depends on alignment
    return {key: tensor.clone() for key, tensor in tensors.items()}


def checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """A hash of the whole content of a file."""
    return hashlib.sha256(f"{sorted(header.items())} {fingerprint(tensors)}".encode()).hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def named(state: State) -> dict[str, Tensor]:
    """The fields of a state by the names that they have in a file."""
    names = getattr(state, "_fields", map(str, range(len(state))))
    return {f"state.{name}": field for name, field in zip(names, state, strict=True)}


def as_real(field: Tensor) -> Tensor:
    """Real and imaginary parts of a complex field, since safetensors does not support complex128."""
    return torch.view_as_real(field.resolve_conj()) if field.is_complex() else field


def from_real(saved: Tensor, field: Tensor) -> Tensor:
    """The inverse of :func:`as_real`, for a field like ``field``."""
    return torch.view_as_complex(saved) if field.is_complex() else saved
