"""Files by paths and patterns: which ones a path stands for, and which ones it would."""

import glob
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path

from memformer_pl.errors import UsageError, usage_error


def matches(path: str) -> list[Path]:
    """The files that a path stands for, absolute.

    Raises:
        UsageError: There are none.
    """
    with usage_error(OSError, RuntimeError, about="cannot read a path"):  # a name too long, a home that is not known
        here = Path(path).expanduser().absolute()
        if here.is_file():
            return [here]
    # Path.glob takes no absolute pattern
    found = below(here) if here.is_dir() else list(map(Path, glob.iglob(str(here), recursive=True)))  # noqa: PTH207
    lost = [file for file in found if file.is_symlink() and not file.exists()]
    if lost:
        raise UsageError(f"{str(lost[0])!r} is a link that leads nowhere, got {path=}")
    files = [file for file in found if file.is_file()]
    if not files:
        raise UsageError(f"{_why(here, found)}, got {path=}")
    return files


def below(folder: Path) -> list[Path]:
    """Every file in a folder, at any depth, by path; what is hidden is left out."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files.extend(Path(parent, name) for name in names if not name.startswith("."))
    return sorted(files)


def covers(path: str, file: Path) -> bool:
    """Whether :func:`matches` gives a file for a path, or would if it were there: links are followed first."""
    with usage_error(OSError, RuntimeError, about="cannot read a path"):
        here = Path(path).expanduser().absolute()
        plain = here.exists() or not glob.has_magic(str(here))
    fixed = len(here.parts) if plain else next(n for n, part in enumerate(here.parts) if glob.has_magic(part))
    root, target = Path(*here.parts[:fixed]).resolve(), file.expanduser().resolve()
    if not target.is_relative_to(root):
        return False
    return _fits(here.parts[fixed:] if not plain else ("**",), target.relative_to(root).parts)


def stamp(files: Iterable[Path]) -> str:
    """Changes when a file is added, removed, renamed or written."""
    digest = blake2b(digest_size=16)
    for file in files:
        status = file.stat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _fits(pattern: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern; what is hidden is matched by its dot alone."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    if pattern[0] == "**":
        return _fits(pattern[1:], parts) or (not hidden and _fits(pattern, parts[1:]))
    return not hidden and fnmatchcase(parts[0], pattern[0]) and _fits(pattern[1:], parts[1:])


def _why(path: Path, found: Sequence[Path]) -> str:
    """Why a path leads to no file, and what to do."""
    if path.is_dir():
        return "the directory has no file in it"
    if not glob.has_magic(str(path)):
        return "there is no such file or directory"
    if found:
        return "no file matches the pattern, only directories: add /**/* to read what is in them"
    escaped = next((parent for parent in path.parents if parent.exists() and glob.has_magic(str(parent))), None)
    if escaped is not None or "[" in str(path):
        return "no file matches the pattern: in it [1] stands for the character 1; write [[]1] for the name [1]"
    return "no file matches the pattern"
