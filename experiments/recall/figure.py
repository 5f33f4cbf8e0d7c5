"""Draw accuracy against distance from the results of a sweep of ``experiments/recall``:

    python experiments/recall/figure.py experiments/recall/copy/rows.yaml experiments/results/recall_copy.png

A curve is the mean over seeds, with every seed as a point; a dotted line is the accuracy of a predictor with partial
knowledge. Needs matplotlib (the extra ``analysis``).
"""

from argparse import ArgumentParser
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from memformer_pl import data
from memformer_pl.sweeps import rows, tables

TRAINED = 8
MARKERS = "osD^vPX"  # seven, so that with the ten colours of the style no pair comes again


class Curve(NamedTuple):
    """The runs of one row."""

    label: str
    distances: list[int]
    accuracies: np.ndarray
    """Accuracy of each run at each distance."""


def curves(table: rows.Table) -> list[Curve]:
    """A curve for each row of which a run ended without diverging."""
    found = []
    for outcome in tables.outcomes(table).values():
        lines = list(outcome.ended.values())
        if not lines:
            continue
        seeds = f", {len(lines)} seeds" if len(lines) > 1 else ""
        label = f"{outcome.row.title}: {size(lines[0]['state_bytes'])}{seeds}"
        accuracies = np.array([[line[metric] for metric in table.metrics] for line in lines])
        found.append(Curve(label, [int(head) for head in table.metrics.values()], accuracies))
    return found


def baselines(table: rows.Table) -> dict[str, float]:
    """Accuracy of predictors with partial knowledge, as the corpus defines them."""
    corpus = table.rows[0].stacked["data"]["corpus"]
    return dict(getattr(data, corpus["class_path"])(**corpus["init_args"]).baselines)


def size(state_bytes: int) -> str:
    """Format a number of bytes."""
    return f"{state_bytes / 1024:.1f} KiB" if state_bytes else "no state"


def main(path: Path, out: Path) -> None:
    """Draw the curves of a table into one picture."""
    table = rows.read(path)
    drawn = curves(table)
    matplotlib.use("Agg")
    plt.style.use("petroff10")
    figure, axes = plt.subplots(figsize=(9, 3.8), layout="constrained")
    longest = 2
    for number, (curve, marker) in enumerate(zip(drawn, cycle(MARKERS), strict=False)):
        colour = f"C{number % 10}"
        mean, longest = curve.accuracies.mean(0), max(longest, *curve.distances)
        axes.plot(curve.distances, mean, f"-{marker}", color=colour, label=curve.label, markersize=5, linewidth=1.6)
        if len(curve.accuracies) > 1:
            for row in curve.accuracies:
                axes.plot(curve.distances, row, marker, color=colour, alpha=0.35, markersize=3)
    axes.axvspan(1.8, TRAINED, color="black", alpha=0.06, linewidth=0)
    axes.text(1.9, 1.06, "distances of training", fontsize=9, va="center")
    for name, level in baselines(table).items():
        axes.axhline(level, color="black", linewidth=0.8, linestyle=":")
        axes.text(longest * 1.08, level + 0.03, name, fontsize=9, ha="right")
    axes.set_xscale("log", base=2)
    ticks = sorted({distance for curve in drawn for distance in curve.distances})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlim=(1.8, longest * 1.1), ylim=(0, 1.12), yticks=(0, 0.25, 0.5, 0.75, 1))
    axes.set(xlabel="segments between what is shown and the answer", ylabel="accuracy")
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, title="state of a lane")
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("path", type=Path, metavar="table", help="a rows.yaml, or the name of a shipped one")
    parser.add_argument("out", type=Path, help="the picture")
    main(**vars(parser.parse_args()))
