"""Write files whole or not at all, and never over an input."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from memformer_pl.errors import UsageError, usage_error

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of the system that only writing can cause."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; the file written there replaces ``path`` at the end of the body.

    If the body raises or the process is killed, the old file stays whole.

    Raises:
        UsageError: Writing fails: the disk is full, or the folder is not writable.
    """
    path = Path(path)
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: creating its folder failed ({error})") from error
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, Exception) and (reason := _reason(error, partial)):
            left = "the file that was there before is unchanged" if path.exists() else "nothing was written"
            raise UsageError(f"cannot write {str(path)!r}: {reason} ({left}). Make room, or write elsewhere") from error
        raise


def _reason(error: BaseException | None, partial: Path) -> str | None:
    """The system's reason why writing the file failed; None if something else went wrong.

    Libraries raise exceptions of their own while they handle the system's, which is then their cause or context.
    """
    while error is not None and not isinstance(error, UsageError):
        if isinstance(error, OSError) and (error.errno in NO_ROOM or error.filename in (partial, str(partial))):
            return error.strerror
        error = error.__cause__ or error.__context__
    return None


def writing(path: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """Turn an ``OSError`` in the body into a :class:`UsageError`, while a file or folder is written."""
    return usage_error(OSError, about=f"cannot write {str(path)!r}")


def require_writable(path: Path) -> None:
    """Check now that a file will be writable later, and create its folder.

    Raises:
        UsageError: The file is not writable.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_of(path).touch()
        partial_of(path).unlink()


def partial_of(path: Path) -> Path:
    """The path to write a file under before it replaces ``path``; always the same, so kills leave one file at most."""
    return path.with_name(f"{path.name}.partial")


def require_apart(name: str, written: Iterable[Path], *, read: Iterable[Path]) -> None:
    """Refuse to overwrite an input, also under another name: links are followed.

    Args:
        name: The option that names the output.
        written: Files that would be written.
        read: Input files, and folders whose files are inputs.

    Raises:
        UsageError: A file is in both.
    """
    targets = list(written)
    for source in read:
        for file in source.rglob("*") if source.is_dir() else (source,):
            for target in targets:
                if _same(file, target):
                    raise UsageError(f"{name} would overwrite {str(file)!r}, an input: choose another file")


def _same(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()
