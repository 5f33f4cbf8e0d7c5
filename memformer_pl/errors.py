"""What a user can mend, and how a command tells it. Every other exception is a bug, and keeps its traceback."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

LARGEST = 1 << 20
"""Parts that are made one by one, such as layers, and lanes: building more would never end."""
LARGEST_WIDTH = 1 << 24
"""An axis of a tensor: beyond, products of two overflow before memory runs out."""


class UsageError(ValueError):
    """Something that a user can mend: an option, a file, a machine that is too small. The message says what to do.

    It is raised where the fault is found, by code that knows it to be no bug. The command line prints the message in a
    line; with ``MEMFORMER_DEBUG=1`` in the environment it prints the traceback too.
    """


class OptionError(UsageError):
    """An option that asks for what does not exist, or does not go with another one. A command then exits with 2."""


class NonFiniteError(UsageError, FloatingPointError):
    """A training that has diverged, or weights that are not finite."""


class UntrainedWarning(UserWarning):
    """About how an untrained model begins; nothing to a model whose weights are loaded."""


@contextmanager
def usage_error(*kinds: type[Exception], about: str) -> Iterator[None]:
    """Turn exceptions of these kinds into a :class:`UsageError` that begins with ``about``.

    For calls of other libraries on what a user has given: a file, or the options of a class.
    """
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        raise UsageError(f"{about}: {error}") from error


@contextmanager
def option_error() -> Iterator[None]:
    """Turn a :class:`UsageError` into an :class:`OptionError`, where what was checked is known to be an option."""
    try:
        yield
    except UsageError as error:
        raise OptionError(str(error)) from error


def debugging() -> bool:
    """Whether every exception keeps its traceback."""
    return os.environ.get("MEMFORMER_DEBUG", "0") not in ("", "0")


def require_sizes(*, least: int = 1, most: int | None = None, **sizes: int) -> None:
    """Raise a :class:`UsageError` that names the first size below ``least`` or above ``most``, if there is one.

    A class checks its own sizes, since only it knows what its numbers mean.
    """
    for name, size in sizes.items():
        if size < least:
            raise UsageError(f"{name} must be at least {least}, got {size}")
        if most is not None and size > most:
            raise UsageError(f"{name} must be at most {most:,}, got {size}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is spelled most like ``name``, or like its last part; None if none is close."""
    known = set(known) - {name}
    for written in (name, name.rpartition(".")[2]):
        for near in get_close_matches(written, known, n=1):
            return near
    return None
