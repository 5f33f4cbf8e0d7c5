"""How far a run is: a bar in a terminal, and lines where the output goes to a file."""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from memformer_pl.data import Rollout


class SegmentProgressBar(RichProgressBar):
    """Show the epoch, rollouts of the epoch, time left, rollouts per second, optimizer steps and what the task logs.

    The line fits a terminal of 100 columns.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """What stands in a line, left of the metrics."""
        del trainer
        return [Stage(), BarColumn(bar_width=12), MofNCompleteColumn(), TimeRemainingColumn(), Speed(), TextColumn("")]

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Optimizer steps and what is logged for the bar; not the version of the logger."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        written = {name: written_short(value) for name, value in metrics.items() if isinstance(value, int | float)}
        return {"step": str(trainer.global_step), **written}


class ProgressLines(ProgressBar):
    """Print a line every ``seconds``, for a log that is read later: step, bits per byte, tokens per second, time left.

    The command line uses it in place of the bar where standard output is not a terminal.

    Args:
        seconds: Between two lines.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    def __init__(self, *, seconds: float = 30.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._next = self._began = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Print nothing, as Lightning asks for on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = time.monotonic()
        self._next, self._first_step = self._began + self.seconds, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Rollout, batch_idx: int
    ) -> None:
        """Print a line if it is time."""
        if self._due():
            logged = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
            told = [f"{written_short(logged[name])} {name}" for name in ("bits/byte", "tokens/s") if name in logged]
            self._print(trainer, [step_of(trainer), *told, *self._time_left(trainer)])

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Rollout,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print a line if it is time, but not in the sanity check before training."""
        if not trainer.sanity_checking and self._due():
            total = int(sum(trainer.num_val_batches))
            self._print(trainer, [step_of(trainer), f"validation {batch_idx + 1:,} of {total:,}"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what a validation has found."""
        bits = trainer.callback_metrics.get("validation/bits_per_byte", trainer.callback_metrics.get("validation/loss"))
        if bits is not None and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            unit = "bits/byte" if "validation/bits_per_byte" in trainer.callback_metrics else "nats/token"
            self._print(trainer, [step_of(trainer), f"validation {written_short(float(bits))} {unit}"])

    def _due(self) -> bool:
        now = time.monotonic()
        if not self._enabled or now < self._next:
            return False
        self._next = now + self.seconds
        return True

    def _print(self, trainer: Trainer, parts: list[str]) -> None:
        if self._enabled and trainer.is_global_zero:
            print("  ".join(parts), flush=True)

    def _time_left(self, trainer: Trainer) -> list[str]:
        """The time left if the steps that are left take as long as those of this process, where the run has an end."""
        done, left = trainer.global_step - self._first_step, trainer.max_steps - trainer.global_step
        if trainer.max_steps < 0 or not done:
            return []
        seconds = round((time.monotonic() - self._began) / done * max(left, 0))
        return [f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"]


class Stage(ProgressColumn):
    """``Epoch 3`` or ``Validation``, without the number of epochs: mostly there is none, which Lightning writes -2."""

    def render(self, task: Task) -> Text:
        """The text of a line."""
        return Text(f"{task.description.partition('/')[0]:10}")


class Speed(ProgressColumn):
    """Rollouts per second."""

    def render(self, task: Task) -> Text:
        """The text of a line."""
        return Text(f"{task.speed or 0:.2f}it/s")


def step_of(trainer: Trainer) -> str:
    """``step 120 of 300``."""
    total = f" of {trainer.max_steps:,}" if trainer.max_steps >= 0 else ""
    return f"step {trainer.global_step:,}{total}"


def written_short(value: float) -> str:
    """A number as it reads well in a line: whole from a hundred up, else with three decimals."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
