"""Tables: a base configuration, rows that override it, and the results of their runs.

A file of rows (``experiments/table1/digits/rows.yaml``, for example) has these keys:

    base      configurations, stacked: files relative to this one, or names of shipped ones
    seeds     every row is trained with each
    metrics   metrics to show, each with its heading; rows are compared by the first, lower is better. With a metric
              ``test/...`` every run is tested once it is trained
    program   the module whose command ``fit`` trains a row; by default ``memformer_pl``
    learning_rates    every row is trained with each of them and the first seed, and the best with the other seeds
    chosen_by    the metric by which the best rate is chosen; by default the first metric
    better    ``lower`` or ``higher``: which value of that metric is the better one; by default ``lower``
    rows      name and content of each row, in the order of the table:
        title     of the row in the table
        paper     the paper's value, if any
        against   the row that this one is compared with, if any
        after     a row above, if any: the run begins with the weights of that row's run of the same seed
        config    another configuration, between the base and the row's own overrides
        model, data, trainer    overrides

A table is named after the folder of its file, ``mytable`` for ``mytable/rows.yaml``. Its results are beside the file:
``rows.jsonl``, ``rows.md`` and ``rows.png``. The repository's own tables keep results in ``experiments/results/``, and
the table itself in the ``README.md`` beside the rows. An installed package is not written to: its tables keep
everything in ``runs/TABLE/``, or in another folder of runs.
"""

import json
import math
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from memformer_pl.errors import UsageError
from memformer_pl.sweeps import shipped
from memformer_pl.sweeps.checks import PROGRAM, SECTIONS, check_rows, loaded

WITHOUT_EFFECT = ("logger", "num_sanity_val_steps")
"""Options of the trainer that do not change results: where a run logs, and its sanity check."""


class Row(NamedTuple):
    """A row of a table, or what it is with one of the table's learning rates."""

    name: str
    """Of a table with learning rates: ``NAME@RATE``."""
    of: str
    """The name in the file."""
    learning_rate: float | None
    """The table's, if it has them."""
    title: str
    paper: float | None
    against: str | None
    configs: tuple[Path, ...]
    """The base, and the row's ``config``."""
    override: Mapping[str, Any]
    """The row's own options, stacked on ``configs``."""
    after: "Row | None" = None
    """The row with whose weights it begins, if any."""

    @property
    def stacked(self) -> dict[str, Any]:
        """The resulting configuration."""
        return stack(*(loaded(path) for path in self.configs), self.override)

    @property
    def logger(self) -> dict[str, Any]:
        """Class and options of the configuration's logger; empty without one.

        Raises:
            UsageError: The configuration has several loggers, or turns logging off.
        """
        given = self.stacked.get("trainer", {}).get("logger")
        if given is False or not (given is None or isinstance(given, bool | str | dict)):
            raise UsageError(f"row {self.name!r}: trainer.logger must be one logger, or left out, got {given!r}")
        if isinstance(given, str):
            return {"class_path": given}
        return given if isinstance(given, dict) else {}

    @property
    def fingerprint(self) -> str:
        """A hash of every option that results may depend on, also those of the rows before it. Defaults and code are
        not included.
        """
        config = self.stacked
        for name in WITHOUT_EFFECT:
            config.get("trainer", {}).pop(name, None)
        own = _hashed(json.dumps(config, sort_keys=True, default=str))
        return own if self.after is None else _hashed(f"{self.after.fingerprint} {own}")


class Table(NamedTuple):
    """A file of rows."""

    name: str
    """Its folder, such as ``table1/digits``; relative to ``experiments`` if it is inside."""
    seeds: list[int]
    metrics: dict[str, str]
    higher: bool
    """Whether a higher value of ``chosen_by`` is the better one."""
    chosen_by: str
    """The metric that chooses a learning rate."""
    program: str
    """The module whose command ``fit`` trains a row."""
    rows: list[Row]
    ledger: Path
    """Results, one line of JSON for each run."""
    page: Path
    """Markdown file with the table."""
    figure: Path
    """Picture of the table."""

    @property
    def tested(self) -> bool:
        """Whether runs are tested once they are trained."""
        return any(metric.startswith("test/") for metric in self.metrics)


