"""Errors that a user can correct. Commands print them in one line; every other exception keeps its traceback."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

LARGEST = 1 << 20
"""Most parts that are built one by one, such as layers and lanes: building more would take forever."""
LARGEST_WIDTH = 1 << 24
"""Largest axis of a tensor: products of two larger ones overflow before memory runs out."""


class UsageError(ValueError):
    """A mistake that a user can correct: in an option, in a file. The message says what to do.

    Raised where the mistake is found, by code that knows it to be a user's and not a bug. The command line prints the
    message in one line; with ``MEMFORMER_DEBUG=1`` in the environment it prints the traceback too.
    """


class OptionError(UsageError):
    """An option whose value does not exist, or that contradicts another one. The command exits with 2."""


class NonFiniteError(UsageError, FloatingPointError):
    """Training has diverged, or weights are not finite."""


class DivergedError(NonFiniteError):
    """Training has diverged. All ranks raise it at the same step."""


class UntrainedWarning(UserWarning):
    """A warning about the initialization of a model, without meaning for a model whose weights are loaded."""


@contextmanager
def usage_error(*kinds: type[Exception], about: str) -> Iterator[None]:
    """Turn exceptions of these kinds into a :class:`UsageError` that begins with ``about``.

    For calls of other libraries with a user's input, such as a file or the options of a class.
    """
    try:
        yield
    except UsageError:
        raise
    except kinds as error:
        raise UsageError(f"{about}: {error}") from error


@contextmanager
def option_error() -> Iterator[None]:
    """Turn a :class:`UsageError` into an :class:`OptionError`, around checks of options."""
    try:
        yield
    except UsageError as error:
        raise OptionError(str(error)) from error


def debugging() -> bool:
    """Whether every exception keeps its traceback."""
    return os.environ.get("MEMFORMER_DEBUG", "0") not in ("", "0")


def require_sizes(*, least: int = 1, most: int | None = None, **sizes: int) -> None:
    """Refuse sizes below ``least`` or above ``most``.

    A class checks its own sizes, since only it knows what its numbers mean.

    Raises:
        UsageError: Names the first such size.
    """
    for name, size in sizes.items():
        if size < least:
            raise UsageError(f"{name} must be at least {least}, got {size}")
        if most is not None and size > most:
            raise UsageError(f"{name} must be at most {most:,}, got {size}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name whose spelling is closest to ``name``, or to its last part; None if none is close."""
    known = set(known) - {name}
    for written in (name, name.rpartition(".")[2]):
        for near in get_close_matches(written, known, n=1):
            return near
    return None
