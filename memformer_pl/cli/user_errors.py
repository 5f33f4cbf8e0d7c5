"""What the command line does with an exception: a user's mistake is told in a line, a bug keeps its traceback."""

import inspect
import sys
from typing import Any, NoReturn

import torch

from memformer_pl.errors import UsageError, debugging
from memformer_pl.cli.explanations import brief

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
