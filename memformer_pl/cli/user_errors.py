"""What a user's mistake looks like on the command line: one line. A bug keeps its traceback."""

import inspect
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import torch

from memformer_pl.errors import UsageError, debugging, nearest

OF_LIGHTNING = ("lightning", "pytorch_lightning")
OF_PACKAGE = __name__.partition(".")[0]


def refuse(error: Exception, *, code: int) -> NoReturn:
    """Print what a user can mend in a line, and exit with ``code``; raise it where the traceback is asked for."""
    if debugging():
        raise error
    sys.stderr.write(f"error: {brief(str(error))}\n")
    sys.exit(code)


class Builder:
    """Calls the constructors that a configuration names, and remembers the first exception that one of them raised.

    The parser wraps such an exception, or tries another type in its place.
    """

    def __init__(self) -> None:
        self.raised: Exception | None = None

    def __call__(self, kind: type, *args: Any, **options: Any) -> Any:
        """An instance.

        Raises:
            UsageError: The options are not those of the constructor, or Lightning's own refuses their values, or one of
                this package asks for more memory than there is.
        """
        try:
            return build(kind, *args, **options)
        except Exception as error:
            self.raised = self.raised or error
            raise


def build(kind: type, *args: Any, **options: Any) -> Any:
    """An instance of a class that a configuration names; see :class:`Builder`."""
    try:
        inspect.signature(kind).bind(*args, **options)
    except TypeError as error:
        raise UsageError(f"{kind.__name__}: {error}") from error
    package = kind.__module__.partition(".")[0]
    try:
        return kind(*args, **options)
    except UsageError:
        raise
    except Exception as error:
        if package in OF_LIGHTNING:
            raise UsageError(f"{kind.__name__}: {error}") from error
        if package == OF_PACKAGE and is_of_memory(error):
            told = str(error).partition(". Error code")[0]
            raise UsageError(f"{kind.__name__}: these sizes need more memory than there is: {told}") from error
        raise


def is_of_memory(error: Exception) -> bool:
    """Whether memory did not suffice; of the CPU's, torch has no class of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


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
