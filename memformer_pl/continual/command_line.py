"""The command line ``python -m memformer_pl.continual fit | test --config ...``."""

import warnings
from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from memformer_pl.cli.configured import ConfiguredCLI, run
from memformer_pl.cli.parser import Parser
from memformer_pl.continual.backbones import Backbone
from memformer_pl.continual.images import LabelledImages
from memformer_pl.continual.sequence import TaskSequence
from memformer_pl.continual.task import ContinualTask
from memformer_pl.errors import option_error
from memformer_pl.training.trainer_checks import check_trainer_arguments


class ContinualParser(Parser):
    """Knows what a configuration of this command chooses."""

    chosen = (Backbone, LabelledImages)


class CLI(ConfiguredCLI):
    """Lightning's command line for :class:`ContinualTask` and :class:`TaskSequence`."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            ContinualTask,
            TaskSequence,
            program="python -m memformer_pl.continual",
            description="Learn classes task by task, under a budget in bytes.",
            parser=ContinualParser,
            args=args,
            trainer_defaults={"max_epochs": 1},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Commands, and for each the arguments of the trainer's method that are not options."""
        fitting = {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}
        return {"fit": fitting, "test": {"model", "dataloaders", "datamodule", "weights_only"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Pass the channels of images from the data to the backbone."""
        parser.link_arguments("data.channels", "model.backbone.init_args.channels", apply_on="instantiate")

    def after_instantiate_classes(self) -> None:
        """Refuse an unsupported trainer and a checkpoint that does not fit, before images are read."""
        with option_error():
            check_trainer_arguments(self.trainer)
            self.model.check_trainer(self.trainer)
        self.find_checkpoint()


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: By default those of the process.

    Raises:
        SystemExit: With 2 for an invalid configuration; with 1 for unusable data, an unusable checkpoint, or a run that
            has diverged.
    """
    # of a run that resumes: parts of earlier tasks are frozen, as they should be
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode", UserWarning)
    run(lambda: CLI(args))
