"""What a module says about its runs to the callback ``RunRecord``."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from torch import Tensor

from memformer_pl.contract import SegmentModel, state_bytes
from memformer_pl.data.lanes import Rollout
from memformer_pl.training.figures import Utilization
from memformer_pl.training.flops import forward_flops, peak_flops_of, training_flops

TRAINING = ("train/", "bits/", "tokens/")
"""Prefixes of metrics of a single step, which are no results."""


class Recorded(LightningModule):
    """A module whose runs can be recorded."""

    counted: ClassVar[str]
    """What training reads, in the plural: ``tokens``, for example."""

    @abstractmethod
    def read_in(self, batch: Any) -> Tensor:
        """How many of these a batch has, as a whole number on its device."""

    @abstractmethod
    def facts(self, counts: Mapping[str, int | float]) -> Mapping[str, Any]:
        """What is to be recorded of a run besides counts and results.

        Args:
            counts: What was read, ``seconds`` and ``processor_seconds``.
        """

    def results(self) -> Mapping[str, float]:
        """The figures that the run came to, by their names in tables: by default of the last validation or test."""
        metrics = sorted(self.trainer.callback_metrics.items())
        return {name: float(value) for name, value in metrics if "/" in name and not name.startswith(TRAINING)}


class SegmentRecord(Recorded):
    """A module that trains a segment model."""

    model: SegmentModel
    peak_flops: float | None
    counted = "tokens"

    def peak(self) -> float | None:
        """FLOP/s of all devices together; None if not known."""
        peak = self.peak_flops or peak_flops_of(self.device, str(self.trainer.precision))
        return None if peak is None else peak * self.trainer.world_size

    def utilization(self) -> Utilization | None:
        """What turns a speed into MFU; None if the peak of the devices is not known."""
        peak = self.peak()
        return None if peak is None else Utilization(training_flops(self.model), peak)

    def read_in(self, batch: Rollout) -> Tensor:
        """Tokens of a rollout."""
        return torch.stack([segment.token_mask.sum() for segment in batch.segments]).sum()

    def facts(self, counts: Mapping[str, int | float]) -> Mapping[str, Any]:
        """The model, what it costs and carries, and MFU where the peak of the devices is known."""
        model, utilization, seconds = self.model, self.utilization(), counts["seconds"]
        mfu = {"mfu": utilization.of(counts["tokens"] / seconds)} if utilization and seconds else {}
        return {
            "model": model.config(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "state_bytes": None if model.growing else state_bytes(model.initial_state(1)),
            "operations_per_token": forward_flops(model) / model.segment_length,
            **mfu,
        }
