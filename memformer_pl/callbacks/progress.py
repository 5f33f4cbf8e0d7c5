"""The progress bar of a run, in a line that fits a terminal of 100 columns."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class SegmentProgressBar(RichProgressBar):
    """Shows the epoch, windows of the epoch, time left, windows per second, optimizer steps and what the task logs."""

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """What stands in a line, left of the metrics."""
        del trainer
        return [Stage(), BarColumn(bar_width=12), MofNCompleteColumn(), TimeRemainingColumn(), Speed(), TextColumn("")]

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Optimizer steps and what is logged for the bar, written out; not the version of the logger."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        written = {name: written_short(value) for name, value in metrics.items() if isinstance(value, int | float)}
        return {"step": str(trainer.global_step), **written}


class Stage(ProgressColumn):
    """``Epoch 3`` or ``Validation``, without the number of epochs: mostly there is none, which Lightning writes -2."""

    def render(self, task: Task) -> Text:
        """The text of a line."""
        return Text(f"{task.description.partition('/')[0]:10}")


class Speed(ProgressColumn):
    """Windows per second."""

    def render(self, task: Task) -> Text:
        """The text of a line."""
        return Text(f"{task.speed or 0:.2f}it/s")


def written_short(value: float) -> str:
    """A number as it reads well in a line: whole from a hundred up, else with three decimals."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
