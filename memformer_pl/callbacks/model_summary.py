"""What a run trains: parameters by part, what a lane carries, and what a token costs."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from rich.console import Console
from rich.table import Table

from memformer_pl.contract import state_bytes
from memformer_pl.training.flops import count_flops
from memformer_pl.training.task import SegmentTask


class SegmentModelSummary(ModelSummary):
    """Print the parts of the model with their parameters, the bytes that a lane carries, and the FLOPs of a token.

    Lightning's own counts FLOPs from an example input, which a segment model does not have, and shows zeros.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it."""
        if not (trainer.is_global_zero and isinstance(pl_module, SegmentTask)):
            return
        model = pl_module.model
        table = Table("part", "type", "parameters", title=type(model).__name__, title_justify="left")
        table.columns[2].justify = "right"
        for name, part in model.named_children():
            table.add_row(name, type(part).__name__, f"{sum(p.numel() for p in part.parameters()):,}")
        if own := sum(parameter.numel() for parameter in model.parameters(recurse=False)):
            table.add_row("its own", "", f"{own:,}")
        parameters = list(model.parameters())
        total, frozen = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if not p.requires_grad)
        with trainer.precision_plugin.forward_context():
            carried = state_bytes(model.initial_state(1))
            flops = count_flops(model) / model.segment_length
        Console().print(table)
        print(
            f"{total:,} parameters{f', {frozen:,} of them frozen' if frozen else ''}; a lane carries "
            f"{carried / 1024:.1f} KiB; a token takes {flops / 1e6:.2f} MFLOP forward",
            flush=True,
        )
