"""The commands with a configuration: ``python -m memformer_pl fit | validate | test | analyze --config ...``."""

import inspect
from collections.abc import Sequence

import torch
from lightning import Callback
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.cli import LightningArgumentParser

import memformer_pl.acting.corpus  # like the next line, lets class_path name classes without a module
import memformer_pl.models  # noqa: F401
from memformer_pl.acting.policy_gradient import acts
from memformer_pl.callbacks import SegmentModelSummary
from memformer_pl.checkpoints import format as checkpoints
from memformer_pl.cli.configured import ConfiguredCLI, run
from memformer_pl.cli.trainer import Trainer
from memformer_pl.data.datamodule import SegmentData
from memformer_pl.errors import option_error
from memformer_pl.training.metrics import compute_metrics
from memformer_pl.training.task import SegmentTask
from memformer_pl.training.trainer_checks import check_trainer_arguments

SHARED = ("vocab_size", "segment_length")
"""Options that the model takes from the data."""


class CLI(ConfiguredCLI):
    """Lightning's command line for :class:`SegmentTask` and :class:`SegmentData`; ``class_path`` chooses the model."""

    summary = SegmentModelSummary

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            SegmentTask,
            SegmentData,
            program="python -m memformer_pl",
            description="Train and evaluate models that read long documents segment by segment.",
            trainer=Trainer,
            args=args,
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
        self.find_checkpoint()

    def check_file(self, path: str, *, resume: bool) -> None:
        """Check that a file is a checkpoint of this model; if training is to resume, that it holds more than weights.

        Raises:
            UsageError: Says what is wrong with the file, or which value differs.
        """
        checkpoints.check_file(path, self.model.model, resume=resume)

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
        computed = [*compute_metrics(one, one[0], one[0], drawn=acts(self.model.acting))]
        computed += ["return"] if self.model.acting else []
        names = [*(f"validation/{name}" for name in computed), "step", "epoch"]
        prefixes = ("train/", *(prefix for callback in callbacks for prefix in getattr(callback, "logs", ())))
        for name in (getattr(callback, "monitor", None) for callback in callbacks):
            if name is not None and name not in names and not name.startswith(prefixes):
                choices = ", ".join([*names, *(f"{prefix}..." for prefix in prefixes)])
                self.parser.error(f"no metric {name!r} is logged that could be monitored: choose one of {choices}")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: By default those of the process.

    Raises:
        SystemExit: With 2 for an invalid configuration; with 1 for unusable data, an unusable checkpoint, or a run that
            has diverged.
    """
    run(lambda: CLI(args))
