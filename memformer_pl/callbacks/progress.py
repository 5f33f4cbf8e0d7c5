"""Progress of a run: a bar in a terminal, and lines where the output goes to a file."""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from memformer_pl.training.task import SegmentTask


class SegmentProgressBar(RichProgressBar):
    """Show the epoch, its rollouts, the time left, rollouts per second, optimizer steps and the metrics of the task.

    Where the peak of the device is known, MFU stands in place of the rollouts per second: the line fits a terminal of
    100 columns.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """The columns left of the metrics."""
        task = trainer.lightning_module
        measured = isinstance(task, SegmentTask) and task.peak() is not None
        first = [Stage(), BarColumn(bar_width=8 if measured else 12), MofNCompleteColumn(), TimeRemainingColumn()]
        return [*first, *([] if measured else [Speed()]), TextColumn("")]

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Optimizer steps and the metrics logged for the bar, without the version of the logger."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        shown = {name: short_number(value) for name, value in metrics.items() if isinstance(value, int | float)}
        if "MFU" in shown:
            shown["MFU"] = f"{metrics['MFU']:.0%}"
        return {"step": str(trainer.global_step), **shown}


class ProgressLines(ProgressBar):
    """Print a line every ``seconds``: step, bits per byte, tokens per second, time left; and one at each validation.

    MFU stands beside the speed where the peak of the device is known. The figures may be those of the rollout before
    (``training/figures.py``). The command line uses it in place of the bar if standard output is not a terminal.

    Args:
        seconds: Time between two lines.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    def __init__(self, *, seconds: float = 30.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._next_at = self._started_at = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Stop printing; Lightning calls this on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started_at = time.monotonic()
        self._next_at, self._first_step = self._started_at + self.seconds, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if it is time."""
        if self._due():
            logged = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
            shown = [
                f"{short_number(logged[name])} {name}" for name in ("return", "bits/byte", "tokens/s") if name in logged
            ]
            shown += [f"{logged['MFU']:.1%} MFU"] if "MFU" in logged else []
            self._print(trainer, [step_of(trainer), *shown, *self._time_left(trainer)])

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line if it is time, but not in the sanity check before training."""
        if not trainer.sanity_checking and self._due():
            total = int(sum(trainer.num_val_batches))
            self._print(trainer, [step_of(trainer), f"validation {batch_idx + 1:,} of {total:,}"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the result of a validation."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        for name, unit in (("return", "return"), ("bits_per_byte", "bits/byte"), ("loss", "nats/token")):
            if (value := trainer.callback_metrics.get(f"validation/{name}")) is not None:
                self._print(trainer, [step_of(trainer), f"validation {short_number(float(value))} {unit}"])
                return

    def _due(self) -> bool:
        now = time.monotonic()
        if not self._enabled or now < self._next_at:
            return False
        self._next_at = now + self.seconds
        return True

    def _print(self, trainer: Trainer, parts: list[str]) -> None:
        if self._enabled and trainer.is_global_zero:
            print("  ".join(parts), flush=True)

    def _time_left(self, trainer: Trainer) -> list[str]:
        """The time left at the speed so far of this process; empty if the run has no last step."""
        done, left = trainer.global_step - self._first_step, trainer.max_steps - trainer.global_step
        if trainer.max_steps < 0 or not done:
            return []
        seconds = round((time.monotonic() - self._started_at) / done * max(left, 0))
        return [f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"]


class Stage(ProgressColumn):
    """``Epoch 3`` or ``Validation``, without the total of epochs, which Lightning shows as -2 if there is none."""

    def render(self, task: Task) -> Text:
        """The text of the column."""
        return Text(f"{task.description.partition('/')[0]:10}")


class Speed(ProgressColumn):
    """Rollouts per second."""

    def render(self, task: Task) -> Text:
        """The text of the column."""
        return Text(f"{task.speed or 0:.2f}it/s")


def step_of(trainer: Trainer) -> str:
    """``step 120 of 300``."""
    total = f" of {trainer.max_steps:,}" if trainer.max_steps >= 0 else ""
    return f"step {trainer.global_step:,}{total}"


def short_number(value: float) -> str:
    """A number without decimals from 100 up, else with three."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
