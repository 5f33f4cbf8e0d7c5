"""One checkpoint, replaced as training proceeds, from which a run that is killed, stopped or requeued resumes."""

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

from memformer_pl.training.distributed import max_over_ranks


class LastCheckpoint(ModelCheckpoint):
    """Keep one checkpoint, ``last.ckpt``, from which a run resumes bit for bit.

    It is written after the first rollout, then at intervals, and at the end; and after a signal, as soon as the current
    rollout or validation ends. SIGTERM and SIGINT then end the process with code 128 + signal; a second Ctrl-C ends it
    at once. The signal that announces the time limit of a SLURM job (``#SBATCH --signal=USR1@90``) also requeues the
    job.

    It is not written where a resumed run would skip something: just before a validation, or between the last step and
    the reports. A signal at such a moment leaves the previous checkpoint, and costs only time.

    ``trainer.fit(..., ckpt_path="last")`` resumes from it. A run that would replace the checkpoint of another run
    without resuming it is refused (``training/run_folder.py``). For further checkpoints, add a ``ModelCheckpoint``,
    with ``enable_version_counter=False`` so that a resumed run replaces the files of the killed one.

    Args:
        seconds: Time between two writes.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    def __init__(self, *, seconds: float = 60.0) -> None:
        super().__init__(save_last=True, save_top_k=0, enable_version_counter=False)
        self.seconds = seconds
        self._next_at = 0.0
        self._pending: dict[str, Any] = {}
        self._requeue_at: int | None = None
        self._signal = self._stop = 0
        self._signalled = 0.0
        self._training = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move this callback to the end, so that the checkpoint holds the latest state of all others."""
        super().setup(trainer, pl_module, stage)
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]  # set outside of its class

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals."""
        self._handle_signals(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals; from now on there is something to save."""
        self._handle_signals(trainer)
        self._next_at, self._training = 0.0, True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on there is something to save."""
        self._training = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        """Take a checkpoint if it is time."""
        self._take(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the checkpoint that was taken after the previous rollout, whose metrics are logged by now."""
        self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take and write a checkpoint if it is time, instead of one that was taken before the validation."""
        if self._training:
            self._take(trainer)
            self._write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint that was taken: if only reports are left, no later rollout would do so."""
        self._write(trainer)
        self._training = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the final state."""
        self._pending = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to resume, if a signal stopped the run."""
        if self._stop and isinstance(exception, SystemExit):
            name = signal.Signals(self._stop).name
            rank_zero_info(f"Stopped by {name}. The same command with `--ckpt_path last` resumes from here.")

    def state_dict(self) -> dict[str, Any]:
        """Empty: the name of the only file is fixed."""
        return {}

    def _handle_signals(self, trainer: Trainer) -> None:
        """Replace Lightning's handlers, which save at once, in the middle of a rollout."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._signal = self._stop = 0
        self._requeue_at = requeue_signal(trainer)
        numbers = [signal.SIGTERM, signal.SIGINT, *([self._requeue_at] if self._requeue_at else [])]
        for number in numbers:
            signal.signal(number, lambda number, frame: self._receive(trainer, number, frame))

    def _receive(self, trainer: Trainer, number: int, frame: FrameType | None) -> None:
        since, self._signalled = time.monotonic() - self._signalled, time.monotonic()
        if not self._training:
            self._exit(trainer, number)
        # torchrun forwards a Ctrl-C that its processes already got from the terminal
        if self._signal == number == signal.SIGINT and since > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = self._signal or number
        if trainer.is_global_zero:  # print may be running in the interrupted code
            os.write(2, b"\nStopping at the end of this rollout or validation; a second Ctrl-C stops at once.\n")

    def _take(self, trainer: Trainer) -> None:
        """Take a checkpoint if it is time, or if any rank has received a signal."""
        due = trainer.is_global_zero and time.monotonic() >= self._next_at
        self._stop, asked = max_over_ranks((self._signal, due or self._signal), trainer.strategy.root_device)
        if asked and not 0 < trainer.max_steps <= trainer.global_step:
            self._pending = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)

    def _write(self, trainer: Trainer) -> None:
        """Write the checkpoint that was taken, then exit if a signal asked for it."""
        if self._pending and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
            trainer.strategy.save_checkpoint(self._pending, path)
            self._next_at = time.monotonic() + self.seconds
        self._pending = {}
        if self._stop:
            trainer.strategy.barrier()
            self._exit(trainer, self._stop)

    def _exit(self, trainer: Trainer, number: int) -> None:
        """End the process. Only the first rank returns a non-zero code: the launcher would kill it if another did."""
        self._stop = number
        if trainer.is_global_zero and number == self._requeue_at and not requeue():
            rank_zero_info("SLURM did not requeue this job: submit it again.")
        if trainer.strategy.launcher is not None and not self._training:
            trainer.strategy.launcher.kill(number)
        raise SystemExit(128 + number if trainer.is_global_zero else 0)


def requeue_signal(trainer: Trainer) -> int | None:
    """The signal by which SLURM announces the time limit; None outside SLURM, or if requeueing is off."""
    slurm = trainer._accelerator_connector.cluster_environment
    return slurm.requeue_signal if isinstance(slurm, SLURMEnvironment) and slurm.auto_requeue else None


def requeue() -> bool:
    """Ask SLURM to requeue this job; return False if it does not."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        return subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0
    except OSError:
        return False


def find_last(trainer: Trainer) -> str | None:
    """The checkpoint from which a run resumes: that of ``LastCheckpoint``, else the newest ``last`` of others."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    callbacks.sort(key=lambda callback: not isinstance(callback, LastCheckpoint))
    for callback in callbacks:
        if found := callback._find_last_checkpoints(trainer):
            return max(found, key=lambda path: get_filesystem(path).modified(path))
    return None
