"""The cost and the results of a run, for tables of many runs."""

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
from memformer_pl.errors import DivergedError
from memformer_pl.training.distributed import sum_over_ranks
from memformer_pl.training.flops import forward_flops
from memformer_pl.training.task import SegmentTask

FILE = "record.json"
TRAINING = ("train/", "bits/", "tokens/")
"""Prefixes of metrics of a single rollout, which a record leaves out."""


class RunRecord(Callback):
    """Write ``record.json`` beside the logs at the end of training: tokens, seconds, the model's configuration, and
    the metrics of the last validation. ``python -m memformer_pl sweep`` reads it.

    The record of a run that diverges says ``diverged``, and has no metrics: those of an earlier validation are not its
    result. A run that ends by another exception, or is stopped, has no record.

    Tokens are those of training, over all processes. Seconds run from the first rollout to the last, with validations,
    on the clock and on the processor of the first process. A resumed run continues both counts. Operations are those of
    one forward pass over one segment in one lane. ``mfu`` is the share of the devices' peak that the run took, with its
    validations, where the peak is known.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    def __init__(self) -> None:
        self._before: dict[str, int | float] = {"tokens": 0, "seconds": 0.0, "processor_seconds": 0.0}
        self._tokens: Tensor
        self._clocks: tuple[float, float] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module.

        Raises:
            TypeError: It is not a ``SegmentTask``.
        """
        if not isinstance(pl_module, SegmentTask):
            raise TypeError(f"RunRecord needs a SegmentTask, got {type(pl_module).__name__}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks, and remove the record of an earlier end: training goes on."""
        folder = trainer.log_dir  # all ranks must evaluate this
        if folder is not None and trainer.is_global_zero:
            (Path(folder) / FILE).unlink(missing_ok=True)
        self._tokens = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        self._clocks = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Rollout, batch_idx: int
    ) -> None:
        """Count the tokens of a rollout on their device, so that nothing waits for a GPU."""
        self._tokens = self._tokens + torch.stack([segment.token_mask.sum() for segment in batch.segments]).sum()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record; Lightning does not call this if training was interrupted."""
        assert isinstance(pl_module, SegmentTask)
        self._write(trainer, pl_module, _validation_metrics(trainer.callback_metrics))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the record of a run that diverges."""
        if isinstance(exception, DivergedError):
            assert isinstance(pl_module, SegmentTask)
            self._write(trainer, pl_module, {"diverged": True})

    def _write(self, trainer: Trainer, pl_module: SegmentTask, outcome: Mapping[str, Any]) -> None:
        """Collective."""
        counts, folder = self._counts(), trainer.log_dir  # all ranks must evaluate this
        if folder is None or not trainer.is_global_zero:
            return
        model = pl_module.model
        record = {
            "model": model.config(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "state_bytes": None if model.growing else state_bytes(model.initial_state(1)),
            "operations_per_token": forward_flops(model) / model.segment_length,
            "steps": trainer.global_step,
            **counts,
            **_utilization(pl_module, counts),
            **outcome,
        }
        path = Path(folder) / FILE
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(record, indent=1) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """The counts so far. Collective."""
        return self._counts()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue counting from those of the checkpoint."""
        self._before = {name: state_dict[name] for name in self._before}

    def _counts(self) -> dict[str, int | float]:
        if self._clocks is None:
            return dict(self._before)
        now = time.perf_counter(), time.process_time()
        seconds, processor = (end - start for end, start in zip(now, self._clocks, strict=True))
        return {
            "tokens": int(self._before["tokens"]) + int(sum_over_ranks(self._tokens)),
            "seconds": round(self._before["seconds"] + seconds, 1),
            "processor_seconds": round(self._before["processor_seconds"] + processor, 1),
        }


def _utilization(task: SegmentTask, counts: Mapping[str, int | float]) -> dict[str, float]:
    utilization = task.utilization()
    return {"mfu": utilization.of(counts["tokens"] / counts["seconds"])} if utilization and counts["seconds"] else {}


def _validation_metrics(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        name: float(value) for name, value in sorted(metrics.items()) if "/" in name and not name.startswith(TRAINING)
    }
