"""A run that is killed, stopped or requeued goes on where it was: one checkpoint, replaced as training goes along."""

import os
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from memformer_pl.data import Rollout
from memformer_pl.training.distributed import max_over_ranks


class LastCheckpoint(ModelCheckpoint):
    """Keep one checkpoint, ``last.ckpt``, from which a run goes on bit for bit.

    It is written after the first rollout, then at intervals, and at the end; and at a signal, as soon as the present
    rollout is read, or the present validation. SIGTERM and SIGINT then end the process with 128 + signal; a second
    Ctrl-C ends it at once. The signal that announces the end of a SLURM job's time (``#SBATCH --signal=USR1@90``) has
    the job requeued, too.

    It is not written where a resumed run would leave out what is due: before a validation, and after the last step,
    before the reports. A signal that comes then finds the one before, and nothing but time is lost.

    ``trainer.fit(..., ckpt_path="last")`` goes on from it. A run that does not, but would replace the checkpoint of
    another run, is refused (``earlier_run.py``). Other checkpoints need a ``ModelCheckpoint`` of their own;
    with ``enable_version_counter=False``, a killed run leaves no file of it that nobody knows of.

    Args:
        seconds: From one write to the next.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    def __init__(self, *, seconds: float = 60.0) -> None:
        super().__init__(save_last=True, save_top_k=0, enable_version_counter=False)
        self.seconds = seconds
        self._next = 0.0
        self._taken: dict[str, Any] = {}
        self._requeue_at: int | None = None
        self._signal = self._stop = 0
        self._signalled = 0.0
        self._reading = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come after all other callbacks: what they have kept is then part of the checkpoint."""
        super().setup(trainer, pl_module, stage)
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]  # set outside of its class

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals; from now on there is something to save."""
        self._listen(trainer)
        self._next, self._reading = 0.0, True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on there is something to save."""
        self._reading = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Rollout, batch_idx: int
    ) -> None:
        """Take a checkpoint if it is time."""
        self._take(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Rollout, batch_idx: int
    ) -> None:
        """Write what was taken after the rollout before, whose figures are logged by now."""
        self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take and write a checkpoint if it is time, in the place of one that was taken before the validation."""
        if self._reading:
            self._take(trainer)
            self._write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was taken. Perhaps only reports are left, and no rollout at whose end a signal would be heeded."""
        self._write(trainer)
        self._reading = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the run ends with."""
        self._taken = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to go on, where a signal was the reason."""
        if self._stop and isinstance(exception, SystemExit):
            name = signal.Signals(self._stop).name
            rank_zero_info(f"Stopped by {name}. The same command goes on from here if it has `--ckpt_path last`.")

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it keeps one file, and knows its name."""
        return {}

    def _listen(self, trainer: Trainer) -> None:
        """Take the place of Lightning's handlers, which save at once, in the middle of a rollout."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._signal = self._stop = 0
        self._requeue_at = requeue_signal(trainer)
        numbers = [signal.SIGTERM, signal.SIGINT, *([self._requeue_at] if self._requeue_at else [])]
        for number in numbers:
            signal.signal(number, lambda number, frame: self._receive(trainer, number, frame))

    def _receive(self, trainer: Trainer, number: int, frame: FrameType | None) -> None:
        since, self._signalled = time.monotonic() - self._signalled, time.monotonic()
        if not self._reading:
            self._leave(trainer, number)
        # torchrun hands on a Ctrl-C that its processes have had from the terminal already
        if self._signal == number == signal.SIGINT and since > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = self._signal or number
        if trainer.is_global_zero:  # not by print, which may be at work
            os.write(2, b"\nStopping at the end of this rollout or validation; a second Ctrl-C stops at once.\n")

    def _take(self, trainer: Trainer) -> None:
        """Take a checkpoint if it is time, or if any rank was told to stop."""
        due = trainer.is_global_zero and time.monotonic() >= self._next
        self._stop, asked = max_over_ranks((self._signal, due or self._signal), trainer.strategy.root_device)
        if asked and not 0 < trainer.max_steps <= trainer.global_step:
            self._taken = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)

    def _write(self, trainer: Trainer) -> None:
        """Write the checkpoint that was taken, after all that was logged before it; then stop, if told to."""
        if self._taken and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
            trainer.strategy.save_checkpoint(self._taken, path)
            self._next = time.monotonic() + self.seconds
        self._taken = {}
        if self._stop:
            trainer.strategy.barrier()
            self._leave(trainer, self._stop)

    def _leave(self, trainer: Trainer, number: int) -> None:
        """End the process. Only the first rank reports a failure: the launcher would kill it if another did."""
        self._stop = number
        if trainer.is_global_zero and number == self._requeue_at and not requeue():
            rank_zero_info("SLURM did not requeue this job: start it again by hand.")
        if trainer.strategy.launcher is not None and not self._reading:
            trainer.strategy.launcher.kill(number)
        raise SystemExit(128 + number if trainer.is_global_zero else 0)


def requeue_signal(trainer: Trainer) -> int | None:
    """The signal by which SLURM announces the end of a job's time; None outside SLURM, or if told not to requeue."""
    slurm = trainer._accelerator_connector.cluster_environment
    return slurm.requeue_signal if isinstance(slurm, SLURMEnvironment) and slurm.auto_requeue else None


def requeue() -> bool:
    """Have SLURM start this job again; False if it does not."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        return subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0
    except OSError:
        return False


def find_last(trainer: Trainer) -> str | None:
    """The checkpoint from which a trainer's run goes on: its ``last.ckpt``, else the newest that others call last."""
    keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    keepers.sort(key=lambda keeper: not isinstance(keeper, LastCheckpoint))
    for keeper in keepers:
        if found := keeper._find_last_checkpoints(trainer):
            return max(found, key=lambda path: get_filesystem(path).modified(path))
    return None
