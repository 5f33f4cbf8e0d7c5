"""The command line: ``python -m memformer_pl fit | validate | test --config ...``.

Exit codes: 2 for a configuration that cannot be, 1 for data or a checkpoint that cannot be used. What a user can mend
is told in a line or two; anything else keeps its traceback.
"""

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import memformer_pl.models  # noqa: F401 - so that class_path may name what is in it
from memformer_pl import checkpoints
from memformer_pl.callbacks import SegmentProgressBar
from memformer_pl.data.module import SegmentData
from memformer_pl.metrics import figures
from memformer_pl.mistakes import HERE, mendable, package_of
from memformer_pl.parser import Parser, brief
from memformer_pl.sizes import require_sizes
from memformer_pl.task import SegmentTask, check_trainer

SHARED = ("vocab", "segment_length")
"""What the model takes from the data."""


class SaveConfig(SaveConfigCallback):
    """Writes the configuration beside the logs once a run begins: one that is refused overwrites no other's."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Too early: Lightning has still to look at what it was given."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it."""
        super().setup(trainer, pl_module, stage="fit")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, unless the trainer is only trying out whether validation works."""
        if not trainer.sanity_checking:
            super().setup(trainer, pl_module, stage="validate")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it."""
        super().setup(trainer, pl_module, stage="test")


class CLI(LightningCLI):
    """Lightning's command line for one task and one kind of data; the model is chosen by ``class_path``."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        exact: dict[str, Any] = {"allow_abbrev": False}
        super().__init__(
            SegmentTask,
            SegmentData,
            args=list(args) if args is not None else None,
            parser_class=Parser,
            parser_kwargs={
                **exact,
                **dict.fromkeys(self.subcommands(), exact),
                "prog": "python -m memformer_pl",
                "description": "Train and evaluate models that read long documents segment by segment.",
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """What can be asked for, and the arguments of the trainer that are not options."""
        skipped = {"model", "dataloaders", "datamodule"}
        fitting = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        return {"fit": fitting, "validate": skipped, "test": skipped}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Say once what the data and the model must agree on."""
        for name in SHARED:
            parser.link_arguments(f"data.{name}", f"model.model.init_args.{name}", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Refuse a trainer that would go wrong, before Lightning replaces it by one that would not."""
        trainer = self._chosen("trainer")
        if not isinstance(trainer, Namespace):
            self.parser.error(f"trainer: expected options, got {trainer!r}")
        task = self._chosen("model")
        sizes = {**vars(task), **vars(task.model.init_args)}
        try:
            check_trainer(strategy=_name(trainer["strategy"]), precision=_precision(trainer["precision"]))
            require_sizes(least=0, **{name: size for name, size in sizes.items() if isinstance(size, int)})
        except ValueError as mistake:
            self.parser.error(str(mistake))
        for name in ("val_check_interval", "check_val_every_n_epoch"):
            if isinstance(trainer[name], int) and trainer[name] < 1:
                self.parser.error(f"trainer.{name} must be at least 1, got {trainer[name]}")
        callbacks = trainer["callbacks"] or []
        named = [_name(callback) for callback in (callbacks if isinstance(callbacks, list) else [callbacks])]
        if trainer["enable_progress_bar"] is not False and not any(name.endswith("ProgressBar") for name in named):
            self.trainer_defaults = {"callbacks": [SegmentProgressBar()]}

    def instantiate_classes(self) -> None:
        """Build everything; what a constructor refuses is a mistake in the configuration."""
        try:
            super().instantiate_classes()
        except Exception as error:
            mistake = mendable(error)
            if mistake is None or isinstance(mistake, OSError):
                raise
            self.parser.error(str(mistake))

    def after_instantiate_classes(self) -> None:
        """Refuse what does not fit together, before the corpus is packed."""
        model, data = self.model.model, self.datamodule
        given = self._chosen("model").model.init_args
        for name in SHARED:
            default = inspect.signature(type(model)).parameters[name].default
            if given[name] not in (None, default, getattr(data, name)):
                self.parser.error(
                    f"model.model.init_args.{name} is {given[name]}, but the data has {getattr(data, name)}: "
                    "leave it out, the model takes it from the data"
                )
        processes = self.trainer.num_devices * self.trainer.num_nodes
        for name in ("lanes", "evaluation_lanes"):
            if getattr(data, name) % processes:
                self.parser.error(f"data.{name} is {getattr(data, name)}, not a multiple of the {processes} processes")
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            self._check_monitor(getattr(callback, "monitor", None))
        path = self._chosen("ckpt_path")
        if path and not re.fullmatch(r"best|last|hpc|registry.*|\w+://.*", path):
            checkpoints.check(checkpoints.read(path), model)

    def _check_monitor(self, name: str | None) -> None:
        """Refuse to watch a figure that no run has, before hours of training are lost to it."""
        some = torch.ones(3, 1, dtype=torch.float64)
        known = [f"validation/{figure}" for figure in figures(some, some[0])]
        if name is not None and not name.startswith("train/") and name not in known:
            self.parser.error(f"there is no figure {name!r} to monitor: choose one of {', '.join(known)} or train/...")

    def _chosen(self, name: str) -> Any:
        return self.config[self.config["subcommand"]][name]

    def _parse_ckpt_path(self) -> None:
        """Unlike Lightning's, let nothing in a checkpoint override the configuration."""


def _name(chosen: Any) -> str:
    """The short name of a strategy or callback, however it was given."""
    return chosen if isinstance(chosen, str) else str(chosen["class_path"]).rpartition(".")[2]


def _precision(given: object) -> str:
    aliases = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    return aliases.get(str(given), str(given))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: By default those of the process.

    Raises:
        SystemExit: With 2 for a mistake in the configuration, with 1 for data or a checkpoint that cannot be used.
    """
    _silence()
    try:
        CLI(args)
    except Exception as error:
        mistake = mendable(error)
        if mistake is None:
            raise
        sys.stderr.write(f"error: {brief(str(mistake))}\n")
        sys.exit(1 if isinstance(mistake, OSError) or package_of(mistake) == HERE else 2)


def _silence() -> None:
    """Leave out what the reader of a terminal cannot act on."""
    # lightning 2.6 asks torch 2.13 in a way that torch will drop
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    # lightning 2.6 doubts that a checkpoint is to hold the weights after the step; it is
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization", UserWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)


def _no_advertisement(record: logging.LogRecord) -> bool:
    """False for the packages that Lightning recommends at every start."""
    return "Tip:" not in record.getMessage()
