"""Files that are written whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memformer_pl.errors import UsageError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What only writing can meet, whoever writes."""


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name to write a file under; at the end of the body it takes its place on disk, beside the one it replaces.

    If the body raises or the process is killed, the old file is left whole.

    Raises:
        UsageError: The file cannot be written: the disk is full, or the folder is not one to write to.
    """
    path = Path(path)
    # the same name every time: what a kill leaves is overwritten, and does not add up
    partial = path.with_name(f"{path.name}.partial")
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
