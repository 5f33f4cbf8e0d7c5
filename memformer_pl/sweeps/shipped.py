"""The configurations that come with the package: those of ``experiments/`` in the repository, by name.

A name is the place below that folder without ``.yaml``: ``quickstart``, ``models/lstm``, ``recall/rows``. The command
line takes such a name wherever it takes the file of a configuration or of a table; a file of that name comes first.
"""

import os
from pathlib import Path

from memformer_pl.errors import UsageError, nearest

PACKAGE = Path(__file__).resolve().parent.parent


def folder() -> Path:
    """Where they lie: inside an installed package, or beside it in a checkout of the repository.

    Raises:
        UsageError: The package was copied without them.
    """
    for place in (PACKAGE / "experiments", PACKAGE.parent / "experiments"):
        if (place / "quickstart.yaml").is_file():
            return place
    raise UsageError(f"{PACKAGE} was copied without its configurations: install memformer-pl with pip")


def checkout() -> Path | None:
    """The root of the repository that the package is imported from; None where it is installed."""
    return None if folder().parent == PACKAGE else PACKAGE.parent


def names() -> list[str]:
    """The names of all of them."""
    root = folder()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def config(name: str) -> Path:
    """The file of a shipped configuration.

    Args:
        name: For example ``quickstart`` or ``models/lstm``.

    Raises:
        UsageError: None has this name; the message has the nearest one.
    """
    if name not in names():
        raise UsageError(f"no shipped configuration is named {name!r}. {_advice(name)}")
    return folder() / f"{name}.yaml"


def find(given: str | os.PathLike[str], *, beside: Path | None = None) -> Path:
    """The file that is meant by a path or by the name of a shipped configuration. A path comes first.

    Args:
        given: The path or the name.
        beside: The folder that the path is relative to; by default the current one.

    Raises:
        UsageError: There is neither, or the path is a folder.
    """
    written = Path(given)
    path = written if beside is None else beside / written
    if path.exists() and not path.is_dir():  # a pipe is as good as a file
        return path
    name = written.as_posix().removesuffix(".yaml")
    if name in names():
        return config(name)
    if not str(given):
        raise UsageError(f"the name of the file is empty. {_advice('')}")
    found = f"{str(path)!r} is a folder" if path.is_dir() else f"there is no file {str(path)!r}"
    raise UsageError(f"{found}, and no shipped configuration is named {name!r}. {_advice(name)}")


def _advice(name: str) -> str:
    """What may have been meant: the nearest names, those of a folder, or where to look."""
    known = names()
    if inside := [one for one in known if one.startswith(f"{name}/")]:
        return f"There are {', '.join(inside)}"
    last = name.rpartition("/")[2]
    near = [one for one in known if one.rpartition("/")[2] == last or name.endswith(f"/{one}")]
    near = near or [one for one in (nearest(name, known), nearest(last, known)) if one]
    if near:
        return f"Did you mean {' or '.join(dict.fromkeys(near))}?"
    folders = dict.fromkeys(f"{one.partition('/')[0]}/" for one in known if "/" in one)
    return f"There are {', '.join(one for one in known if '/' not in one)}, and those in {', '.join(folders)}"