def _hashed(text: str) -> str:
    return blake2b(text.encode(), digest_size=6).hexdigest()


def stack(*configs: Mapping[str, Any]) -> dict[str, Any]:
    """Stack configurations as the command line does: later ones override earlier ones, key by key."""
    stacked: dict[str, Any] = {}
    for config in configs:
        for key, value in config.items():
            below = stacked.get(key)
            # stacking on an empty one copies: the result shares no mapping with its parts
            stacked[key] = stack(below if isinstance(below, dict) else {}, value) if isinstance(value, dict) else value
    return stacked


def read(given: str | Path, *, runs: Path = Path("runs")) -> Table:
    """Load the table of a file of rows.

    Args:
        given: The file, or the name of a shipped one, such as ``recall/copy/rows``.
        runs: The folder of runs.

    Raises:
        UsageError: The file does not exist, or is not a file of rows.
    """
    path = shipped.find(given).resolve()
    content = loaded(path)
    check_rows(content, path)
    base = [_config(name, path) for name in content["base"]]
    rows: list[Row] = []
    for name, row in content["rows"].items():
        configs = (*base, *([_config(row["config"], path)] if "config" in row else []))
        override = {key: value for key, value in row.items() if key in SECTIONS}
        for rate in content.get("learning_rates", [None]):
            full = override if rate is None else stack(override, {"model": {"learning_rate": rate}})
            known = name if rate is None else f"{name}@{rate:g}"
            after = next((above for above in rows if above.name == row.get("after")), None)
            rows.append(
                Row(known, name, rate, row["title"], row.get("paper"), row.get("against"), configs, full, after)
            )
    metrics = {name: str(head) for name, head in content["metrics"].items()}
    higher, program = content.get("better") == "higher", content.get("program", PROGRAM)
    chosen_by = content.get("chosen_by", next(iter(metrics)))
    return Table(_name(path), list(content["seeds"]), metrics, higher, chosen_by, program, rows, *_outputs(path, runs))


def _config(name: str, path: Path) -> Path:
    try:
        found = shipped.find(name, beside=path.parent)
        loaded(found)
    except UsageError as mistake:
        raise UsageError(f"{path}: {mistake}") from mistake
    return found


def _name(path: Path) -> str:
    """The folder of the file; with the name of the file unless that is ``rows``."""
    root = shipped.folder()
    folder = path.parent.relative_to(root).as_posix() if path.is_relative_to(root) else path.parent.name
    return folder if path.stem == "rows" else f"{folder}/{path.stem}"


def _outputs(path: Path, runs: Path) -> tuple[Path, Path, Path]:
    """The paths of results, table and figure of a file of rows."""
    root, name = shipped.folder(), _name(path)
    if path.is_relative_to(root) and shipped.checkout():
        results = root / "results" / name.replace("/", "_")
        return results.with_suffix(".jsonl"), path.parent / "README.md", results.with_suffix(".png")
    beside = runs.absolute() / name / path.name if path.is_relative_to(root) else path
    return beside.with_suffix(".jsonl"), beside.with_suffix(".md"), beside.with_suffix(".png")


def results(table: Table) -> list[dict[str, Any]]:
    """The results whose fingerprints match the present configurations, oldest first.

    Raises:
        UsageError: A line of the file is damaged.
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


def settled(table: Table) -> dict[str, Row]:
    """Each row of the file, with the learning rate that is best by the table's metric at the first seed.

    A rate that diverges, or whose metric is not a number, is worse than every other. Rows of which a rate is still to
    be trained are left out; without learning rates none is.
    """
    sign = 1 if table.higher else -1
    reached = {line["row"]: line.get(table.chosen_by) for line in results(table) if line["seed"] == table.seeds[0]}

    def goodness(row: Row) -> float:
        value = reached[row.name]
        return sign * value if value is not None and value == value else -math.inf

    found = {}
    for name in dict.fromkeys(row.of for row in table.rows):
        candidates = [row for row in table.rows if row.of == name]
        if candidates[0].learning_rate is None:
            found[name] = candidates[0]
        elif all(row.name in reached for row in candidates):
            found[name] = max(candidates, key=goodness)
    return found
