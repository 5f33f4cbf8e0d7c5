"""The commands ``python -m memformer_pl.electra fit | validate --config ...``."""

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from memformer_pl.cli.configured import ConfiguredCLI, run
from memformer_pl.electra.data import ElectraData
from memformer_pl.electra.task import ElectraTask
from memformer_pl.errors import option_error
from memformer_pl.training.trainer_checks import check_trainer_arguments

SHARED = ("vocab_size", "length", "batch_size", "seed")
"""Options that the task takes from the data."""


class CLI(ConfiguredCLI):
    """Lightning's command line for :class:`ElectraTask` and :class:`ElectraData`."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            ElectraTask,
            ElectraData,
            program="python -m memformer_pl.electra",
            description="Train ELECTRA with a buffer of corrupted examples.",
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Commands, and for each the arguments of the trainer's method that are not options."""
        fitting = {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}
        return {"fit": fitting, "validate": {"model", "dataloaders", "datamodule", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Pass the options that data and task share from the data to the task."""
        for name in SHARED:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def after_instantiate_classes(self) -> None:
        """Refuse an unsupported trainer and a checkpoint that does not fit, before documents are read."""
        with option_error():
            check_trainer_arguments(self.trainer)
        self.find_checkpoint()


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: By default those of the process.

    Raises:
        SystemExit: With 2 for an invalid configuration; with 1 for unusable data, an unusable checkpoint, or a run that
            has diverged.
    """
    run(lambda: CLI(args))
