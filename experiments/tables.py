"""Make the tables and figures of ``experiments/README.md`` from what sweeps have left:

    python experiments/tables.py experiments/table1/digits/rows.yaml

replaces what stands there between ``<!-- table1/digits -->`` and ``<!-- end -->``, and, where a table has one figure
for each row, draws ``experiments/results/table1_digits.png`` (the extra ``analysis``). Nothing of it is typed. Rows
that were not trained are left empty.
"""

import re
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import rows
from rows import Row, Table

LEDGER = Path(__file__).parent / "README.md"


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
    """Of every row of which a seed was trained, in the order of the table; of a run that was repeated, the last."""
    lines = rows.results(table)
    found = {}
    for row in table.rows:
        own = [line for line in lines if line["row"] == row.name and line["seed"] in table.seeds]
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
    told = {"": row.title, "paper": f"{paper:g}" if paper is not None else ""}
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
    """The ledger with the table in its place.

    Raises:
        ValueError: It has no such place.
    """
    pattern = rf"(?<=<!-- {re.escape(table.name)} -->\n).*?(?=<!-- end -->)"
    new, places = re.subn(pattern, lambda _: markdown(table) + "\n", text, count=1, flags=re.DOTALL)
    if not places:
        raise ValueError(f"{LEDGER} has no place for the table: write <!-- {table.name} --> and <!-- end --> into it")
    return new


def draw(table: Table, out: Path) -> None:
    """A point with its error for each row that was trained, and the seeds beside it."""
    import matplotlib

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


def main(tables: list[Path], *, figures: bool) -> None:
    """Put the tables of the files into the ledger, and draw them."""
    for path in tables:
        table = rows.read(path)
        LEDGER.write_text(replaced(LEDGER.read_text(), table))
        if figures and outcomes(table) and len(table.metrics) == 1:
            draw(table, table.ledger.with_suffix(".png"))


if __name__ == "__main__":
    parser = ArgumentParser(description="Put tables into the ledger, and draw them.")
    parser.add_argument("tables", type=Path, nargs="+", help="files of rows")
    parser.add_argument("--no-figures", dest="figures", action="store_false", help="tables alone")
    main(**vars(parser.parse_args()))
