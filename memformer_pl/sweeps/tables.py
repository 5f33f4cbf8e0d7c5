"""Make tables and figures of what sweeps have left. Nothing of them is typed.

A table replaces what stands between ``<!-- NAME -->`` and ``<!-- end -->`` in its page, beside the file of rows; a page
that there is not yet is begun. A table that has one figure for each row is drawn too, which needs the extra
``analysis``. Rows that were not trained are left empty.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from memformer_pl.errors import UsageError
from memformer_pl.sweeps import rows
from memformer_pl.sweeps.rows import Row, Table

NEEDED = ("parameters", "operations_per_token", "state_bytes")
"""What every line of a ledger has, besides its figures."""


class Outcome(NamedTuple):
    """What the seeds of a row came to."""

    row: Row
    lines: dict[int, dict[str, Any]]
    """The ledger's, by seed."""

    def by_seed(self, metric: str) -> dict[int, float]:
        """A figure of every seed."""
        return {seed: line[metric] for seed, line in self.lines.items()}

    def spread(self, metric: str) -> "Spread":
        """Of a figure, over the seeds."""
        return spread(list(self.by_seed(metric).values()))


class Spread(NamedTuple):
    """A mean, and its standard error: NaN of a single one."""

    mean: float
    error: float

    def told(self, digits: int) -> str:
        """For a table."""
        return f"{self.mean:.{digits}f}" + (f" ± {self.error:.{digits}f}" if self.error == self.error else "")


def spread(values: Sequence[float]) -> Spread:
    """Of some numbers."""
    return Spread(mean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan"))


def outcomes(table: Table) -> dict[str, Outcome]:
    """Of every row of which a seed was trained, in the order of the table; of a run that was repeated, the last.

    Raises:
        UsageError: A figure of the table is in no result.
    """
    lines = rows.results(table)
    found = {}
    for row in table.rows:
        own = [line for line in lines if line["row"] == row.name and line["seed"] in table.seeds]
        for line in own:
            if missing := [name for name in (*table.metrics, *NEEDED) if name not in line]:
                logged = ", ".join(name for name in line if "/" in name)
                raise UsageError(
                    f"{table.ledger}: {row.name}, seed {line['seed']}, has no {', '.join(missing)}: choose metrics "
                    f"that were logged ({logged}), or remove the line and train it again"
                )
        if own:
            found[row.name] = Outcome(row, {line["seed"]: line for line in own})
    return found


def difference(one: Outcome, other: Outcome, metric: str) -> Spread | None:
    """How much more a row costs than another, seed by seed: the order of the documents is that of the seed. None where
    there are no two seeds, whose difference would have no error."""
    ones, others = one.by_seed(metric), other.by_seed(metric)
    shared = sorted(ones.keys() & others.keys())
    return spread([ones[seed] - others[seed] for seed in shared]) if len(shared) > 1 else None


def verdict(ours: Spread, papers: float) -> str:
    """Whether the paper's sign is found: a difference counts from two standard errors on."""
    if not abs(ours.mean) > 2 * ours.error:
        return "open"
    return "as in the paper" if ours.mean * papers > 0 else "the other way"


def cells(row: Row, table: Table, found: dict[str, Outcome]) -> dict[str, str]:
    """A line of the table, by the heads of its columns."""
    papers = {each.name: each.paper for each in table.rows}
    paper, other = row.paper, papers.get(row.against or "")
    gap = paper - other if paper is not None and other is not None else None
    told = {"": row.title.replace("|", r"\|"), "paper": f"{paper:g}" if paper is not None else ""}
    told["paper, difference"] = f"{gap:+.3f}" if gap is not None else ""
    if row.name not in found:
        return told
    own, first, digits = found[row.name], next(iter(table.metrics)), 4 if len(table.metrics) == 1 else 3
    between = difference(own, found[row.against], first) if row.against in found else None
    told |= {head: own.spread(metric).told(digits) for metric, head in table.metrics.items()}
    told["difference"] = f"{between.mean:+.4f} ± {between.error:.4f}" if between else ""
    told["sign"] = verdict(between, gap) if between and gap else ""
    line = next(iter(own.lines.values()))
    return {
        **told,
        "seeds": str(len(own.lines)),
        "parameters": f"{line['parameters']:,}",
        "MFLOP a token": f"{line['operations_per_token'] / 1e6:.2f}",
        "KiB carried": f"{line['state_bytes'] / 1024:.1f}",
        "minutes": f"{line['processor_seconds'] / 60:.1f}" if "processor_seconds" in line else "",
    }


def markdown(table: Table) -> str:
    """The whole table. Columns that would be empty are left out."""
    found = outcomes(table)
    lines = [cells(row, table, found) for row in table.rows]
    heads = [head for head in max(lines, key=len) if any(line.get(head) for line in lines)]
    told = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    told += [" | ".join(line.get(head, "") for head in heads) for line in lines]
    below = "Mean and standard error over seeds; minutes are those of one core, for a run."
    return "\n".join([*(f"| {line} |" for line in told), "", below])


def replaced(text: str, table: Table) -> str:
    """A page with the table in its place.

    Raises:
        UsageError: It has no such place.
    """
    pattern = rf"(?<=<!-- {re.escape(table.name)} -->\n).*?(?=<!-- end -->)"
    new, places = re.subn(pattern, lambda _: markdown(table) + "\n", text, count=1, flags=re.DOTALL)
    if not places:
        raise UsageError(f"{table.page} has no place for the table: write {markers(table)!r} into it, on two lines")
    return new


def markers(table: Table) -> str:
    """Where a table is to stand in its page."""
    return f"<!-- {table.name} -->\n<!-- end -->\n"


def draw(table: Table, out: Path) -> None:
    """A point with its error for each row that was trained, and the seeds beside it.

    Raises:
        UsageError: There is no matplotlib.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as missing:
        told = "the figure needs matplotlib: pip install 'memformer-pl[analysis]', or leave it out by --no-figures"
        raise UsageError(told) from missing
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found, (metric, head) = list(outcomes(table).values())[::-1], next(iter(table.metrics.items()))
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.32 * len(found)), layout="constrained")
    for place, outcome in enumerate(found):
        values, own = list(outcome.by_seed(metric).values()), outcome.spread(metric)
        axes.plot(values, [place] * len(values), "o", color="#999999", markersize=3)
        axes.errorbar(own.mean, place, xerr=own.error, fmt="o", color="#0072B2", capsize=3)
    axes.set_yticks(range(len(found)), [outcome.row.title for outcome in found])
    axes.set_xlabel(f"{head} (each seed, mean and standard error)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(out, dpi=110)


def main(tables: list[str], *, runs: Path, figures: bool) -> None:
    """Put the tables into their pages, and draw them.

    Args:
        tables: Files of rows, or names of shipped ones.
        runs: The folder of runs, where the results of shipped tables lie.
        figures: Whether to draw.

    Raises:
        UsageError: A table or what its sweep has left cannot be used.
    """
    for given in tables:
        table = rows.read(given, runs=runs)
        if not outcomes(table):
            raise UsageError(f"{table.ledger} has no results of these rows: python -m memformer_pl sweep {given}")
        page = table.page.read_text(encoding="utf-8") if table.page.exists() else markers(table)
        table.page.write_text(replaced(page, table), encoding="utf-8")
        print(f"Written: {table.page}")
        if figures and len(table.metrics) == 1:
            draw(table, table.figure)
            print(f"Written: {table.figure}")
