"""Which exceptions tell of a mistake that a user can mend. The others mean a bug, and keep their traceback."""

import sys
import traceback
from typing import TypeGuard

import torch

HERE = __name__.partition(".")[0]
MENDABLE: dict[str, tuple[type[Exception], ...]] = {
    HERE: (ValueError, TypeError, FloatingPointError),
    "lightning": (ValueError, TypeError, ArithmeticError, RuntimeError, ImportError),
    # what stands for a remote file
    "fsspec": (ValueError, ImportError),
    # arguments that a constructor does not take, one that is wrapped included
    "jsonargparse": (ValueError, TypeError),
    "inspect": (TypeError,),
}
"""What is raised for a user, by the package that raises it."""


def mendable(error: BaseException | None) -> Exception | None:
    """The exception that tells of the user's mistake: this one or what caused it, or None.

    Files that cannot be opened are the user's to mend, and so are sizes for which there is not enough memory.
    """
    wrapped: Exception | None = None
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _is_of_memory(error)):
            return ValueError(f"these sizes need more memory than there is: {str(error).partition('. Error code')[0]}")
        if isinstance(error, OSError):
            return error
        package = package_of(error)
        if isinstance(error, MENDABLE.get(package, ())) or _is_of_configuration(error):
            if package != "jsonargparse":
                return error
            wrapped = wrapped or error
        error = error.__cause__
    return wrapped


def status(mistake: Exception) -> int:
    """The exit code: 1 for data or a checkpoint that cannot be used and for a run that blew up, else 2."""
    if isinstance(mistake, OSError):
        return 1
    return 1 if package_of(mistake) == HERE and not _is_of_configuration(mistake) else 2


def package_of(error: BaseException) -> str:
    """The package that raised it."""
    *_, name = ["", *(frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))]
    return str(name).partition(".")[0]


def _is_of_configuration(error: BaseException) -> TypeGuard[Exception]:
    """Whether it is Lightning's own; a command that does without Lightning does not load it here."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    return lightning is not None and isinstance(error, lightning.MisconfigurationException)


def _is_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
