"""The commands with a configuration: ``python -m memformer_pl fit | validate | test | analyze --config ...``.

Exit codes: 2 for an invalid configuration; 1 for unusable data, an unusable checkpoint and a run that has diverged. A
user's mistake (``errors.py``) is printed in a line or two; every other exception keeps its traceback.
"""

import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning
import torch
from jsonargparse import Namespace
from lightning import Callback, LightningModule
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

import memformer_pl.acting.corpus  # like the next line, lets class_path name classes without a module
import memformer_pl.models  # noqa: F401
from memformer_pl.callbacks import LastCheckpoint, ProgressLines, SegmentModelSummary, SegmentProgressBar
from memformer_pl.callbacks.last_checkpoint import find_last
from memformer_pl.checkpoints import format as checkpoints
from memformer_pl.cli.parser import LIBRARY_USAGE_ERRORS, Builder, Parser
from memformer_pl.cli.trainer import Trainer
from memformer_pl.cli.user_errors import refuse
from memformer_pl.data.datamodule import SegmentData
from memformer_pl.errors import (
    LARGEST,
    NonFiniteError,
    OptionError,
    UsageError,
    debugging,
    option_error,
    require_sizes,
    usage_error,
)
from memformer_pl.training.metrics import compute_metrics
from memformer_pl.training.run_folder import check_folder
from memformer_pl.training.task import SegmentTask
from memformer_pl.training.trainer_checks import check_trainer, check_trainer_arguments

SHARED = ("vocab_size", "segment_length")
"""Options that the model takes from the data."""


