"""Draw the return of runs against the steps they have played: ``python experiments/acting/figure.py RUNS OUT.png``.

A run is a folder of a TensorBoard log below ``RUNS``; runs that differ in their seed alone have one curve, their mean,
and a band from the lowest to the highest. Needs matplotlib (the extra ``analysis``).
"""

from argparse import ArgumentParser
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import yaml
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memformer_pl.acting.environments import TokenEnvironment

TAG = "validation/return"


def curve(run: Path) -> tuple[str, dict[int, float]]:
    """The environment of a run, and its return by the steps that all lanes had played."""
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    name = data["corpus"]["init_args"]["environment"]
    steps = data["batch_size"] * TokenEnvironment(name).steps
    events = EventAccumulator(str(run)).Reload()
    if TAG not in events.Tags()["scalars"]:
        raise ValueError(f"{run} has no {TAG}: train with validation")
    return name, {(point.step + 1) * steps: point.value for point in events.Scalars(TAG)}


def main(runs: Path, out: Path) -> None:
    """Draw a curve for each folder that holds the runs of all seeds.

    Args:
        runs: Folder of ``ROW-HASH/seed_N/``, as a sweep leaves it.
        out: The picture.
    """
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    rows: dict[str, list[dict[int, float]]] = defaultdict(list)
    for config in sorted(runs.rglob("config.yaml")):
        name, points = curve(config.parent)
        row, _, _ = config.parent.relative_to(runs).parts[0].rpartition("-")  # a hash of its configuration follows
        rows[row].append(points)
        axes.set(title=name, xlabel="steps played", ylabel="return of held-out episodes")
    if not rows:
        raise ValueError(f"{runs} has no run: train some with `sweep`")
    for row, curves in rows.items():
        steps = sorted(set.intersection(*(set(points) for points in curves)))
        values = np.array([[points[step] for step in steps] for points in curves])
        (line,) = axes.plot(steps, values.mean(0), "-o", markersize=3, label=row.replace("_", " "))
        axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("out", type=Path)
    main(**vars(parser.parse_args()))
