"""The commands ``python -m memformer_pl.electra fit | validate --config ...``."""

from collections.abc import Sequence
from typing import Any

import lightning
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from memformer_pl.cli.lightning_cli import SaveConfig, silence
from memformer_pl.cli.parser import Parser, building
from memformer_pl.cli.user_errors import refuse
from memformer_pl.electra.data import ElectraData
from memformer_pl.electra.task import ElectraTask
from memformer_pl.errors import OptionError, UsageError

SHARED = ("vocab_size", "length", "batch_size", "seed")
"""Options that the task takes from the data."""


class CLI(LightningCLI):
    """Lightning's command line for :class:`ElectraTask` and :class:`ElectraData`."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        exact: dict[str, Any] = {"allow_abbrev": False}
        super().__init__(
            ElectraTask,
            ElectraData,
            trainer_class=lightning.Trainer,
            args=list(args) if args is not None else None,
            parser_class=Parser,
            parser_kwargs={
                **exact,
                **dict.fromkeys(self.subcommands(), exact),
                "prog": "python -m memformer_pl.electra",
                "description": "Train ELECTRA with a buffer of corrupted examples.",
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
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

    def instantiate_classes(self) -> None:
        """Build task, data and trainer; report a :class:`UsageError` of any constructor as a wrong configuration."""
        with building(self.parser) as builder:
            self.config_init = self.parser.instantiate(self.config, instantiators=[(builder, object, True)])
            self.datamodule, self.model = (self._get(self.config_init, name) for name in ("data", "model"))
            self.trainer = self.instantiate_trainer()

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's lets a checkpoint override the configuration."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: By default those of the process.

    Raises:
        SystemExit: With 2 for an invalid configuration; with 1 for unusable data or a run that has diverged.
    """
    silence()
    try:
        CLI(args)
    except UsageError as error:
        refuse(error, code=2 if isinstance(error, OptionError) else 1)