class SaveConfig(SaveConfigCallback):
    """Write the configuration beside the logs once a run has begun: a refused run overwrites nothing."""

    logs = ()

    def setup(self, trainer: lightning.Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing: Lightning has not checked its arguments yet."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Write ``config.yaml``."""
        self._save(trainer, pl_module, "fit")

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Write ``config_validate.yaml``, unless this is the sanity check before training."""
        if not trainer.sanity_checking:
            self._save(trainer, pl_module, "validate")

    def on_test_start(self, trainer: lightning.Trainer, pl_module: LightningModule) -> None:
        """Write ``config_test.yaml``."""
        self._save(trainer, pl_module, "test")

    def _save(self, trainer: lightning.Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the configuration under a name of its command, since several commands may share a run's folder."""
        if not trainer.loggers:  # the run has no folder of its own
            return
        self.config_filename = "config.yaml" if stage == "fit" else f"config_{stage}.yaml"
        with usage_error(OSError, about=f"cannot write {self.config_filename}"):
            super().setup(trainer, pl_module, stage)


class CLI(LightningCLI):
    """Lightning's command line for :class:`SegmentTask` and :class:`SegmentData`; ``class_path`` chooses the model."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        exact: dict[str, Any] = {"allow_abbrev": False}
        super().__init__(
            SegmentTask,
            SegmentData,
            trainer_class=Trainer,
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
        """Commands, and for each the arguments of the trainer's method that are not options."""
        skipped = {"model", "dataloaders", "datamodule", "weights_only"}
        fitting = {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}
        return {"fit": fitting, "validate": skipped, "test": skipped, "analyze": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Pass the options that data and model share from the data to the model."""
        for name in SHARED:
            parser.link_arguments(f"data.{name}", f"model.model.init_args.{name}", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Refuse an unsupported trainer before Lightning builds it, or replaces it by a supported one."""
        trainer = self._chosen("trainer")
        if not isinstance(trainer, Namespace):
            self.parser.error(f"trainer: expected options, got {trainer!r}")
        with option_error():
            check_trainer(strategy=_strategy(trainer["strategy"]), precision=_precision(trainer["precision"]))
            # Lightning lists devices one by one: a billion of them would take forever
            counts = {f"trainer.{name}": _count(trainer[name]) for name in ("devices", "num_nodes")}
            require_sizes(least=-1, most=LARGEST, **counts)
        for name in ("val_check_interval", "check_val_every_n_epoch"):
            if isinstance(trainer[name], int) and trainer[name] < 1:
                self.parser.error(f"trainer.{name} must be at least 1, got {trainer[name]}")

    def instantiate_classes(self) -> None:
        """Build task, data and trainer; report a :class:`UsageError` of any constructor as a wrong configuration."""
        builder = Builder()
        try:
            self.config_init = self.parser.instantiate(self.config, instantiators=[(builder, object, True)])
            self.datamodule, self.model = (self._get(self.config_init, name) for name in ("data", "model"))
            self.trainer = self.instantiate_trainer()
        except Exception as error:
            mistake = builder.raised or error
            if debugging() or not isinstance(mistake, UsageError):
                raise mistake from mistake.__cause__
            self.parser.error(str(mistake))

    def instantiate_trainer(self, **options: Any) -> lightning.Trainer:
        """Build the trainer; add a model summary, a progress bar and a last checkpoint unless the options forbid them.

        Lines of progress replace the bar if standard output is not a terminal.
        """
        given = self._get(self.config_init, "trainer")
        callbacks = given["callbacks"] or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        progress = SegmentProgressBar if sys.stdout.isatty() else ProgressLines
        for option, kind, default in (
            ("enable_model_summary", ModelSummary, SegmentModelSummary),
            ("enable_progress_bar", ProgressBar, progress),
            ("enable_checkpointing", LastCheckpoint, LastCheckpoint),
        ):
            if given[option] is not False and not given["barebones"] and not _has(callbacks, kind):
                callbacks.append(default())
        # Everything in the configuration is built by now: Lightning's own constructor raises these for its options.
        with usage_error(*LIBRARY_USAGE_ERRORS, ValueError, TypeError, about="trainer"):
            trainer: lightning.Trainer = super().instantiate_trainer(**{**options, "callbacks": callbacks})
        return trainer

    def after_instantiate_classes(self) -> None:
        """Refuse options that contradict each other, before the corpus is packed."""
        model, data = self.model.model, self.datamodule
        given = self._chosen("model").model.init_args
        takes = inspect.signature(type(model)).parameters
        for name in (name for name in SHARED if name in takes):
            default = takes[name].default
            if given[name] not in (None, default, getattr(data, name)):
                self.parser.error(
                    f"model.model.init_args.{name} is {given[name]}, but the data has {getattr(data, name)}: "
                    "leave it out, the model takes it from the data"
                )
        processes = self.trainer.num_devices * self.trainer.num_nodes
        for name in ("batch_size", "evaluation_batch_size"):
            if getattr(data, name) % processes:
                self.parser.error(f"data.{name} is {getattr(data, name)}, not a multiple of the {processes} processes")
        with option_error():
            check_trainer_arguments(self.trainer)
        self._check_monitors(self.trainer.callbacks)  # type: ignore[attr-defined]  # Lightning sets it elsewhere
        self._find_checkpoint()

    def _check_monitors(self, callbacks: Sequence[Callback]) -> None:
        """Refuse to monitor a metric that no run logs: Lightning would only at the first validation.

        The metrics of a callback are known if its class declares them, as prefixes ``logs``, or is one of Lightning's,
        none of which logs a metric that can be monitored. Beside any other callback nothing is refused.
        """
        known = vars(lightning_callbacks).values()
        if not all("logs" in vars(kind) or kind in known for kind in map(type, callbacks)):
            return
        one = torch.ones(3, 1, dtype=torch.float64)
        # Lightning counts steps and epochs itself
        computed = [*compute_metrics(one, one[0], one[0]), *(["return"] if self.model.acting else [])]
        names = [*(f"validation/{name}" for name in computed), "step", "epoch"]
        prefixes = ("train/", *(prefix for callback in callbacks for prefix in getattr(callback, "logs", ())))
        for name in (getattr(callback, "monitor", None) for callback in callbacks):
            if name is not None and name not in names and not name.startswith(prefixes):
                choices = ", ".join([*names, *(f"{prefix}..." for prefix in prefixes)])
                self.parser.error(f"no metric {name!r} is logged that could be monitored: choose one of {choices}")

    def _chosen(self, name: str) -> Any:
        return self.config[self.config["subcommand"]][name]

    def _find_checkpoint(self) -> None:
        """Replace ``last`` by the path of a checkpoint, and refuse one that does not fit.

        A job that SLURM has requeued continues from its last checkpoint without that word.
        """
        command, path = self.config["subcommand"], self._chosen("ckpt_path")
        requeued = command == "fit" and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        if path == "last" or (requeued and not path):
            path = self.config_init[command]["ckpt_path"] = find_last(self.trainer)
            folder = str(self.trainer.log_dir)
            if path is None and command != "fit":
                raise UsageError(f"ckpt_path is last, but there is no last checkpoint in {folder!r}")
            if path is None and not _names_folder(self._chosen("trainer")["logger"]):
                self.parser.error(
                    "ckpt_path is last, but every start of this run logs to a new folder: name the folder with "
                    "--trainer.logger.init_args.version"
                )
            if path is None:
                rank_zero_info(f"There is no checkpoint in {folder!r} yet: starting from the beginning.")
        if path is None and command in ("validate", "test"):
            rank_zero_warn(f"{command} has no --ckpt_path: the metrics are those of an untrained model")
        self._check_checkpoint(command, path)
        if command == "fit" and not re.fullmatch(r"hpc|registry.*", path or ""):
            # the task checks it too, but by then Lightning has begun to log
            check_folder(self.trainer, resume_from=path)

    def _check_checkpoint(self, command: str, path: str | None) -> None:
        """Refuse a checkpoint that does not exist or does not fit."""
        if path == "":
            self.parser.error("ckpt_path is empty: name a checkpoint, or leave it out")
        if path == "best":
            self.parser.error("ckpt_path is best, which is known only inside the process that trained: name the file")
        if path == "hpc" and not list(Path(self.trainer.default_root_dir).glob("hpc_ckpt_*.ckpt")):
            self.parser.error(f"ckpt_path is hpc, but {self.trainer.default_root_dir!r} has no hpc_ckpt_N.ckpt")
        if path and "://" in path:
            with usage_error(ImportError, ValueError, OSError, about=f"ckpt_path {path!r}"):
                get_filesystem(path)  # raises if the scheme is unknown or its package is not installed
        elif path and not re.fullmatch(r"hpc|registry.*", path):
            checkpoints.check_file(path, self.model.model, resume=command == "fit")

    def _set_seed(self) -> None:
        """Seed all random numbers; report a seed out of range as a wrong option."""
        with option_error(), usage_error(ValueError, about="seed_everything"):
            super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning's lets a checkpoint override the configuration."""


def _strategy(given: Any) -> str | type:
    """The name or the class of a strategy; ``auto`` for a function, whose result is checked once it is built."""
    strategy = given if isinstance(given, str) else resolve_name(given["class_path"])
    return strategy if isinstance(strategy, str | type) else "auto"


def _has(callbacks: list[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def _names_folder(logger: Any) -> bool:
    """Whether every start of a run logs to the same folder; otherwise each takes a new version number."""
    first = logger[0] if isinstance(logger, list) and logger else logger
    return first is False or (isinstance(first, Namespace) and first["init_args"].get("version") is not None)


def _count(given: object) -> int:
    """The number of devices or nodes; 1 for a list of devices, or if Lightning chooses."""
    return int(given) if isinstance(given, int | str) and re.fullmatch(r"-?\d+", str(given)) else 1


def _precision(given: object) -> str:
    aliases = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    return aliases.get(str(given), str(given))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: By default those of the process.

    Raises:
        SystemExit: With 2 for an invalid configuration; with 1 for unusable data, an unusable checkpoint, or a run that
            has diverged.
    """
    _silence()
    try:
        CLI(args)
    except NonFiniteError as error:
        # all ranks raise it; only the first reports it
        if rank_zero_only.rank:  # type: ignore[attr-defined]
            sys.exit(1)
        refuse(error, code=1)
    except UsageError as error:
        refuse(error, code=2 if isinstance(error, OptionError) else 1)


def _silence() -> None:
    """Silence warnings of libraries that a user cannot act on."""
    # lightning 2.6 uses an API that torch 2.13 deprecates
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    # lightning 2.6 warns that a checkpoint holds the weights after the step; it should
    warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization", UserWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """False for what Lightning says at every start: recommended packages, and that the summary is ours."""
    message = record.getMessage()
    return "Tip:" not in message and "model summary callbacks" not in message
