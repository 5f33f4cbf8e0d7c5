"""Files that are written whole or not at all, and never over what is read."""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from memformer_pl.errors import UsageError, usage_error


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name to write a file under; at the end of the body it takes its place on disk, beside the one it replaces.

    If the body raises or the process is killed, the old file is left whole.

    Raises:
        UsageError: The file cannot be written there. What the body raises stays as it is.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        yield partial
        with writing(path):
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
