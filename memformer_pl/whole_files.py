"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name to write a file under; at the end of the body it takes its place on disk, beside the one it replaces.

    If the body raises or the process is killed, the old file is left whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the same name every time: what a kill leaves is overwritten, and does not add up
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
