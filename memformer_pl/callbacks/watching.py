"""Base class of callbacks that record what memory does in each validation, and save arrays of it."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer

from memformer_pl.atomic_write import writing
from memformer_pl.callbacks.traces import Recorder, choose
from memformer_pl.contract import SegmentModel
from memformer_pl.data import LaneLoader, Rollout
from memformer_pl.data.datamodule import SegmentData
from memformer_pl.data.lanes import require_lane_loader
from memformer_pl.training.run_folder import folder_of
from memformer_pl.training.task import SegmentTask


class Watching(Callback):
    """Record every validation. For a model without probes of a memory, nothing is recorded or written.

    Args:
        documents: Numbers of validation documents; by default the longest one.
    """

    name: str
    """Name of the folder beside the logs, and prefix of the pictures in TensorBoard."""

    def __init__(self, *, documents: Sequence[int] | None) -> None:
        self._wanted = documents
        self._recorder: Recorder | None = None

    @abstractmethod
    def watch(self, model: SegmentModel, loader: LaneLoader) -> Recorder:
        """Build the recorder of a validation."""

    @abstractmethod
    def conclude(self, trainer: Trainer, task: SegmentTask) -> Mapping[str, np.ndarray]:
        """Log the recorded validation, and return the arrays to save, if any. Collective."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the run and the chosen documents.

        Raises:
            TypeError: The run does not use a ``SegmentTask`` and a ``SegmentData``.
            OptionError: A chosen document does not exist.
        """
        data = getattr(trainer, "datamodule", None)
        if not (isinstance(pl_module, SegmentTask) and isinstance(data, SegmentData)):
            raise TypeError(f"{type(self).__name__} needs a SegmentTask, and a SegmentData as datamodule")
        lengths = data.packed.validation.lengths
        longest = lengths.argsort()[-1:].tolist()
        self.documents = longest if self._wanted is None else choose("documents", self._wanted, len(lengths))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a recorder, except in Lightning's sanity check."""
        assert isinstance(pl_module, SegmentTask)
        if not trainer.sanity_checking:
            self._recorder = self.watch(pl_module.model, require_lane_loader(trainer.val_dataloaders))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Attach the hooks of the recorder."""
        if self._recorder is not None:
            assert isinstance(batch, Rollout)
            self._recorder.start(batch.documents)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Remove the hooks of the recorder."""
        if self._recorder is not None:
            self._recorder.stop()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and save what was recorded."""
        if self._recorder is None:
            return
        assert isinstance(pl_module, SegmentTask)
        self._recorder = None
        arrays, folder = self.conclude(trainer, pl_module), folder_of(trainer)  # all ranks must evaluate this
        if arrays and folder is not None and trainer.is_global_zero:
            path = folder / self.name / f"step={trainer.global_step}.npz"
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # names of arrays, not options

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove the hooks if a validation was interrupted."""
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None
