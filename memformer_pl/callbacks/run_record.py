"""What a run took and what came out, for tables of many runs."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from memformer_pl.atomic_write import atomic_write
from memformer_pl.contract import state_bytes
from memformer_pl.data.lanes import Rollout
from memformer_pl.training.distributed import sum_over_ranks
from memformer_pl.training.flops import count_flops
from memformer_pl.training.task import SegmentTask

FILE = "record.json"
TRAINING = ("train/", "bits/", "tokens/")
"""Figures of a single rollout."""


class RunRecord(Callback):
    """Write ``record.json`` beside the logs at the end of training: tokens read, seconds, what the model is, and the
    last figures of the validation. ``python -m memformer_pl sweep`` makes lines of its ledger from it.

    Tokens are those of training, over all processes. Seconds are those between the first rollout and the last one,
    validations included, as the clock counts them and as the processor of the first process does; all of them go on
    where an interrupted run is taken up again. Operations are counted by torch, of reading one segment in one lane.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    def __init__(self) -> None:
        self._before: dict[str, int | float] = {"tokens": 0, "seconds": 0.0, "processor_seconds": 0.0}
        self._tokens: Tensor
        self._clocks: tuple[float, float] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is no run of segments.

        Raises:
            TypeError: The run is not one of ``SegmentTask``.
        """
        if not isinstance(pl_module, SegmentTask):
            raise TypeError(f"RunRecord needs a SegmentTask, got {type(pl_module).__name__}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._tokens = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        self._clocks = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Rollout, batch_idx: int
    ) -> None:
        """Count the tokens of a rollout, where they are: nothing waits for a GPU."""
        self._tokens = self._tokens + torch.stack([segment.token_mask.sum() for segment in batch.segments]).sum()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write. Not called where training was interrupted."""
        assert isinstance(pl_module, SegmentTask)
        taken, folder = self._taken(), trainer.log_dir  # all ranks have to ask
        if folder is None or not trainer.is_global_zero:
            return
        model = pl_module.model
        record = {
            "model": model.config(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "state_bytes": state_bytes(model.initial_state(1)),
            "operations_per_token": count_flops(model) / model.segment_length,
            "steps": trainer.global_step,
            **taken,
            **_evaluated(trainer.callback_metrics),
        }
        path = Path(folder) / FILE
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on has to add. Collective."""
        return self._taken()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on counting from there."""
        self._before = {name: state_dict[name] for name in self._before}

    def _taken(self) -> dict[str, int | float]:
        if self._clocks is None:
            return dict(self._before)
        now = time.perf_counter(), time.process_time()
        seconds, processor = (end - start for end, start in zip(now, self._clocks, strict=True))
        return {
            "tokens": int(self._before["tokens"]) + int(sum_over_ranks(self._tokens)),
            "seconds": round(self._before["seconds"] + seconds, 1),
            "processor_seconds": round(self._before["processor_seconds"] + processor, 1),
        }


def _evaluated(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        name: float(value) for name, value in sorted(metrics.items()) if "/" in name and not name.startswith(TRAINING)
    }
