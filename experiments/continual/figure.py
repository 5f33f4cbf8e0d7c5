"""Draw accuracy against bytes stored, from the results of a sweep of ``experiments/continual``:

    python experiments/continual/figure.py continual/rows experiments/results/continual.png

A panel for each metric; a curve for each method over its budgets, with the standard error over seeds. Methods without a
budget are horizontal lines. Needs matplotlib (the extra ``analysis``).
"""

from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from memformer_pl.sweeps import rows, tables

COLOURS = {"fine_tuning": "#999999", "joint": "#000000", "replay": "#0072B2", "der": "#D55E00", "memo": "#009E73"}
UNALIGNED = " without alignment"
"""How the title of a method ends whose head is not aligned; its curve is dashed."""


class Curve(NamedTuple):
    """The trained rows of a method, in the order of the table."""

    method: str
    budgets: list[int]
    """In bytes; empty for a method without one."""
    reached: list[tables.Outcome]


def curves(found: Mapping[str, tables.Outcome]) -> dict[str, Curve]:
    """The curve of each method that has results, by its title."""
    made: dict[str, Curve] = {}
    for outcome in found.values():
        options, title = outcome.row.stacked["model"], outcome.row.title.partition(", ")[0]
        curve = made.setdefault(title, Curve(options["method"], [], []))
        curve.reached.append(outcome)
        if options["budget"] is not None:
            curve.budgets.append(options["budget"])
    return made


def draw(axes: Axes, found: Mapping[str, Curve], metric: str) -> None:
    """Draw the curves of one metric."""
    for title, curve in found.items():
        spreads = [outcome.spread(metric) for outcome in curve.reached]
        colour = COLOURS[curve.method]
        if curve.budgets:
            kilobytes = [budget / 1000 for budget in curve.budgets]
            means, errors = [each.mean for each in spreads], [each.error for each in spreads]
            style = "s--" if title.endswith(UNALIGNED) else "o-"
            axes.errorbar(kilobytes, means, errors, fmt=style, color=colour, label=title, capsize=2, markersize=4)
        else:
            axes.axhline(spreads[0].mean, linestyle=":", color=colour, label=title)
    axes.set(xscale="log", xlabel="KB stored", ylim=(0, 1.02))
    ticks = sorted({budget / 1000 for curve in found.values() for budget in curve.budgets})
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.25)


def main(table: str, out: Path) -> None:
    """Draw a panel for each metric of a table."""
    read = rows.read(table)
    found = curves(tables.outcomes(read))
    matplotlib.use("Agg")
    count = len(read.metrics)
    figure, panels = plt.subplots(
        1, count, figsize=(2.6 * count + 2.4, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (metric, head) in zip(panels[0], read.metrics.items(), strict=True):
        draw(axes, found, metric)
        axes.set_title(head, fontsize=10)
    panels[0][0].set_ylabel("accuracy")
    figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("table", help="a rows.yaml, or the name of a shipped one")
    parser.add_argument("out", type=Path, help="the picture")
    main(**vars(parser.parse_args()))
