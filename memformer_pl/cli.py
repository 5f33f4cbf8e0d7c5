"""The command line: ``python -m memformer_pl fit | validate | test --config ...``.

Exit codes: 2 for a configuration that cannot be, 1 for data or a checkpoint that cannot be used and for training that
is no longer finite. What a user can mend is told in a line or two; anything else keeps its traceback.
"""

import inspect
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning import Callback
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

import memformer_pl.models  # noqa: F401 - so that class_path may name what is in it
from memformer_pl import checkpoints
from memformer_pl.callbacks import SegmentProgressBar
from memformer_pl.data import Corpus, Tokenizer
from memformer_pl.data.module import SegmentData
from memformer_pl.recurrence import SegmentModel
from memformer_pl.task import SegmentTask
from memformer_pl.trainers import check_trainer

BY_NAME = (SegmentModel, Corpus, Tokenizer, Callback, Logger)
"""What a configuration chooses by ``class_path``."""
SHARED = ("vocab", "segment_length")
"""What the model takes from the data."""
UNKNOWN = {
    r"unrecognized arguments: --?([\w.]+)": "option",
    r"does not accept option '([\w.]+)'": "option",
    r"Option '([\w.]+)' is not accepted": "option",
    r"Expected a dot import path string: (\S+)": "class",
    r"Problem with given class_path '(\S+)':\s+(?:module .* has no attribute|No module named)": "class",
    r"argument subcommand: invalid choice: '(\S+?)'": "command",
}
"""How the parser reports a name that it does not know, and the name of what."""

NOISE = r'^ *- |Parser key ".+?":?|in "<unicode string>",|Expected a path but .*|(?s:Subclass types expect.*)'
"""What the parser says besides what is wrong."""
HERE = __name__.partition(".")[0]
MISTAKES = (ValueError, TypeError, FloatingPointError, MisconfigurationException)
"""What is raised for a user who can mend it, where this package or Lightning raises it: others mean a bug."""


class Parser(LightningArgumentParser):
    """Reports a mistake in a line or two, with the nearest name that would have been valid."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, and exit with 2."""
        del ex
        sys.stderr.write(f"error: {explain(message, own=self.options(), others=names_of_classes())}\n")
        sys.exit(2)

    def options(self) -> Iterator[str]:
        """The options of this parser and of its commands, and the names of the commands."""
        for action in self._actions:
            yield action.dest
            if isinstance(action.choices, Mapping):
                yield from action.choices
                for parser in action.choices.values():
                    yield from parser.options()


def explain(message: str, *, own: Iterable[str], others: Iterable[str]) -> str:
    """What is wrong, in one line of the many that the parser has to say.

    Args:
        message: From the parser.
        own: Names that would have been valid in that place.
        others: Names that would have been valid elsewhere.
    """
    key = re.search(r'Parser key "(.+?)"', message)
    where = f"{key[1]}: " if key else ""
    for pattern, kind in UNKNOWN.items():
        if found := re.search(pattern, message):
            near = nearest(found[1], own) or nearest(found[1], others)
            return f"{where}there is no {kind} {found[1]!r}" + (f". Did you mean {near}?" if near else "")
    expected = re.findall(r"Expected an? (.+?)(?:\. Got value: .*)?$", message, flags=re.MULTILINE)
    given = re.search(r"(?:Given|Got) value: (.*)", message)
    if where and given and expected:
        types = (re.sub(r"typing\.Literal|<class '(.+)'>|[\[\]]", r"\1", name) for name in expected)
        return f"{where}expected {' or '.join(name for name in types if name != 'NoneType')}, got {given[1]}"
    plain = re.sub(NOISE, "", message, flags=re.MULTILINE)
    return where + " ".join(plain.split())


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is written most like the last part of ``name``, or like all of it."""
    known = set(known) - {name}
    for written in (name, name.rpartition(".")[2]):
        for near in get_close_matches(written, known, n=1):
            return near
    return None


def names_of_classes() -> Iterator[str]:
    """The classes that a configuration may choose, and what their constructors take."""
    found = list(BY_NAME)
    for kind in found:
        found.extend(kind.__subclasses__())
        yield from (kind.__name__, *inspect.signature(kind).parameters)


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
        try:
            check_trainer(strategy=_name(trainer["strategy"]), precision=_precision(trainer["precision"]))
        except ValueError as mistake:
            self.parser.error(str(mistake))
        callbacks = trainer["callbacks"] or []
        named = [_name(callback) for callback in (callbacks if isinstance(callbacks, list) else [callbacks])]
        if trainer["enable_progress_bar"] is not False and not any(name.endswith("ProgressBar") for name in named):
            self.trainer_defaults = {"callbacks": [SegmentProgressBar()]}

    def instantiate_classes(self) -> None:
        """Build everything; what a constructor refuses is a mistake in the configuration."""
        try:
            super().instantiate_classes()
        except MISTAKES as mistake:
            if _package(mistake) not in (HERE, "lightning"):
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
        path = self._chosen("ckpt_path")
        if path and not re.fullmatch(r"best|last|hpc|registry.*|\w+://.*", path):
            checkpoints.check(checkpoints.read(path), model)

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
        SystemExit: With 2 for a mistake in the configuration, with 1 for data or a checkpoint that cannot be used, and
            where training is no longer finite.
    """
    _silence()
    try:
        CLI(args)
    except OSError as mistake:
        _stop(mistake, code=1)
    except MISTAKES as mistake:
        if _package(mistake) not in (HERE, "lightning"):
            raise
        _stop(mistake, code=1 if _package(mistake) == HERE else 2)


def _package(mistake: Exception) -> str:
    """The package that raised it."""
    *_, (frame, _) = traceback.walk_tb(mistake.__traceback__)
    return str(frame.f_globals["__name__"]).partition(".")[0]


def _stop(mistake: Exception, *, code: int) -> NoReturn:
    # all ranks raise it, and one is enough to say so
    if not (isinstance(mistake, FloatingPointError) and rank_zero_only.rank):  # type: ignore[attr-defined]
        sys.stderr.write(f"error: {' '.join(str(mistake).split())}\n")
    sys.exit(code)


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
