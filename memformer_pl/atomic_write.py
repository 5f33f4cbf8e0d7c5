"""Files that are written whole or not at all, and never over what is read."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from memformer_pl.errors import UsageError, usage_error

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What only writing can meet, whoever writes."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name to write a file under; at the end of the body it takes its place on disk, beside the one it replaces.

    If the body raises or the process is killed, the old file is left whole.

    Raises:
        UsageError: The file cannot be written: the disk is full, or the folder is not one to write to.
    """
    path = Path(path)
    partial = partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: its folder cannot be made ({error})") from error
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
    """What the system said when the file was written; None if something else went wrong.

    Libraries raise exceptions of their own while they handle the system's, which is kept behind them.
    """
    while error is not None and not isinstance(error, UsageError):
        if isinstance(error, OSError) and (error.errno in NO_ROOM or error.filename in (partial, str(partial))):
            return error.strerror
        error = error.__cause__ or error.__context__
    return None


def writing(path: str | os.PathLike[str]) -> AbstractContextManager[None]:
    """A context in which a file or folder is written: an error of the system becomes one that a user can mend."""
    return usage_error(OSError, about=f"cannot write {str(path)!r}")


def require_writable(path: Path) -> None:
    """Refuse a file that is to be written in the end, but cannot be now; its folder is made.

    Raises:
        UsageError: It cannot.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_of(path).touch()
        partial_of(path).unlink()


def partial_of(path: Path) -> Path:
    """Where a file is written before it takes its place: the same every time, so what a kill leaves does not add up."""
    return path.with_name(f"{path.name}.partial")


def require_apart(name: str, written: Iterable[Path], *, read: Iterable[Path]) -> None:
    """Refuse to write over what is read, under whatever names: links are followed.

    Args:
        name: Of the option that says where to write.
        written: Files that would be written.
        read: Files that are read, and folders of which every file is.

    Raises:
        UsageError: One of them is both.
    """
    targets = list(written)
    for source in read:
        for file in source.rglob("*") if source.is_dir() else (source,):
            for target in targets:
                if _same(file, target):
                    raise UsageError(f"{name} would write over {str(file)!r}, which is read: name another place")


def _same(one: Path, other: Path) -> bool:
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()
