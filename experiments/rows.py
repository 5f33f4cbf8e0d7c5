"""What a table is made of: a base configuration, and rows that override it.

A file of rows (``experiments/table1/digits/rows.yaml`` is one) names

    base      configurations, one upon the other, relative to the file
    seeds     of which every row is trained
    metrics   the figures that are shown, and what each is called; rows are compared by the first, the lower the better
    rows      by name, in the order of the table:
        title     what the row is called in tables
        paper     the paper's figure, if it has one
        against   the row that this one is compared with, if any
        config    a further configuration under the row, relative to the file
        ...       anything else is what a configuration may hold, and overrides the base
"""

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import yaml

EXPERIMENTS = Path(__file__).parent
OWN = ("title", "paper", "against", "config")
"""Keys of a row that are no configuration."""
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
        """The configuration that results, but for what no result depends on."""
        config = stack(*(yaml.safe_load(path.read_text()) for path in self.configs), self.override)
        for name in WITHOUT_EFFECT:
            config.get("trainer", {}).pop(name, None)
        return config

    @property
    def fingerprint(self) -> str:
        """Changes with any value of the configuration that a result may depend on."""
        text = json.dumps(self.stacked, sort_keys=True)
        return blake2b(text.encode(), digest_size=6).hexdigest()


class Table(NamedTuple):
    """All rows of a file."""

    name: str
    """``table1/digits``, by its place below ``experiments``."""
    seeds: list[int]
    metrics: dict[str, str]
    rows: list[Row]

    @property
    def ledger(self) -> Path:
        """Where the results of its runs stand, a line of JSON for each."""
        return EXPERIMENTS / "results" / f"{self.name.replace('/', '_')}.jsonl"


def stack(*configs: Mapping[str, Any]) -> dict[str, Any]:
    """Configurations one upon the other, as the command line stacks them."""
    stacked: dict[str, Any] = {}
    for config in configs:
        for key, value in config.items():
            below = stacked.get(key)
            # what is returned shares no options with what was given
            stacked[key] = stack(below if isinstance(below, dict) else {}, value) if isinstance(value, dict) else value
    return stacked


def read(path: Path) -> Table:
    """The table of a file of rows.

    Raises:
        ValueError: The file is not one, or a row is compared with one that is not there.
    """
    content = yaml.safe_load(path.read_text())
    missing = {"base", "seeds", "metrics", "rows"} - set(content if isinstance(content, dict) else ())
    if missing:
        raise ValueError(f"{path} is no file of rows: it lacks {sorted(missing)}")
    folder = path.resolve().parent
    base = [folder / name for name in content["base"]]
    rows = []
    for name, given in content["rows"].items():
        configs = (*base, *([folder / given["config"]] if "config" in given else []))
        override = {key: value for key, value in given.items() if key not in OWN}
        rows.append(Row(name, given["title"], given.get("paper"), given.get("against"), configs, override))
    unknown = {row.against for row in rows if row.against} - {row.name for row in rows}
    if unknown:
        raise ValueError(f"{path}: rows are compared with {sorted(unknown)}, which are not there")
    name = folder.relative_to(EXPERIMENTS).as_posix()
    return Table(name, list(content["seeds"]), {name: str(head) for name, head in content["metrics"].items()}, rows)


def results(table: Table) -> list[dict[str, Any]]:
    """The lines of its ledger that still belong to its configurations, oldest first."""
    if not table.ledger.exists():
        return []
    lines = [json.loads(line) for line in table.ledger.read_text().splitlines()]
    fingerprints = {row.name: row.fingerprint for row in table.rows}
    return [line for line in lines if line["fingerprint"] == fingerprints.get(line["row"])]
