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
from memformer_pl.errors import DivergedError
from memformer_pl.training.distributed import sum_over_ranks
from memformer_pl.training.records import Recorded
from memformer_pl.training.run_folder import folder_of

FILE = "record.json"


class RunRecord(Callback):
    """Write ``record.json`` beside the logs at the end of training: what was read, seconds, the model's configuration,
    and the results: of a ``SegmentTask`` the metrics of the last validation. ``python -m memformer_pl sweep`` reads it.

    The record of a run that diverges says ``diverged``, and has no metrics: those of an earlier validation are not its
    result. A run that ends by another exception, or is stopped, has no record. A test adds its metrics to the record in
    its folder, or begins one.

    Tokens, or what else the module counts, are those of training, over all processes. Seconds run from the first
    rollout to the last, with validations, on the clock and on the processor of the first process; what other callbacks
    do at the end of training is not in them. A run that goes on continues both counts. Operations are those of a token
    in one forward pass over a segment in one lane. ``mfu`` is the share of the devices' peak that the run took, with
    its validations, where the peak is known.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    def __init__(self) -> None:
        self._before: dict[str, int | float] = {"seconds": 0.0, "processor_seconds": 0.0}
        self._counted: str
        self._read: Tensor
        self._clocks: tuple[float, float] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module.

        Raises:
            TypeError: It is not a ``SegmentTask``, nor another ``Recorded`` module.
        """
        self._counted = _recorded(pl_module).counted
        self._before.setdefault(self._counted, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks, and remove the record of an earlier end: training goes on."""
        folder = folder_of(trainer)  # all ranks must evaluate this
        if folder is not None and trainer.is_global_zero:
            (folder / FILE).unlink(missing_ok=True)
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks. Lightning does not call this where a run resumes in the middle of an epoch."""
        self._read = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        self._clocks = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        """Count what a batch holds on its device, so that nothing waits for a GPU."""
        self._read = self._read + _recorded(pl_module).read_in(batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clocks. Collective."""
        self._before, self._clocks = self._counts(), None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record; Lightning does not call this if training was interrupted."""
        self._write(trainer, _recorded(pl_module), _recorded(pl_module).results())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the record of a run that diverges."""
        if isinstance(exception, DivergedError):
            self._write(trainer, _recorded(pl_module), {"diverged": True})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the metrics of the test to the record."""
        folder = folder_of(trainer)  # all ranks must evaluate this
        if folder is None or not trainer.is_global_zero:
            return
        path = folder / FILE
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write(path, {**before, **_recorded(pl_module).results()})

    def _write(self, trainer: Trainer, module: Recorded, outcome: Mapping[str, Any]) -> None:
        """Collective."""
        counts, folder = self._counts(), folder_of(trainer)  # all ranks must evaluate this
        if folder is not None and trainer.is_global_zero:
            shown = {name: round(count, 1) if isinstance(count, float) else count for name, count in counts.items()}
            record = {**module.facts(shown), "steps": trainer.global_step, **shown, **outcome}
            write(folder / FILE, record)

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
            self._counted: int(self._before[self._counted]) + int(sum_over_ranks(self._read)),
            "seconds": self._before["seconds"] + seconds,
            "processor_seconds": self._before["processor_seconds"] + processor,
        }


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Replace the record at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")


def _recorded(module: LightningModule) -> Recorded:
    if not isinstance(module, Recorded):
        raise TypeError(f"RunRecord needs a SegmentTask or another Recorded module, got {type(module).__name__}")
    return module
