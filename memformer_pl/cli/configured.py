"""What commands with a configuration share: how options become a run, and how a user's mistake is reported.

Exit codes: 2 for an invalid configuration; 1 for unusable data, an unusable checkpoint and a run that has diverged. A
user's mistake (``errors.py``) is printed in a line or two; every other exception keeps its traceback.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar

import lightning
from jsonargparse import Namespace
from lightning import Callback, LightningDataModule, LightningModule
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from memformer_pl.callbacks import LastCheckpoint, ProgressLines, SegmentProgressBar
from memformer_pl.callbacks.last_checkpoint import find_last
from memformer_pl.checkpoints import format as checkpoints
from memformer_pl.cli.parser import LIBRARY_USAGE_ERRORS, Builder, Parser
from memformer_pl.cli.user_errors import refuse
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
from memformer_pl.training.run_folder import check_folder
from memformer_pl.training.trainer_checks import check_trainer


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


class ConfiguredCLI(LightningCLI):
    """Lightning's command line with one class of task and one of data.

    Args:
        task: Class of the task; its ``check`` refuses the content of a foreign checkpoint, unless :meth:`check_file` is
            overridden.
        data: Class of the data module.
        program: How the program is started.
        description: What it does.
        trainer: Class of the trainer.
        parser: Class of the parser.
        args: The arguments; by default those of the process.
        trainer_defaults: Options of the trainer that have another default than Lightning's.
    """

    summary: ClassVar[type[ModelSummary]] = ModelSummary
    """The summary of a model that is printed unless the options forbid it."""

    def __init__(
        self,
        task: type[LightningModule],
        data: type[LightningDataModule],
        *,
        program: str,
        description: str,
        trainer: type[lightning.Trainer] = lightning.Trainer,
        parser: type[Parser] = Parser,
        args: Sequence[str] | None = None,
        trainer_defaults: dict[str, Any] | None = None,
    ) -> None:
        exact: dict[str, Any] = {"allow_abbrev": False}
        super().__init__(
            task,
            data,
            trainer_class=trainer,
            trainer_defaults=trainer_defaults,
            args=list(args) if args is not None else None,
            parser_class=parser,
            parser_kwargs={
                **exact,
                **dict.fromkeys(self.subcommands(), exact),
                "prog": program,
                "description": description,
            },
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
        )

    def check_file(self, path: str, *, resume: bool) -> None:
        """Check that a file is a checkpoint of this task; if training is to resume, that it holds more than weights.

        Raises:
            UsageError: Says what is wrong with the file, or which value differs.
        """
        content = checkpoints.read(path)
        self.model.check(content)
        if resume:
            checkpoints.require_resumable(content, path)

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
            ("enable_model_summary", ModelSummary, self.summary),
            ("enable_progress_bar", ProgressBar, progress),
            ("enable_checkpointing", LastCheckpoint, LastCheckpoint),
        ):
            if given[option] is not False and not given["barebones"] and not _has(callbacks, kind):
                callbacks.append(default())
        # Everything in the configuration is built by now: Lightning's own constructor raises these for its options.
        with usage_error(*LIBRARY_USAGE_ERRORS, ValueError, TypeError, about="trainer"):
            trainer: lightning.Trainer = super().instantiate_trainer(**{**options, "callbacks": callbacks})
        return trainer

    def _chosen(self, name: str) -> Any:
        return self.config[self.config["subcommand"]][name]

    def find_checkpoint(self) -> None:
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
            self.check_file(path, resume=command == "fit")

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


def _count(given: object) -> int:
    """The number of devices or nodes; 1 for a list of devices, or if Lightning chooses."""
    return int(given) if isinstance(given, int | str) and re.fullmatch(r"-?\d+", str(given)) else 1


def _precision(given: object) -> str:
    aliases = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    return aliases.get(str(given), str(given))


def _has(callbacks: list[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def _names_folder(logger: Any) -> bool:
    """Whether every start of a run logs to the same folder; otherwise each takes a new version number."""
    first = logger[0] if isinstance(logger, list) and logger else logger
    return first is False or (isinstance(first, Namespace) and first["init_args"].get("version") is not None)


def run(command_line: Callable[[], object]) -> None:
    """Run a command line.

    Args:
        command_line: Builds it, which runs it.

    Raises:
        SystemExit: With 2 for an invalid configuration; with 1 for unusable data, an unusable checkpoint, or a run that
            has diverged.
    """
    _silence()
    try:
        command_line()
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
