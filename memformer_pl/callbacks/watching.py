"""What callbacks that make traces have in common: they watch validation, and save an array file for each."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer

from memformer_pl.atomic_write import writing
from memformer_pl.callbacks.traces import Recorder, choose
from memformer_pl.contract import SegmentModel
from memformer_pl.data import LaneLoader, Rollout
from memformer_pl.data.datamodule import SegmentData
from memformer_pl.data.lanes import require_lane_loader
from memformer_pl.training.task import SegmentTask


class Watching(Callback):
    """Feeds a recorder with every validation. A model without probes of a memory is not watched, and nothing is written.

    Args:
        documents: Held-out documents, by their numbers; by default the longest.
    """

    name: str
    """Of the folder beside the logs, and the first word of what TensorBoard shows."""

    def __init__(self, *, documents: Sequence[int] | None) -> None:
        self._wanted = documents
        self._recorder: Recorder | None = None

    @abstractmethod
    def watch(self, model: SegmentModel, loader: LaneLoader) -> Recorder:
        """A recorder for the validation that begins."""

    @abstractmethod
    def conclude(self, trainer: Trainer, task: SegmentTask) -> Mapping[str, np.ndarray]:
        """Log what was seen, and return what is to be saved, if anything. Collective: every rank comes here."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be watched.

        Raises:
            TypeError: The run is not one of ``SegmentTask`` on ``SegmentData``.
            OptionError: There is no such document.
        """
        data = getattr(trainer, "datamodule", None)
        if not (isinstance(pl_module, SegmentTask) and isinstance(data, SegmentData)):
            raise TypeError(f"{type(self).__name__} needs a SegmentTask, and a SegmentData as datamodule")
        lengths = data.packed.validation.lengths
        longest = lengths.argsort()[-1:].tolist()
        self.documents = longest if self._wanted is None else choose("documents", self._wanted, len(lengths))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew. Lightning's check before training is not watched."""
        assert isinstance(pl_module, SegmentTask)
        if not trainer.sanity_checking:
            self._recorder = self.watch(pl_module.model, require_lane_loader(trainer.val_dataloaders))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look."""
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
        """Look away."""
        if self._recorder is not None:
            self._recorder.stop()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log and save."""
        if self._recorder is None:
            return
        assert isinstance(pl_module, SegmentTask)
        self._recorder = None
        arrays, folder = self.conclude(trainer, pl_module), trainer.log_dir  # all ranks have to ask
        if arrays and folder is not None and trainer.is_global_zero:
            path = Path(folder) / self.name / f"step={trainer.global_step}.npz"
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # names of arrays, no options

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind where a validation was broken off."""
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None
