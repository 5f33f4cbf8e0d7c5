"""The parser of the command line and of configuration files: what is wrong is told in a line or two."""

import inspect
import os
import sys
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]  # not in its __all__
from lightning import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from memformer_pl.cli.user_errors import brief, explain
from memformer_pl.contract import SegmentModel
from memformer_pl.data import Corpus, Tokenizer
from memformer_pl.errors import UsageError
from memformer_pl.sweeps import shipped, yaml_checks

BY_NAME = (SegmentModel, Corpus, Tokenizer, Callback, Logger)
"""What a configuration chooses by ``class_path``."""


class ConfigFile(ActionConfigFile):
    """A configuration: a file, what would be in one, or the name of one that comes with the package."""

    def __init__(self, **options: Any) -> None:
        told = "Configuration: a file in YAML, or the name of a shipped one, such as quickstart or models/lstm."
        super().__init__(**{**options, "help": told})  # type: ignore[no-untyped-call]

    @staticmethod
    def apply_config(parser: "Parser", cfg: Namespace, dest: str, value: str) -> None:
        """Read it."""
        try:
            found = value if ":" in value or value == "{}" else str(shipped.find(value))
        except UsageError as mistake:
            parser.error(f"{dest}: {mistake}")
        ActionConfigFile.apply_config(parser, cfg, dest, found)


class Parser(LightningArgumentParser):
    """Reports a mistake in a line or two, with the nearest name that would have been valid."""

    file: str | None = None
    """The configuration that is being read: of several, the one that a mistake is in."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("action", ActionConfigFile, ConfigFile)  # where Lightning adds --config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, and exit with 2."""
        del ex
        where = f"{self.file}: " if self.file else ""
        told = explain(message, own=self.options(), others=names_of_classes())
        sys.stderr.write(f"error: {where}{brief(told)}\n")
        sys.exit(2)

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **options: Any) -> Namespace:
        """Read a configuration file."""
        around, self.file = self.file, str(path)
        try:
            read: Namespace = super().parse_path(path, *args, **options)
            return read
        except UnicodeDecodeError as mistake:
            self.error(f"no UTF-8: byte {mistake.object[mistake.start]:#04x} at offset {mistake.start}")
        finally:
            self.file = around

    def parse_string(self, content: str, *args: Any, **options: Any) -> Namespace:
        """Read a configuration."""
        try:
            yaml_checks.check(content, sections=self.groups or ())
        except ValueError as mistake:
            self.error(str(mistake))
        read: Namespace = super().parse_string(content, *args, **options)
        return read

    def validate(self, namespace: Namespace, *args: Any, **options: Any) -> None:
        """Unlike jsonargparse, take null for a value: what has a default, and expects something else, refuses it."""
        given = namespace.clone()
        for name in self.without_default():
            if given.get(name) is None:
                given.pop(name, None)
        super().validate(given, *args, **{**options, "skip_unset": False})

    def without_default(self) -> Iterator[str]:
        """The options of this parser and of its commands for which null is as good as nothing."""
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


def names_of_classes() -> Iterator[str]:
    """The classes that a configuration may choose, and what their constructors take."""
    found = list(BY_NAME)
    for kind in found:
        found.extend(kind.__subclasses__())
        yield from (kind.__name__, *inspect.signature(kind).parameters)
