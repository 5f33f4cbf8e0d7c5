"""Checkpoints are written atomic_write or not at all, and read as data alone."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from memformer_pl.atomic_write import atomic_write
from memformer_pl.checkpoints.format import ours, read, require_intact


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint beside the one that it replaces, and reads it as data alone.

    Killed while it writes, a process leaves the old file whole. Lightning's own way is safe only where temporary files
    lie on the same disk, and leaves one there for every kill. Files that are on no disk (``s3://...``) are left to it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object | None = None
    ) -> None:
        """Write a file, or nothing.

        Raises:
            UsageError: The file cannot be written, for want of room or of permission.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_write(path) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """The content of a checkpoint, on the CPU. No code in the file is run, whatever ``weights_only`` says.

        Raises:
            UsageError: The file is damaged, or this package did not write it.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=True)
        content = read(path, mmap=False)
        ours(content)
        require_intact(path)
        return content  # type: ignore[return-value]  # it has been looked at


def install(strategy: Strategy) -> None:
    """Have a trainer's checkpoints written and read by :class:`CheckpointFiles`, unless it was told another way."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = CheckpointFiles()
