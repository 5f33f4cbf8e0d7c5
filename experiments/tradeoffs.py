r"""Draw what each row of a table reaches against what it costs, from the results of a sweep:

    python experiments/tradeoffs.py recall/mqar/rows experiments/results/recall_mqar.png \
        --metrics distance/3 distance/7 distance/15 distance/31 --label accuracy
    python experiments/tradeoffs.py lead/rows experiments/results/lead.png \
        --metrics test/bits_per_byte --costs carried operations parameters

A panel for each metric and cost; a point for each row: the mean over seeds that did not diverge, and its standard error
as a bar. A row that carries more with every token is left out where the cost is what is carried.
Needs matplotlib (the extra ``analysis``).
"""

from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from memformer_pl.sweeps import rows, tables

COLOURS = 10
"""Of the style ``petroff10``."""
MARKERS = "osD"


class Cost(NamedTuple):
    """What the x axis of a panel shows."""

    heading: str
    field: str
    """Of a line of results."""
    unit: float
    """In the unit of the field."""


COSTS = {
    "carried": Cost("KiB carried", "state_bytes", 2**10),
    "operations": Cost("MFLOP a token", "operations_per_token", 1e6),
    "parameters": Cost("million parameters", "parameters", 1e6),
}


def draw(axes: Axes, found: Iterable[tables.Outcome], metric: str, cost: Cost) -> None:
    """Draw the points of a panel."""
    for number, outcome in enumerate(outcome for outcome in found if outcome.ended):
        line, reached = next(iter(outcome.ended.values())), outcome.spread(metric)
        if line[cost.field] is None:
            continue
        axes.errorbar(
            line[cost.field] / cost.unit,
            reached.mean,
            yerr=reached.error,  # of a single seed there is none
            fmt=MARKERS[number // COLOURS],
            color=f"C{number % COLOURS}",
            label=f"{outcome.row.title} ({len(outcome.ended)})",
            markersize=6,
            capsize=2,
        )
    axes.set_xlabel(cost.heading)
    axes.grid(alpha=0.25)
    if cost is COSTS["carried"]:
        axes.set_xscale("symlog", base=2, linthresh=1, linscale=1.5)  # from 0 to 1 KiB linear
        ticks = [0, 1, 4, 16, 64, 256]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()


def main(table: str, out: Path, *, metrics: list[str], costs: list[str], label: str | None = None) -> None:
    """Draw a panel for each metric of a table and each cost."""
    read = rows.read(table)
    found = tables.outcomes(read)
    matplotlib.use("Agg")
    plt.style.use("petroff10")
    pairs = [(metric, COSTS[cost]) for metric in metrics for cost in costs]
    figure, panels = plt.subplots(
        1, len(pairs), figsize=(2.6 * len(pairs) + 3.2, 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (metric, cost) in zip(panels[0], pairs, strict=True):
        draw(axes, found.values(), metric, cost)
        if len(metrics) > 1:
            axes.set_title(read.metrics[metric], fontsize=10)
    panels[0][0].set_ylabel(read.metrics[metrics[0]] if label is None else label)
    panels[0][-1].legend(
        loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=8, title="row (seeds)", title_fontsize=8
    )
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("table", help="a rows.yaml, or the name of a shipped one")
    parser.add_argument("out", type=Path, help="the picture")
    parser.add_argument("--metrics", nargs="+", required=True, help="one for each panel")
    parser.add_argument("--costs", nargs="+", choices=COSTS, default=["carried"], help="the x axes; default: carried")
    parser.add_argument("--label", help="of the y axis; default: the heading of the first metric")
    main(**vars(parser.parse_args()))
