"""Draw accuracy against the bytes that a model carries, from the results of a sweep of ``experiments/recall``:

    python experiments/recall/capacity.py recall/mqar/rows experiments/results/recall_mqar.png \
        --metrics distance/3 distance/7 distance/15 distance/31

A panel for each metric; a point for each row: the mean over seeds that did not diverge, and its standard error as a
bar. A row that carries nothing is at the left edge. Needs matplotlib (the extra ``analysis``).
"""

from argparse import ArgumentParser
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from memformer_pl.sweeps import rows, tables

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD"
NOTHING = 2**-1.5
"""KiB at which a row is drawn that carries none: left of all others."""


def draw(axes: Axes, found: dict[str, tables.Outcome], metric: str) -> None:
    """Draw the points of one metric."""
    for number, outcome in enumerate(found.values()):
        line, reached = next(iter(outcome.lines.values())), outcome.spread(metric)
        axes.errorbar(
            line["state_bytes"] / 1024 or NOTHING,
            reached.mean,
            yerr=reached.error,  # of a single seed there is none
            fmt=MARKERS[number // len(COLOURS)],
            color=COLOURS[number % len(COLOURS)],
            label=f"{outcome.row.title} ({len(outcome.ended)})",
            markersize=6,
            capsize=2,
        )
    axes.set_xscale("log", base=2)
    ticks = [2.0**power for power in range(0, 8, 2)]
    axes.set_xticks([NOTHING, *ticks], ["0", *(f"{tick:g}" for tick in ticks)])
    axes.minorticks_off()
    axes.set(xlabel="KiB carried", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.25)


def main(table: str, out: Path, *, metrics: list[str]) -> None:
    """Draw a panel for each metric of a table."""
    read = rows.read(table)
    found = tables.outcomes(read)
    matplotlib.use("Agg")
    figure, panels = plt.subplots(
        1, len(metrics), figsize=(2.6 * len(metrics) + 3.2, 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, metric in zip(panels[0], metrics, strict=True):
        draw(axes, found, metric)
        axes.set_title(read.metrics[metric], fontsize=10)
    panels[0][0].set_ylabel("accuracy")
    panels[0][-1].legend(
        loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=8, title="row (seeds)", title_fontsize=8
    )
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("table", help="a rows.yaml, or the name of a shipped one")
    parser.add_argument("out", type=Path, help="the picture")
    parser.add_argument("--metrics", nargs="+", required=True, help="one for each panel")
    main(**vars(parser.parse_args()))
