"""Draw held-out bits per byte against training steps: ``python experiments/curves.py OUT.png RUN RUN ... REFERENCE``.

A run is the folder of a TensorBoard log, or the folder of a row of a sweep, with one such folder for each seed. The
second panel shows what each saves against the last one, seed by seed; bars are standard errors over seeds. The numbers
are printed as a table. Needs matplotlib (the extra ``analysis``).
"""

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memformer_pl.sweeps.markdown import as_markdown
from memformer_pl.sweeps.tables import Spread, spread

TAG = "validation/bits_per_byte"
LOOKS = ("-o", "--s", ":^", "-.d", "-v", "--P", ":X", "-.<")
Curve = Mapping[str, Mapping[int, float]]
"""Bits per byte of one model, by the folder of a seed and by step."""


def curve(run: Path) -> Curve:
    """The validations of a run, or of every seed of a row."""
    seeds = sorted(run.glob("seed_*"))
    return {seed.name: validations(seed) for seed in seeds} if seeds else {"": validations(run)}


def validations(run: Path) -> dict[int, float]:
    """Bits per byte of every validation of a run, by the number of training steps."""
    events = EventAccumulator(str(run))
    if run.is_dir():
        events.Reload()
    if TAG not in events.Tags()["scalars"]:
        raise ValueError(f"{run} has no {TAG}: train with validation")
    return {point.step + 1: point.value for point in events.Scalars(TAG)}


def over_seeds(points: Curve) -> dict[int, Spread]:
    """Mean and error over the seeds, at every step that all of them have."""
    steps = sorted(set.intersection(*(set(bits) for bits in points.values())))
    return {step: spread([bits[step] for bits in points.values()]) for step in steps}


def savings(points: Curve, against: Curve) -> Curve:
    """What a model saves against another one, for the seeds and the steps that both have."""
    shared = points.keys() & against.keys()
    if not shared:
        raise ValueError(f"no seed in common: {', '.join(points)} and {', '.join(against)}")
    return {
        seed: {step: against[seed][step] - bits for step, bits in points[seed].items() if step in against[seed]}
        for seed in sorted(shared)
    }


def draw(axes: Axes, found: Mapping[int, Spread], look: str, label: str) -> None:
    """Draw one curve."""
    means, errors = [s.mean for s in found.values()], [s.error for s in found.values()]
    axes.errorbar(list(found), means, errors, fmt=look, label=label, markersize=4, capsize=2)


def table(heads: Sequence[str], columns: Sequence[Mapping[int, Spread]]) -> str:
    """The curves as a table, with a row for each step."""
    steps = sorted(set().union(*columns))
    cells = [[column[step].formatted(4) if step in column else "" for column in columns] for step in steps]
    return as_markdown(["steps", *heads], [[f"{step:,}", *line] for step, line in zip(steps, cells, strict=True)])


def main(out: Path, runs: list[Path]) -> None:
    """Draw the curves of the runs into one picture, and print them.

    Args:
        out: The picture.
        runs: Folders; the name of a folder, up to a hyphen, is the label of its curve. The others are compared with the
            last one.
    """
    matplotlib.use("Agg")
    figure, (costs, saved) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    curves, labels = [curve(run) for run in runs], [run.name.split("-")[0].replace("_", " ") for run in runs]
    bits = [over_seeds(points) for points in curves]
    differences = [over_seeds(savings(points, curves[-1])) for points in curves[:-1]]
    for axes, columns in ((costs, bits), (saved, differences)):
        for found, label, look in zip(columns, labels, cycle(LOOKS), strict=False):
            draw(axes, found, look, label)
        axes.set_xlabel("steps of training")
        axes.grid(alpha=0.3)
    print(table([*labels, *(f"{label} saves" for label in labels[:-1])], [*bits, *differences]))
    costs.set_ylabel("bits per byte, held-out documents")
    costs.legend()
    saved.set_ylabel(f"saved against {labels[-1]}")
    saved.axhline(0, color="black", linewidth=0.8)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    parser = ArgumentParser(description=main.__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    main(**vars(parser.parse_args()))
