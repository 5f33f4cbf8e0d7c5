"""Make tables and figures from the results of sweeps.

A table replaces the text between ``<!-- NAME -->`` and ``<!-- end -->`` in its page, beside the file of rows; a missing
page is created. A table with one metric is also drawn, which needs the extra ``analysis``. Rows without results stay
empty.
"""

import re
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from memformer_pl.errors import UsageError
from memformer_pl.sweeps import rows
from memformer_pl.sweeps.markdown import as_markdown
from memformer_pl.sweeps.rows import Row, Table

NEEDED = ("parameters",)
"""What every result has besides its metrics."""
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "operations_per_token": ("MFLOP a token", lambda value: f"{value / 1e6:.2f}"),
    "state_bytes": ("KiB carried", lambda value: "grows" if value is None else f"{value / 1024:.1f}"),
    "stored_bytes": ("KB stored", lambda value: f"{value / 1000:,.0f}"),
    "exemplars": ("exemplars", lambda value: f"{value:,}"),
    "processor_seconds": ("minutes", lambda value: f"{value / 60:.1f}"),
}
"""Further columns of results that have them: heading, and how a value is written."""


class Outcome(NamedTuple):
    """The results of a row."""

    row: Row
    lines: dict[int, dict[str, Any]]
    """By seed."""

    @property
    def ended(self) -> dict[int, dict[str, Any]]:
        """The results of the runs that did not diverge, by seed."""
        return {seed: line for seed, line in self.lines.items() if not line.get("diverged")}

    @property
    def overflowed(self) -> list[int]:
        """The seeds of runs that ended with a loss that is not a finite number, whatever their other metrics are."""
        losses = {seed: [line[name] for name in line if name.endswith("/loss")] for seed, line in self.ended.items()}
        return [seed for seed, values in losses.items() if not all(map(isfinite, values))]

    def by_seed(self, metric: str) -> dict[int, float]:
        """A metric of every seed whose run did not diverge."""
        return {seed: line[metric] for seed, line in self.ended.items()}

    def spread(self, metric: str) -> "Spread":
        """Mean and error of a metric over the seeds."""
        return spread(list(self.by_seed(metric).values()))


class Spread(NamedTuple):
    """A mean and its standard error, which is NaN for a single value; both are for none."""

    mean: float
    error: float

    def formatted(self, digits: int) -> str:
        """As a cell of a table."""
        return f"{self.mean:.{digits}f}" + (f" ± {self.error:.{digits}f}" if self.error == self.error else "")


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard error of values."""
    nan = float("nan")
    return Spread(mean(values) if values else nan, stdev(values) / len(values) ** 0.5 if len(values) > 1 else nan)


def outcomes(table: Table) -> dict[str, Outcome]:
    """The results of every trained row, in the order of the table. The last run of a seed counts.

    A row of a table with learning rates has results once the best of them is known: those with this rate.

    Raises:
        UsageError: A metric of the table is missing in a result.
    """
    lines = rows.results(table)
    found = {}
    for name, row in rows.settled(table).items():
        matching = [line for line in lines if line["row"] == row.name and line["seed"] in table.seeds]
        for line in matching:
            metrics = () if line.get("diverged") else table.metrics
            if missing := [name for name in (*metrics, *NEEDED) if name not in line]:
                logged = ", ".join(name for name in line if "/" in name)
                raise UsageError(
                    f"{table.ledger}: {row.name}, seed {line['seed']}, has no {', '.join(missing)}: choose metrics "
                    f"that were logged ({logged}), or remove the line and train again"
                )
        if matching:
            found[name] = Outcome(row, {line["seed"]: line for line in matching})
    return found


def difference(one: Outcome, other: Outcome, metric: str) -> Spread | None:
    """How much a row exceeds another, paired by seed, since a seed fixes the order of documents.

    None for fewer than two shared seeds: the difference would have no error.
    """
    ones, others = one.by_seed(metric), other.by_seed(metric)
    shared = sorted(ones.keys() & others.keys())
    return spread([ones[seed] - others[seed] for seed in shared]) if len(shared) > 1 else None


def verdict(ours: Spread, papers: float) -> str:
    """Compare the sign of a difference with the paper's; below two standard errors it is open."""
    if not abs(ours.mean) > 2 * ours.error:
        return "open"
    return "as in the paper" if ours.mean * papers > 0 else "the other way"


