"""Write checkpoints atomically, and read them without running code."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy

from memformer_pl.atomic_write import atomic_write
from memformer_pl.checkpoints.format import ours, read, require_intact


class CheckpointFiles(TorchCheckpointIO):
    """Write a checkpoint beside the one that it replaces, and read it without running code.

    A process that is killed while it writes leaves the old file intact. Lightning's own writer is safe only if the
    folder for temporary files is on the same disk, and leaves a file there at every kill. Remote files (``s3://...``)
    are still written by Lightning.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object | None = None
    ) -> None:
        """Write the whole file, or nothing.

        Raises:
            UsageError: The file cannot be written, for lack of space or of permission.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_write(path) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU. No code in the file is run, whatever ``weights_only`` is.

        Raises:
            UsageError: The file is damaged, or this package did not write it.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=True)
        content = read(path, mmap=False)
        ours(content)
        require_intact(path)
        return content  # type: ignore[return-value]  # `ours` has checked it


def install(strategy: Strategy) -> None:
    """Make a trainer use :class:`CheckpointFiles`, unless it was given a checkpoint plugin."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = CheckpointFiles()
