"""Draw held-out bits per byte against training rollouts: ``python experiments/curves.py OUT.png RUN RUN ...``.

Each run is the folder of a TensorBoard log; the second panel shows what each saves against the last one. Needs
matplotlib (the extra ``analysis``).
"""

from argparse import ArgumentParser
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TAG = "validation/bits_per_byte"


def curve(run: Path) -> dict[int, float]:
    """Bits per byte of every validation of a run, by the number of training rollouts."""
    events = EventAccumulator(str(run))
    events.Reload()
    if TAG not in events.Tags()["scalars"]:
        raise ValueError(f"{run} has no {TAG}: train with validation")
    return {point.step + 1: point.value for point in events.Scalars(TAG)}


def main(out: Path, runs: list[Path]) -> None:
    """Draw the curves of the runs into one picture.

    Args:
        out: The picture.
        runs: Folders of TensorBoard logs; the name of a folder is the label of its curve. The others are compared with
            the last one.
    """
    matplotlib.use("Agg")
    figure, (costs, savings) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    curves = [curve(run) for run in runs]
    reference = curves[-1]
    for run, points, style in zip(runs, curves, ("-o", "--s", ":^", "-.d"), strict=False):
        costs.plot(points.keys(), points.values(), style, label=run.name.replace("_", " "), markersize=4)
        shared = [step for step in points if step in reference]
        if points is not reference:
            savings.plot(shared, [reference[step] - points[step] for step in shared], style, markersize=4)
    costs.set(xlabel="rollouts of training", ylabel="bits per byte, held-out documents")
    costs.legend()
    savings.set(xlabel="rollouts of training", ylabel=f"saved against {runs[-1].name.replace('_', ' ')}")
    savings.axhline(0, color="black", linewidth=0.8)
    for axes in (costs, savings):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    parser = ArgumentParser(description=main.__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    main(**vars(parser.parse_args()))
