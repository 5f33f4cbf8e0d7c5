"""The parser of the command line and of configuration files, and the builder of what they name.

Both report a user's mistake in a line or two.
"""

import inspect
import os
import sys
from argparse import SUPPRESS
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn

from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]  # not in its __all__
from lightning import Callback
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from memformer_pl.cli.user_errors import brief, explain
from memformer_pl.contract import SegmentModel
from memformer_pl.data import Corpus, Tokenizer
from memformer_pl.errors import UsageError
from memformer_pl.sweeps import shipped, yaml_checks

EVERYWHERE = (Callback, Logger, Optimizer, LRScheduler)
"""Base classes of what every configuration may choose by ``class_path``."""
LIBRARY_USAGE_ERRORS = (MisconfigurationException, ModuleNotFoundError)
"""What constructors of other libraries raise for wrong options, and for a package that is not installed."""


class ConfigFile(ActionConfigFile):
    """A configuration: a file, its content, or the name of a shipped one."""

    def __init__(self, **options: Any) -> None:
        description = "Configuration: a file in YAML, or the name of a shipped one, such as quickstart or models/lstm."
        super().__init__(**{**options, "help": description})  # type: ignore[no-untyped-call]

    @staticmethod
    def apply_config(parser: "Parser", cfg: Namespace, dest: str, value: str) -> None:
        """Read the configuration."""
        try:
            found = value if ":" in value or value == "{}" else str(shipped.find(value))
        except UsageError as mistake:
            parser.error(f"{dest}: {mistake}")
        ActionConfigFile.apply_config(parser, cfg, dest, found)


class Parser(LightningArgumentParser):
    """Report a mistake in a line or two, with the nearest valid name."""

    chosen: ClassVar[tuple[type, ...]] = (SegmentModel, Corpus, Tokenizer)
    """Further base classes of what a configuration chooses by ``class_path``."""
    file: str | None = None
    """The configuration that is being read, to name it in an error."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("action", ActionConfigFile, ConfigFile)  # where Lightning adds --config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, and exit with 2."""
        del ex
        where = f"{self.file}: " if self.file else ""
        explained = explain(message, here=self.options(), elsewhere=names_of_classes((*self.chosen, *EVERYWHERE)))
        sys.stderr.write(f"error: {where}{brief(explained)}\n")
        sys.exit(2)

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **options: Any) -> Namespace:
        """Read a configuration file."""
        outer, self.file = self.file, str(path)
        try:
            read: Namespace = super().parse_path(path, *args, **options)
            return read
        except UnicodeDecodeError as mistake:
            self.error(f"not UTF-8: byte {mistake.object[mistake.start]:#04x} at offset {mistake.start}")
        finally:
            self.file = outer

    def parse_string(self, content: str, *args: Any, **options: Any) -> Namespace:
        """Read the content of a configuration."""
        try:
            yaml_checks.check(content, sections=self.groups or ())
        except UsageError as mistake:
            self.error(str(mistake))
        read: Namespace = super().parse_string(content, *args, **options)
        return read

    def validate(self, namespace: Namespace, *args: Any, **options: Any) -> None:
        """Refuse null for an option that has a default and a type without null; jsonargparse would not."""
        given = namespace.clone()
        for name in self.without_default():
            if given.get(name) is None:
                given.pop(name, None)
        super().validate(given, *args, **{**options, "skip_unset": False})

    def without_default(self) -> Iterator[str]:
        """The options of this parser and of its commands that have no default: null leaves them unset."""
        for action in self._actions:
            if action.default in (None, SUPPRESS):
                yield action.dest
            if isinstance(action.choices, Mapping):
                for name, parser in action.choices.items():
                    yield from (f"{name}.{option}" for option in parser.without_default())

    def options(self) -> Iterator[str]:
        """The options of this parser and of its commands, and the names of the commands."""
        for action in self._actions:
            yield action.dest
            if isinstance(action.choices, Mapping):
                yield from action.choices
                for parser in action.choices.values():
                    yield from parser.options()


def names_of_classes(chosen: Iterable[type]) -> Iterator[str]:
    """The classes that a configuration may choose, and the options of their constructors.

    Args:
        chosen: Their base classes.
    """
    found = list(chosen)
    for kind in found:
        found.extend(kind.__subclasses__())
        yield from (kind.__name__, *inspect.signature(kind).parameters)


class Builder:
    """Call the constructors that a configuration names, and keep the first exception that one of them raises.

    The parser wraps such an exception, or goes on to try another type.
    """

    def __init__(self) -> None:
        self.raised: Exception | None = None

    def __call__(self, kind: type, *args: Any, **options: Any) -> Any:
        """Build an instance.

        Raises:
            UsageError: The constructor does not take these options, or refuses their values by an exception whose type
                says that the user is at fault. Any other exception of the constructor is passed on.
        """
        try:
            return build(kind, *args, **options)
        except Exception as error:
            self.raised = self.raised or error
            raise


def build(kind: type, *args: Any, **options: Any) -> Any:
    """Build an instance of a class that a configuration names; see :class:`Builder`."""
    try:
        inspect.signature(kind).bind(*args, **options)
    except TypeError as error:
        raise UsageError(f"{kind.__name__}: {error}") from error
    try:
        return kind(*args, **options)
    except LIBRARY_USAGE_ERRORS as error:
        raise UsageError(f"{kind.__name__}: {error}") from error
