"""Accuracy of answers by their distance from the start of the document."""

import math

import numpy as np
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
from memformer_pl.training.metrics import accuracy_by_group, exact_by_group
from memformer_pl.training.task import SegmentTask


class AccuracyByDistance(Callback):
    """Log the accuracy of every validation by distance, for documents with a prompt, such as those of ``Copy`` and
    ``AssociativeRecall``.

    The distance of a document is the number of segments between its first token and its first target. A document that
    asks in many places, such as those of ``MQAR``, counts at the number of segments before its last one, the farthest
    that an answer can be. The accuracy at distance D is logged as ``distance/D``, and the share of documents whose
    answers are all right as ``exact/D``; the last values are printed when training ends.
    """

    logs = ("distance/", "exact/")
    """Prefixes of the metrics that this callback logs."""

    def __init__(self) -> None:
        self._accuracies: dict[int, float] = {}
        self._exact: dict[int, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that every validation document has a prompt of whole segments, or answers in many places.

        Raises:
            TypeError: The run does not train a ``SegmentTask`` on a ``SegmentData``.
            UsageError: A document has no prompt, or its prompt ends in the middle of a segment.
        """
        data = getattr(trainer, "datamodule", None)
        if not (isinstance(pl_module, SegmentTask) and isinstance(data, SegmentData)):
            raise TypeError("AccuracyByDistance needs a SegmentTask, and a SegmentData as datamodule")
        validation = data.packed.validation
        prompt_lengths = validation.prompt_lengths[~validation.has_answers]
        if not prompt_lengths.all() or (prompt_lengths % data.segment_length).any():
            raise UsageError(
                "AccuracyByDistance needs validation documents with prompts of whole segments of "
                f"{data.segment_length} tokens: give corpus.segment_length the same value, and use the tokenizer Bytes"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracies, except in Lightning's sanity check."""
        assert isinstance(pl_module, SegmentTask)
        if trainer.sanity_checking:
            return
        totals, groups = pl_module.totals("validation"), distances(require_lane_loader(trainer.val_dataloaders))
        found, exact = accuracy_by_group(totals, groups), exact_by_group(totals, groups)
        # with limit_val_batches, a validation may not reach a distance
        self._accuracies = {distance: accuracy for distance, accuracy in found.items() if not math.isnan(accuracy)}
        self._exact = {distance: exact[distance] for distance in self._accuracies}
        logged = {f"distance/{d}": accuracy for d, accuracy in self._accuracies.items()}
        pl_module.log_dict(logged | {f"exact/{d}": share for d, share in self._exact.items()}, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the accuracies of the last validation."""
        if self._accuracies and trainer.is_global_zero:
            heads = ("distance in segments", "accuracy", "all right")
            table = Table(*heads, title="Accuracy by distance", title_justify="left")
            for distance, accuracy in self._accuracies.items():
                table.add_row(str(distance), f"{accuracy:.3f}", f"{self._exact[distance]:.3f}")
            Console().print(table)


def distances(loader: LaneLoader) -> Int[Tensor, " documents"]:
    """Number of segments before the first target, for each document; before the last segment, if it has answers."""
    documents = loader.documents
    last = np.where(documents.has_answers, documents.lengths - 1, documents.prompt_lengths)
    return torch.from_numpy(last // loader.segment_length)