def cells(row: Row, table: Table, found: dict[str, Outcome]) -> dict[str, str]:
    """The cells of a row, by the headings of their columns."""
    papers = {each.of: each.paper for each in table.rows}
    paper, other = row.paper, papers.get(row.against or "")
    gap = paper - other if paper is not None and other is not None else None
    row_cells = {"": row.title, "paper": f"{paper:g}" if paper is not None else ""}
    row_cells["paper, difference"] = f"{gap:+.3f}" if gap is not None else ""
    if row.of not in found:
        return row_cells
    outcome, first, digits = found[row.of], next(iter(table.metrics)), 4 if len(table.metrics) == 1 else 3
    between = difference(outcome, found[row.against], first) if row.against in found else None
    reached = {metric: outcome.spread(metric).formatted(digits) for metric in table.metrics if outcome.ended}
    row_cells |= {head: reached.get(metric, "diverged") for metric, head in table.metrics.items()}
    row_cells["difference"] = f"{between.mean:+.4f} ± {between.error:.4f}" if between else ""
    row_cells["sign"] = verdict(between, gap) if between and gap else ""
    line = next(iter(outcome.lines.values()))
    return {
        **row_cells,
        "learning rate": f"{outcome.row.learning_rate:g}" if outcome.row.learning_rate else "",
        "seeds": str(len(outcome.lines)),
        "diverged": str(len(outcome.lines) - len(outcome.ended) or ""),
        "loss not finite": str(len(outcome.overflowed) or ""),
        "parameters": f"{line['parameters']:,}",
        **{head: written(line[name]) for name, (head, written) in COLUMNS.items() if name in line},
    }


def markdown(table: Table) -> str:
    """The table in Markdown, without empty columns."""
    found = outcomes(table)
    lines = [cells(row, table, found) for row in {row.of: row for row in table.rows}.values()]
    heads = [head for head in max(lines, key=len) if any(line.get(head) for line in lines)]
    grid = as_markdown(heads, [[line.get(head, "") for head in heads] for line in lines])
    return f"{grid}\n\nMean and standard error over seeds; minutes are those of one core, for a run."


def replaced(text: str, table: Table) -> str:
    """The text of a page with the table between its markers.

    Raises:
        UsageError: The page lacks the markers.
    """
    pattern = rf"(?<=<!-- {re.escape(table.name)} -->\n).*?(?=<!-- end -->)"
    new, found = re.subn(pattern, lambda _: markdown(table) + "\n", text, count=1, flags=re.DOTALL)
    if not found:
        raise UsageError(f"{table.page} has no markers for the table: add {markers(table)!r}, on two lines")
    return new


def markers(table: Table) -> str:
    """The lines between which a page holds the table."""
    return f"<!-- {table.name} -->\n<!-- end -->\n"


def draw(table: Table, out: Path) -> None:
    """Draw each trained row as a point with its error, and its seeds.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as missing:
        raise UsageError(
            "the figure needs matplotlib: pip install 'memformer-pl[analysis]', or add --no-figures"
        ) from missing
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found, (metric, head) = list(outcomes(table).values())[::-1], next(iter(table.metrics.items()))
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.32 * len(found)), layout="constrained")
    for y, outcome in enumerate(found):
        values, summary = list(outcome.by_seed(metric).values()), outcome.spread(metric)
        axes.plot(values, [y] * len(values), "o", color="#999999", markersize=3)
        axes.errorbar(summary.mean, y, xerr=summary.error, fmt="o", color="#0072B2", capsize=3)
    axes.set_yticks(range(len(found)), [outcome.row.title for outcome in found])
    axes.set_xlabel(f"{head} (each seed, mean and standard error)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(out, dpi=110)


def main(tables: list[str], *, runs: Path, figures: bool) -> None:
    """Write tables into their pages, and draw them.

    Args:
        tables: Files of rows, or names of shipped ones.
        runs: The folder of runs, with the results of an installed package's tables.
        figures: Whether to draw.

    Raises:
        UsageError: A table is invalid, has no results, or has damaged ones.
    """
    for given in tables:
        table = rows.read(given, runs=runs)
        if not outcomes(table):
            found = "no row whose learning rates are all trained" if rows.results(table) else "no results of these rows"
            raise UsageError(f"{table.ledger} has {found}: python -m memformer_pl sweep {given}")
        page = table.page.read_text(encoding="utf-8") if table.page.exists() else markers(table)
        table.page.write_text(replaced(page, table), encoding="utf-8")
        print(f"Written: {table.page}")
        if figures and len(table.metrics) == 1:
            draw(table, table.figure)
            print(f"Written: {table.figure}")
