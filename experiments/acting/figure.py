"""Draw the return of a table's rows against the steps of the games that they have played, or imitated:

    python experiments/acting/figure.py acting/rows runs experiments/results/acting_repeat_first.png

A row has one curve, the mean over its seeds, and a band from the lowest to the highest; the TensorBoard logs are those
of the folder of runs in which ``sweep`` trained it. Needs matplotlib (the extra ``analysis``).
"""

from argparse import ArgumentParser
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memformer_pl.acting.environments import TokenEnvironment
from memformer_pl.sweeps import rows, tables
from memformer_pl.sweeps.runner import Run

TAG = "validation/return"


def curve(run: Run) -> dict[float, float]:
    """The return of a run by the thousands of steps of its games."""
    config = run.row.stacked
    data, epochs = config["data"], config["model"]["acting"].get("epochs", 1)
    steps = data["batch_size"] * TokenEnvironment(data["corpus"]["init_args"]["environment"]).steps / epochs / 1000
    events = EventAccumulator(str(run.folder)).Reload()
    return {(point.step + 1) * steps: point.value for point in events.Scalars(TAG)}


def main(name: str, runs: Path, out: Path) -> None:
    """Draw a curve for each row that has results.

    Args:
        name: A file of rows, or the name of a shipped one.
        runs: Folder of runs.
        out: The picture.
    """
    table = rows.read(name)
    found = [outcome for outcome in tables.outcomes(table).values() if outcome.ended]
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for number, outcome in enumerate(found):
        curves = [curve(Run(table, outcome.row, seed, runs)) for seed in outcome.ended]
        steps = sorted(set.intersection(*(set(points) for points in curves)))
        values = np.array([[points[step] for step in steps] for points in curves])
        (line,) = axes.plot(steps, values.mean(0), "-o", markersize=3, label=outcome.row.title, color=f"C{number}")
        axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2)
    environments = {outcome.row.stacked["data"]["corpus"]["init_args"]["environment"] for outcome in found}
    title = ", ".join(sorted(environments))
    axes.set(title=title, xlabel="thousand steps of games", ylabel="return of held-out episodes")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", metavar="TABLE")
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    main(**vars(parser.parse_args()))
