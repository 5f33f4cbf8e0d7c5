"""The parser of the command line and of configuration files: what is wrong is told in a line or two."""

import inspect
import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

from memformer_pl import configs
from memformer_pl.data import Corpus, Tokenizer
from memformer_pl.recurrence import SegmentModel

BY_NAME = (SegmentModel, Corpus, Tokenizer, Callback, Logger)
"""What a configuration chooses by ``class_path``."""
UNKNOWN = {
    r"unrecognized arguments: --?([\w.]+)": "option",
    r"does not accept option '([\w.]+)'": "option",
    r"Option '([\w.]+)' is not accepted": "option",
    r"Expected a dot import path string: (\S+)": "class",
    r"Problem with given class_path '(\S+)':\s+(?:module .* has no attribute|No module named)": "class",
    r"argument subcommand: invalid choice: '(\S+?)'": "command",
}
"""How the parser reports a name that it does not know, and the name of what."""

LONGEST = 600
"""Characters of an error."""
NOISE = r'^ *- |Parser key ".+?":?|in "<unicode string>",|Expected a path but .*|(?s:Subclass types expect.*)'
"""What the parser says besides what is wrong."""


class Parser(LightningArgumentParser):
    """Reports a mistake in a line or two, with the nearest name that would have been valid."""

    file: str | None = None
    """The configuration that is being read: of several, the one that a mistake is in."""

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
            configs.check(content, sections=self.groups or ())
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
    expected += re.findall(r"Not a valid subclass of (\w+)", message)
    given = re.search(r"(?:Given|Got) value: (.*)", message)
    if where and given and expected:
        types = dict.fromkeys(re.sub(r"typing\.Literal|<class '(.+)'>|[\[\]]", r"\1", name) for name in expected)
        return f"{where}expected {' or '.join(name for name in types if name != 'NoneType')}, got {given[1]}"
    plain = re.sub(NOISE, "", message, flags=re.MULTILINE)
    return where + " ".join(plain.split())


def brief(text: str) -> str:
    """The text on one line, without its middle where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"


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
