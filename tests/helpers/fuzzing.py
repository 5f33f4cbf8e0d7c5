"""Shared by the fuzz tests: sampled faults, a time limit, and checks that a refused command leaves nothing behind."""

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import pytest
from conftest import Outcome

import memformer_pl.cli.lightning_cli  # noqa: F401 - Lightning binds standard error at import

LIMIT = 120
"""Seconds after which a command is considered to hang. The slowest takes two."""
LONGEST = 1000
"""Maximum length of an error in characters, including file names."""


class Hangs(BaseException):
    """Raised inside a command that takes too long."""


@contextmanager
def limit_of_time() -> Iterator[None]:
    """Interrupt a command that hangs."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hangs(f"after {LIMIT} seconds, in {frame}")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def some(faults: Sequence[NamedTuple], *, short: int) -> list[object]:
    """Every fault as a parameter; all but ``short`` of them, chosen with a fixed seed, are marked slow."""
    chosen = set(random.Random(0).sample(range(len(faults)), short))
    marks = [() if place in chosen else (pytest.mark.slow,) for place in range(len(faults))]
    names = [f"{place}-{fault[0]}" for place, fault in enumerate(faults)]
    return [pytest.param(fault, marks=mark, id=name) for fault, mark, name in zip(faults, marks, names, strict=True)]


def files_below(*folders: Path) -> frozenset[tuple[str, int, int]]:
    """Names, sizes and times of all files, to check that nothing was written."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return frozenset((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)


def run(command: Callable[..., Outcome], *args: object) -> Outcome:
    """Run a command that must neither hang nor end in a traceback."""
    with limit_of_time():
        outcome = command(*args)
    assert "Traceback" not in outcome.output
    return outcome


def the_error(outcome: Outcome) -> str:
    """The single paragraph that says what is wrong."""
    (line,) = outcome.errors
    assert len(line) < LONGEST
    assert "usage:" not in outcome.output
    # nothing was trained, and nothing is printed after the error
    assert "Trainer.fit" not in outcome.output
    assert outcome.output.rstrip().endswith(line)
    return line
