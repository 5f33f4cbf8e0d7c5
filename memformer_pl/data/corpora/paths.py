"""Find the files that a path or pattern stands for, and those that it would match."""

import glob
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path

from memformer_pl.errors import UsageError, usage_error


def matches(path: str) -> list[Path]:
    """Return the files that a path stands for, as absolute paths.

    Raises:
        UsageError: There are none.
    """
    with usage_error(OSError, RuntimeError, about="cannot read a path"):  # a name that is too long, an unknown home
        target = Path(path).expanduser().absolute()
        if target.is_file():
            return [target]
    # Path.glob takes no absolute pattern
    found = below(target) if target.is_dir() else list(map(Path, glob.iglob(str(target), recursive=True)))  # noqa: PTH207
    broken = [file for file in found if file.is_symlink() and not file.exists()]
    if broken:
        raise UsageError(f"{str(broken[0])!r} is a broken link, got {path=}")
    files = [file for file in found if file.is_file()]
    if not files:
        raise UsageError(f"{_why(target, found)}, got {path=}")
    return files


def below(folder: Path) -> list[Path]:
    """Every file in a folder, at any depth, sorted by path; hidden files are left out."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files.extend(Path(parent, name) for name in names if not name.startswith("."))
    return sorted(files)


def covers(path: str, file: Path) -> bool:
    """Whether :func:`matches` returns this file for a path, or would if it existed. Links are followed."""
    with usage_error(OSError, RuntimeError, about="cannot read a path"):
        target = Path(path).expanduser().absolute()
        plain = target.exists() or not glob.has_magic(str(target))
    fixed = len(target.parts) if plain else next(n for n, part in enumerate(target.parts) if glob.has_magic(part))
    root, resolved = Path(*target.parts[:fixed]).resolve(), file.expanduser().resolve()
    if not resolved.is_relative_to(root):
        return False
    return _fits(target.parts[fixed:] if not plain else ("**",), resolved.relative_to(root).parts)


def stamp(files: Iterable[Path]) -> str:
    """Hash that changes when a file is added, removed, renamed or written."""
    digest = blake2b(digest_size=16)
    for file in files:
        status = file.stat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _fits(pattern: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern; only a pattern with a dot matches hidden names."""
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
        return "the pattern matches directories, but no file: add /**/* to read the files in them"
    escaped = next((parent for parent in path.parents if parent.exists() and glob.has_magic(str(parent))), None)
    if escaped is not None or "[" in str(path):
        return "no file matches the pattern: [1] in a pattern matches the character 1; write [[]1] for the name [1]"
    return "no file matches the pattern"
