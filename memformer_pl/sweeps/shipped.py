"""The shipped configurations: the files of ``experiments/``, each with a name.

A name is the path below that folder without ``.yaml``: ``quickstart``, ``models/lstm``, ``recall/copy/rows``. The
command line takes a name wherever it takes the file of a configuration or of a table. A file of that path comes first.
"""

import os
from pathlib import Path

from memformer_pl.errors import UsageError, nearest

PACKAGE = Path(__file__).resolve().parent.parent
HARNESS = "evaluate"
"""The folder of ``experiments`` whose files are tasks of the evaluation harness, and no configurations."""


def folder() -> Path:
    """Their folder: inside an installed package, beside the package in a checkout.

    Raises:
        UsageError: The package was copied without it.
    """
    for candidate in (PACKAGE / "experiments", PACKAGE.parent / "experiments"):
        if (candidate / "quickstart.yaml").is_file():
            return candidate
    raise UsageError(f"{PACKAGE} was copied without its configurations: install memformer-pl with pip")


def checkout() -> Path | None:
    """The root of the repository that the package is imported from; None if the package is installed."""
    return None if folder().parent == PACKAGE else PACKAGE.parent


def names() -> list[str]:
    """The names of all shipped configurations."""
    root = folder()
    paths = [path.relative_to(root) for path in root.rglob("*.yaml")]
    return sorted(path.with_suffix("").as_posix() for path in paths if path.parts[0] != HARNESS)


def config(name: str) -> Path:
    """The file of a shipped configuration.

    Args:
        name: For example ``quickstart`` or ``models/lstm``.

    Raises:
        UsageError: There is no such name. The message has the nearest one.
    """
    if name not in names():
        raise UsageError(f"no shipped configuration is named {name!r}. {_advice(name)}")
    return folder() / f"{name}.yaml"


def find(given: str | os.PathLike[str], *, beside: Path | None = None) -> Path:
    """Find a file by its path or, if there is none, by the name of a shipped configuration.

    Args:
        given: The path or the name.
        beside: The folder that the path is relative to; by default the current one.

    Raises:
        UsageError: There is neither, or the path is a folder.
    """
    written = Path(given)
    path = written if beside is None else beside / written
    if path.exists() and not path.is_dir():  # a pipe will do as well
        return path
    name = written.as_posix().removesuffix(".yaml")
    if name in names():
        return config(name)
    if not str(given):
        raise UsageError(f"the name of the file is empty. {_advice('')}")
    found = f"{str(path)!r} is a folder" if path.is_dir() else f"there is no file {str(path)!r}"
    raise UsageError(f"{found}, and no shipped configuration has this name. {_advice(name)}")


def _advice(name: str) -> str:
    """Suggest names: those of a folder, the nearest ones, or the top-level ones."""
    known = names()
    if inside := [one for one in known if one.startswith(f"{name}/")]:
        return f"There are {', '.join(inside)}"
    last = name.rpartition("/")[2]
    near = [one for one in known if one.rpartition("/")[2] == last or name.endswith(f"/{one}")]
    near = near or [one for one in (nearest(name, known), nearest(last, known)) if one]
    if near:
        return f"Did you mean {' or '.join(dict.fromkeys(near))}?"
    folders = dict.fromkeys(f"{one.partition('/')[0]}/" for one in known if "/" in one)
    return f"There are {', '.join(one for one in known if '/' not in one)}, and more in {', '.join(folders)}"
