"""Summary of a model: parameters of its parts, size of its state."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from rich.console import Console
from rich.table import Table

from memformer_pl.contract import state_bytes
from memformer_pl.training.task import SegmentTask


class SegmentModelSummary(ModelSummary):
    """Print the parts of the model with their parameters, and the state of a lane in KiB.

    Lightning's summary would show zero FLOPs: it counts them on an example input, which a segment model does not have.
    They are not counted here either: that takes a forward pass without fused kernels, which long segments have no room
    for. ``RunRecord`` counts them at the end of a run.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary."""
        if not (trainer.is_global_zero and isinstance(pl_module, SegmentTask)):
            return
        model = pl_module.model
        table = Table("part", "type", "parameters", title=type(model).__name__, title_justify="left")
        table.columns[2].justify = "right"
        for name, part in model.named_children():
            if size := sum(parameter.numel() for parameter in part.parameters()):
                table.add_row(name, type(part).__name__, f"{size:,}")
        if direct := sum(parameter.numel() for parameter in model.parameters(recurse=False)):
            table.add_row("(direct)", "Parameter", f"{direct:,}")
        parameters = list(model.parameters())
        total, frozen = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if not p.requires_grad)
        with trainer.precision_plugin.forward_context():
            state_size = state_bytes(model.initial_state(1))
        Console().print(table)
        print(
            f"{total:,} parameters{f', {frozen:,} of them frozen' if frozen else ''}; a lane carries "
            f"{state_size / 1024:.1f} KiB{', and rows that its document adds' if model.growing else ''}",
            flush=True,
        )
