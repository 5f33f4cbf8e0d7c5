"""Make the tables and figures of ``experiments/README.md`` from what sweeps have left:

    python experiments/tables.py experiments/table1/digits/rows.yaml

replaces what stands there between ``<!-- table1/digits -->`` and ``<!-- end -->``, and draws
``experiments/results/table1_digits.png`` (the extra ``analysis``). Nothing of it is typed. Rows that were not trained
are left empty.
"""

import re
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import rows
from rows import EXPERIMENTS, Row, Table

LEDGER = EXPERIMENTS / "README.md"
HEADS = ("", "paper", "paper, difference", "{unit}", "difference", "sign", "parameters", "MFLOP a token", "KiB carried")


class Outcome(NamedTuple):
    """What the seeds of a row came to."""

    row: Row
    by_seed: dict[int, float]
    line: dict[str, Any]
    """The ledger's, of one of them."""


class Spread(NamedTuple):
    """A mean, and its standard error: NaN of a single one."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.error:.4f}" if self.error == self.error else "")


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
            found[row.name] = Outcome(row, {line["seed"]: line[table.metric] for line in own}, own[-1])
    return found


def difference(one: Outcome, other: Outcome) -> Spread | None:
    """How much more a row costs than another, seed by seed: the order of the documents is that of the seed."""
    shared = sorted(one.by_seed.keys() & other.by_seed.keys())
    return spread([one.by_seed[seed] - other.by_seed[seed] for seed in shared]) if shared else None


def verdict(ours: Spread, papers: float) -> str:
    """Whether the paper's sign is found: a difference counts from two standard errors on."""
    if not abs(ours.mean) > 2 * ours.error:
        return "open"
    return "as in the paper" if ours.mean * papers > 0 else "the other way"


def cells(row: Row, table: Table, found: dict[str, Outcome]) -> list[str]:
    """A line of the table."""
    papers = {each.name: each.paper for each in table.rows}
    paper, other = row.paper, papers.get(row.against or "")
    gap = paper - other if paper is not None and other is not None else None
    told = [row.title, f"{paper:.3f}" if paper is not None else "", f"{gap:+.3f}" if gap is not None else ""]
    if row.name not in found:
        return [*told, *[""] * 6]
    own = found[row.name]
    between = difference(own, found[row.against]) if row.against in found else None
    sign = verdict(between, gap) if between and gap else ""
    seeds = f" ({len(own.by_seed)})" if len(own.by_seed) != len(table.seeds) else ""
    return [
        *told,
        f"{spread(list(own.by_seed.values()))}{seeds}",
        f"{between.mean:+.4f} ± {between.error:.4f}" if between else "",
        sign,
        f"{own.line['parameters']:,}",
        f"{own.line['operations_per_token'] / 1e6:.2f}",
        f"{own.line['state_bytes'] / 1024:.1f}",
    ]


def markdown(table: Table) -> str:
    """The whole table. Columns that would be empty are left out."""
    found = outcomes(table)
    lines = [[head.format(unit=table.unit) for head in HEADS], *(cells(row, table, found) for row in table.rows)]
    kept = [n for n in range(len(HEADS)) if any(line[n] for line in lines[1:])]
    seeds = {len(outcome.by_seed) for outcome in found.values()}
    told = [f"| {' | '.join(line[n] for n in kept)} |" for line in lines]
    told.insert(1, "|" + "---|" * len(kept))
    minutes = [outcome.line["processor_seconds"] / 60 for outcome in found.values()]
    if minutes:
        told += ["", f"Seeds: {', '.join(map(str, sorted(seeds)))}. Mean and standard error of the seeds; a run takes "]
        told[-1] += f"{min(minutes):.1f} to {max(minutes):.1f} minutes of one core."
    return "\n".join(told)


def replaced(text: str, table: Table) -> str:
    """The ledger with the table in its place.

    Raises:
        ValueError: It has no such place.
    """
    pattern = rf"(?<=<!-- {re.escape(table.name)} -->\n).*?(?=<!-- end -->)"
    new, places = re.subn(pattern, lambda _: markdown(table) + "\n", text, flags=re.DOTALL)
    if not places:
        raise ValueError(f"{LEDGER} has no place for the table: write <!-- {table.name} --> and <!-- end --> into it")
    return new


def draw(table: Table, out: Path) -> None:
    """A point with its error for each row that was trained, and the seeds beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = list(outcomes(table).values())[::-1]
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.32 * len(found)), layout="constrained")
    for place, outcome in enumerate(found):
        values = list(outcome.by_seed.values())
        own = spread(values)
        axes.plot(values, [place] * len(values), "o", color="#999999", markersize=3)
        axes.errorbar(own.mean, place, xerr=own.error, fmt="o", color="#0072B2", capsize=3)
    axes.set_yticks(range(len(found)), [outcome.row.title for outcome in found])
    axes.set_xlabel(f"{table.unit} (each seed, mean and standard error)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(out, dpi=110)


def main(tables: list[Path], *, figures: bool) -> None:
    """Put the tables of the files into the ledger, and draw them."""
    for path in tables:
        table = rows.read(path)
        LEDGER.write_text(replaced(LEDGER.read_text(), table))
        if figures and outcomes(table):
            draw(table, table.ledger.with_suffix(".png"))


if __name__ == "__main__":
    parser = ArgumentParser(description="Put tables into the ledger, and draw them.")
    parser.add_argument("tables", type=Path, nargs="+", help="files of rows")
    parser.add_argument("--no-figures", dest="figures", action="store_false", help="tables alone")
    main(**vars(parser.parse_args()))
