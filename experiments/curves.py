"""Draw held-out bits per byte against windows: ``python experiments/curves.py OUT.png RUN RUN ...``.

Each run is the folder of a TensorBoard log. Needs matplotlib (the extra ``notebooks``).
"""

from pathlib import Path

import matplotlib
from jsonargparse import auto_cli
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAG = "validation/bits_per_byte"


def curve(run: Path) -> tuple[list[int], list[float]]:
    """Windows and bits per byte of every validation of a run."""
    events = EventAccumulator(str(run))
    events.Reload()
    if TAG not in events.Tags()["scalars"]:
        raise ValueError(f"{run} has no {TAG}: was it a run with validation?")
    points = events.Scalars(TAG)
    return [point.step for point in points], [point.value for point in points]


def main(out: Path, runs: list[Path]) -> None:
    """Draw the curves of the runs into one picture.

    Args:
        out: The picture.
        runs: Folders of TensorBoard logs; the name of a folder is the name of its curve.
    """
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for run, style in zip(runs, ("-o", "--s", ":^", "-.d"), strict=False):
        axes.plot(*curve(run), style, label=run.name.replace("_", " "), markersize=4)
    axes.set(xlabel="windows", ylabel="bits per byte, held-out documents")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    auto_cli(main, as_positional=True)
