"""Draw accuracy against distance: ``python experiments/recall/figure.py OUT.png experiments/results/recall/*.json``.

Each file is the ``distances.json`` that a run of ``experiments/recall`` leaves beside its logs, under the name of its
curve. Runs of one model that differ in their seed alone make one curve: the mean, with every seed as a point. Dotted
lines are those who know less, as the results tell. Needs matplotlib (the extra ``analysis``).
"""

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

TRAINED = 8
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPXd"


class Curve(NamedTuple):
    """The runs of one model."""

    label: str
    distances: list[int]
    accuracies: np.ndarray
    """Of each run at each distance."""


def curves(paths: list[Path]) -> list[Curve]:
    """A curve for each model, in the order in which they are given.

    Raises:
        ValueError: Two runs of one model were asked at other distances.
    """
    runs: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for path in paths:
        result = json.loads(path.read_text())
        runs.setdefault(json.dumps(result["model"]), []).append((path.stem, result))
    found = []
    for own in runs.values():
        asked = {tuple(result["accuracy"]) for _, result in own}
        if len(asked) > 1:
            raise ValueError(f"{[name for name, _ in own]} were asked at different distances: {sorted(asked)}")
        name, first = own[0]
        seeds = f", {len(own)} seeds" if len(own) > 1 else ""
        label = f"{title(first['model'], name)}: {size(first['state_bytes'])}{seeds}"
        rows = np.array([list(result["accuracy"].values()) for _, result in own])
        found.append(Curve(label, [int(distance) for distance in first["accuracy"]], rows))
    return found


def levels(paths: list[Path]) -> dict[str, float]:
    """How often answers are right that know less than all, by name, as far as the results tell."""
    return {name: level for path in paths for name, level in json.loads(path.read_text()).get("levels", {}).items()}


def title(model: dict[str, Any], name: str) -> str:
    """What a curve is called: the class of the model, and what its memory is like."""
    told = {"slots": "slots", "memory_length": "cached tokens", "memory_tokens": "memory tokens"}
    parts = [f"{model[key]} {words}" for key, words in told.items() if key in model]
    return ", ".join([model["class"], *parts]) if model.get("class") else name


def size(state_bytes: int) -> str:
    """Bytes for people."""
    return f"{state_bytes / 1024:.1f} KiB" if state_bytes else "nothing carried"


def main(out: Path, results: list[Path]) -> None:
    """Draw the curves of the results into one picture."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(9, 3.8), layout="constrained")
    longest = 2
    for curve, colour, marker in zip(curves(results), COLOURS, MARKERS, strict=False):
        mean, longest = curve.accuracies.mean(0), max(longest, *curve.distances)
        axes.plot(curve.distances, mean, f"-{marker}", color=colour, label=curve.label, markersize=5, linewidth=1.6)
        if len(curve.accuracies) > 1:
            for row in curve.accuracies:
                axes.plot(curve.distances, row, marker, color=colour, alpha=0.35, markersize=3)
    axes.axvspan(1.8, TRAINED, color="black", alpha=0.06, linewidth=0)
    axes.text(1.9, 1.06, "distances of training", fontsize=9, va="center")
    for name, level in levels(results).items():
        axes.axhline(level, color="black", linewidth=0.8, linestyle=":")
        axes.text(longest * 1.08, level + 0.03, name, fontsize=9, ha="right")
    axes.set_xscale("log", base=2)
    ticks = sorted({distance for curve in curves(results) for distance in curve.distances})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlim=(1.8, longest * 1.1), ylim=(0, 1.12), yticks=(0, 0.25, 0.5, 0.75, 1))
    axes.set(xlabel="segments between what is shown and the answer", ylabel="letters recalled")
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, title="carried in each lane")
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    main(**vars(parser.parse_args()))
