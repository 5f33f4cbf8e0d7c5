"""What a table is made of: a base configuration, and rows that override it.

A file of rows (``experiments/table1/digits/rows.yaml`` is one) names

    base      configurations, one upon the other: relative to the file, or by the names of shipped ones
    seeds     of which every row is trained
    metrics   the figures that are shown, and what each is called; rows are compared by the first, the lower the better
    rows      by name, in the order of the table:
        title     what the row is called in tables
        paper     the paper's figure, if it has one
        against   the row that this one is compared with, if any
        config    a further configuration under the row, as in the base
        model, data, trainer    override the base

A table is called by the folder of its file, ``mytable`` for ``mytable/rows.yaml``. Its results lie beside the file
under the same name: ``rows.jsonl``, ``rows.md`` and ``rows.png``. Those of this repository's tables lie in
``experiments/results/``, and the tables stand in the ``README.md`` beside their rows. An installed package is not
written to: the results of a table that came with it lie in ``runs/TABLE/``, or below another folder of runs.
"""

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from memformer_pl.errors import UsageError
from memformer_pl.sweeps import shipped
from memformer_pl.sweeps.checks import SECTIONS, check_rows, loaded

WITHOUT_EFFECT = ("logger", "num_sanity_val_steps")
"""Options of the trainer that say where a run logs, and how much it reads to try out validation before it trains."""


class Row(NamedTuple):
    """A line of a table."""

    name: str
    title: str
    paper: float | None
    against: str | None
    configs: tuple[Path, ...]
    """The base and what the row names, one upon the other."""
    override: Mapping[str, Any]
    """What lies upon them."""

    @property
    def stacked(self) -> dict[str, Any]:
        """The configuration that results."""
        return stack(*(loaded(path) for path in self.configs), self.override)

    @property
    def logger(self) -> dict[str, Any]:
        """The class and the options of the logger that the configuration names; empty where it names none.

        Raises:
            UsageError: It names several, or wants none.
        """
        given = self.stacked.get("trainer", {}).get("logger")
        if given is False or not (given is None or isinstance(given, bool | str | dict)):
            raise UsageError(f"row {self.name!r}: trainer.logger must be one logger, or left out, got {given!r}")
        if isinstance(given, str):
            return {"class_path": given}
        return given if isinstance(given, dict) else {}

    @property
    def fingerprint(self) -> str:
        """Changes with any value of the configuration that a result may depend on; not with defaults, nor with code."""
        config = self.stacked
        for name in WITHOUT_EFFECT:
            config.get("trainer", {}).pop(name, None)
        text = json.dumps(config, sort_keys=True, default=str)
        return blake2b(text.encode(), digest_size=6).hexdigest()


class Table(NamedTuple):
    """All rows of a file."""

    name: str
    """``table1/digits``: its folder, below ``experiments`` if it is there."""
    seeds: list[int]
    metrics: dict[str, str]
    rows: list[Row]
    ledger: Path
    """Where the results of its runs stand, a line of JSON for each."""
    page: Path
    """Where the table stands, in Markdown."""
    figure: Path
    """Where it is drawn."""


def stack(*configs: Mapping[str, Any]) -> dict[str, Any]:
    """Configurations one upon the other, as the command line stacks them."""
    stacked: dict[str, Any] = {}
    for config in configs:
        for key, value in config.items():
            below = stacked.get(key)
            # what is returned shares no options with what was given
            stacked[key] = stack(below if isinstance(below, dict) else {}, value) if isinstance(value, dict) else value
    return stacked


def read(given: str | Path, *, runs: Path = Path("runs")) -> Table:
    """The table of a file of rows.

    Args:
        given: The file, or the name of a shipped one, for example ``recall/rows``.
        runs: The folder of runs.

    Raises:
        UsageError: The file is not one.
    """
    path = shipped.find(given).resolve()
    content = loaded(path)
    check_rows(content, path)
    base = [_config(name, path) for name in content["base"]]
    rows = []
    for name, row in content["rows"].items():
        configs = (*base, *([_config(row["config"], path)] if "config" in row else []))
        override = {key: value for key, value in row.items() if key in SECTIONS}
        rows.append(Row(name, row["title"], row.get("paper"), row.get("against"), configs, override))
    metrics = {name: str(head) for name, head in content["metrics"].items()}
    return Table(_name(path), list(content["seeds"]), metrics, rows, *_places(path, runs))


def _config(name: str, path: Path) -> Path:
    try:
        found = shipped.find(name, beside=path.parent)
        loaded(found)
    except UsageError as mistake:
        raise UsageError(f"{path}: {mistake}") from mistake
    return found


def _name(path: Path) -> str:
    """A second file of rows in a folder is called by its own name too."""
    root = shipped.folder()
    folder = path.parent.relative_to(root).as_posix() if path.is_relative_to(root) else path.parent.name
    return folder if path.stem == "rows" else f"{folder}/{path.stem}"


def _places(path: Path, runs: Path) -> tuple[Path, Path, Path]:
    """Where results, table and figure of a file of rows are."""
    root, name = shipped.folder(), _name(path)
    if path.is_relative_to(root) and shipped.checkout():
        results = root / "results" / name.replace("/", "_")
        return results.with_suffix(".jsonl"), path.parent / "README.md", results.with_suffix(".png")
    beside = runs.absolute() / name / path.name if path.is_relative_to(root) else path
    return beside.with_suffix(".jsonl"), beside.with_suffix(".md"), beside.with_suffix(".png")


def results(table: Table) -> list[dict[str, Any]]:
    """The lines of its ledger that still belong to its configurations, oldest first.

    Raises:
        UsageError: A line was damaged.
    """
    if not table.ledger.exists():
        return []
    lines = []
    for number, text in enumerate(table.ledger.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            lines.append((line["row"], line["seed"], line["fingerprint"], line))
        except (ValueError, TypeError, KeyError) as error:
            where = f"{table.ledger}, line {number}"
            raise UsageError(f"{where} is not the result of a run ({error}): remove the line") from error
    fingerprints = {row.name: row.fingerprint for row in table.rows}
    return [line for row, _, fingerprint, line in lines if fingerprint == fingerprints.get(row)]
