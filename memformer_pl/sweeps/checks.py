"""Checks of a file of rows, made before any training."""

import math
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from memformer_pl.errors import UsageError, nearest
from memformer_pl.sweeps import yaml_checks

NEEDED = ("base", "seeds", "metrics", "rows")
FILE = (*NEEDED, "better", "learning_rates", "chosen_by", "program")
PROGRAM = "memformer_pl"
"""The module whose command ``fit`` trains a row, unless the file names another."""
SECTIONS = ("model", "data", "trainer")
ROW = ("title", "paper", "against", "after", "config", *SECTIONS)
LARGEST_SEED = 2**32 - 1
"""The largest seed that numpy takes."""


def loaded(path: Path) -> dict[str, Any]:
    """Load the options of a YAML file.

    Raises:
        UsageError: The file is not valid YAML, or does not hold options.
    """
    try:
        text = path.read_text(encoding="utf-8")
        yaml_checks.check(text, sections=())
    except (UsageError, UnicodeDecodeError) as mistake:
        raise UsageError(f"{path}: {mistake}") from mistake
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def check_rows(content: Mapping[str, Any], path: Path) -> None:
    """Check the content of a file of rows.

    Raises:
        UsageError: Names the row and what is wrong with it.
    """
    if missing := sorted(set(NEEDED) - set(content)):
        raise UsageError(f"{path} is not a file of rows: it lacks {missing}")
    _known(content, FILE, f"{path}", more="write the options of runs in a row, or in a file that base lists")
    base, metrics, rows = (content[name] for name in ("base", "metrics", "rows"))
    if not (isinstance(base, list) and base and all(isinstance(name, str) for name in base)):
        raise UsageError(f"{path}: base must list configurations, such as [base.yaml], got {base!r}")
    check_seeds(content["seeds"], f"{path}: seeds")
    if not (isinstance(metrics, dict) and metrics and all(isinstance(name, str) for name in metrics)):
        raise UsageError(f"{path}: metrics must name figures, such as validation/bits_per_byte: bits, got {metrics!r}")
    _check_program(content.get("program", PROGRAM), path)
    if "learning_rates" in content:
        _check_rates(content["learning_rates"], f"{path}: learning_rates")
    if "better" in content and not ("learning_rates" in content and content["better"] in ("lower", "higher")):
        raise UsageError(
            f"{path}: better must be lower or higher, which of learning_rates is the best, got {content['better']!r}"
        )
    if "chosen_by" in content and not ("learning_rates" in content and content["chosen_by"] in list(metrics)):
        raise UsageError(
            f"{path}: chosen_by must be one of the metrics by which learning_rates are compared "
            f"({', '.join(metrics)}), got {content['chosen_by']!r}"
        )
    if not (isinstance(rows, dict) and rows):
        raise UsageError(f"{path}: rows must name at least one row, such as small: {{title: small}}, got {rows!r}")
    for number, (name, row) in enumerate(rows.items()):
        _check_row(name, row, rows, path)
        if row.get("after") is not None:
            _check_after(row["after"], list(rows)[:number], content, f"{path}: row {name!r}")


def check_seeds(seeds: Any, where: str) -> None:
    """Check the seeds of runs.

    Raises:
        UsageError: Names the wrong seed.
    """
    if not (isinstance(seeds, list) and seeds):
        raise UsageError(f"{where} must list at least one whole number, such as [0, 1, 2], got {seeds!r}")
    for i, seed in enumerate(seeds):
        if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
            raise UsageError(f"{where} must be whole numbers from 0 to {LARGEST_SEED}, got {seed!r}")
        if seed in seeds[:i]:
            raise UsageError(f"{where} has {seed} twice: remove one")


def _check_program(program: Any, path: Path) -> None:
    try:
        found = isinstance(program, str) and find_spec(f"{program}.__main__") is not None
    except ImportError:  # of a package around it
        found = False
    if not found:
        raise UsageError(
            f"{path}: program must be a package that `python -m` runs, such as memformer_pl.continual, got {program!r}"
        )


def _check_rates(rates: Any, where: str) -> None:
    if not (isinstance(rates, list) and rates):
        raise UsageError(f"{where} must list at least one number, such as [1.0e-3, 3.0e-3], got {rates!r}")
    for i, rate in enumerate(rates):
        if type(rate) is not float or not 0 < rate < math.inf:
            raise UsageError(f"{where} must be numbers above 0 with a point, such as 1.0e-3, got {rate!r}")
        if rate in rates[:i]:
            raise UsageError(f"{where} has {rate} twice: remove one")


def _check_row(name: Any, row: Any, rows: Mapping[Any, Any], path: Path) -> None:
    where = f"{path}: row {name!r}"
    if not (isinstance(name, str) and re.fullmatch(r"[\w+-][\w.+ -]*", name)):
        raise UsageError(
            f"{where}: name it with letters, digits, _, ., + and -, since it names a folder, and put a number in quotes"
        )
    if not isinstance(row, dict):
        raise UsageError(f"{where} must have a title and what it overrides, got {row!r}")
    _known(row, ROW, where)
    if not isinstance(row.get("title"), str):
        raise UsageError(f"{where} must have a title, in quotes if it is a number, got {row.get('title')!r}")
    paper = row.get("paper")
    if not (paper is None or (isinstance(paper, int | float) and not isinstance(paper, bool))):
        raise UsageError(f"{where}: paper must be a number, got {paper!r}")
    if row.get("against") is not None and row["against"] not in list(rows):
        raise UsageError(f"{where}: against must name a row, got {row['against']!r}: choose one of {', '.join(rows)}")
    if "config" in row and not isinstance(row["config"], str):
        raise UsageError(f"{where}: config must be the name of a configuration, got {row['config']!r}")
    for section in SECTIONS:
        if not isinstance(row.get(section, {}), dict):
            raise UsageError(f"{where}: {section} must be options, got {row[section]!r}")


def _check_after(after: Any, above: list[str], content: Mapping[str, Any], where: str) -> None:
    if after not in above:
        raise UsageError(f"{where}: after must name a row above it, got {after!r}: choose one of {above}")
    if "learning_rates" in content:
        raise UsageError(f"{where}: after {after!r} needs one learning rate: give rows their own, not learning_rates")
    if (program := content.get("program", PROGRAM)) != PROGRAM:
        raise UsageError(f"{where}: after {after!r} needs the program {PROGRAM}, got {program}")


def _known(content: Mapping[Any, Any], known: Iterable[str], where: str, *, more: str = "") -> None:
    for key in content:
        if key not in known:
            near = nearest(str(key), known)
            advice = f"did you mean {near}?" if near else more or f"known are {', '.join(known)}"
            raise UsageError(f"{where} has no option {key!r}: {advice}")
