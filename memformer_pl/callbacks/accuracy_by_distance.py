"""How often an answer is right that lies so many segments behind the beginning of its document."""

import math

import torch
from jaxtyping import Int
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from memformer_pl.data import LaneLoader
from memformer_pl.data.datamodule import SegmentData
from memformer_pl.data.lanes import require_lane_loader
from memformer_pl.errors import UsageError
from memformer_pl.training.metrics import accuracy_by_group
from memformer_pl.training.task import SegmentTask


class AccuracyByDistance(Callback):
    """Count right answers by distance in every validation, for documents of which a part is given, as ``Recall`` and
    ``Lookup`` make them.

    A distance is how many segments lie between the first token of a document and the first that is asked for.
    TensorBoard gets ``distance/D`` for each distance D, and ``RunRecord`` writes the last; they are printed when
    training ends.
    """

    logs = ("distance/",)
    """How the figures begin that a run can monitor."""

    def __init__(self) -> None:
        self._accuracies: dict[int, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse documents that do not ask, or that ask in the middle of a segment.

        Raises:
            TypeError: The run is not one of ``SegmentTask`` on ``SegmentData``.
            UsageError: What is given is not a number of whole segments.
        """
        data = getattr(trainer, "datamodule", None)
        if not (isinstance(pl_module, SegmentTask) and isinstance(data, SegmentData)):
            raise TypeError("AccuracyByDistance needs a SegmentTask, and a SegmentData as datamodule")
        prompt_lengths = data.packed.validation.prompt_lengths
        if not prompt_lengths.all() or (prompt_lengths % data.segment_length).any():
            raise UsageError(
                "AccuracyByDistance needs held-out documents of which whole segments are given, of "
                f"{data.segment_length} tokens: is corpus.segment_length that of the data, and a token a byte?"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log. Lightning's check before training is left out."""
        assert isinstance(pl_module, SegmentTask)
        if trainer.sanity_checking:
            return
        found = accuracy_by_group(
            pl_module.totals("validation"), distances(require_lane_loader(trainer.val_dataloaders))
        )
        # a validation that is limited may not come to a distance
        self._accuracies = {distance: accuracy for distance, accuracy in found.items() if not math.isnan(accuracy)}
        pl_module.log_dict({f"distance/{d}": accuracy for d, accuracy in self._accuracies.items()}, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what the last validation found."""
        if self._accuracies and trainer.is_global_zero:
            table = Table("segments later", "right", title="Accuracy by distance", title_justify="left")
            for distance, accuracy in self._accuracies.items():
                table.add_row(str(distance), f"{accuracy:.3f}")
            Console().print(table)


def distances(loader: LaneLoader) -> Int[Tensor, " documents"]:
    """How many segments lie before the first token that is asked for, for each document."""
    return torch.from_numpy(loader.documents.prompt_lengths // loader.segment_length)
