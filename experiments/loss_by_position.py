"""What memory saves, by place in the document: ``python experiments/places.py OUT.png RUN RUN ... AGAINST``.

Each run is the folder of one that has ended (``runs/rivals/memformer-.../seed_0``); all have the same data. Their
models read the held-out documents once more, and what each saves against the last one is drawn by the segments that
lie before: the mean over documents, and its standard error. The numbers lie beside the picture as JSON. Needs
matplotlib (the extra ``analysis``).
"""

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from jsonargparse import ArgumentParser as Options
from matplotlib import pyplot as plt

from memformer_pl import pretrained
from memformer_pl.analysis.ablation import read
from memformer_pl.data.datamodule import SegmentData

BORDERS = [0, 1, 4, 16, 64, 256]
"""Where each stretch of a document begins, in segments; the last one has no end."""
STYLES = ("-o", "--s", ":^", "-.d", "-v", "--P", ":X", "-.<")


def data_of(run: Path) -> tuple[dict[str, Any], SegmentData]:
    """The data that a run was made with, ready to be read, and how it was configured."""
    configured = yaml.safe_load((run / "config.yaml").read_text())["data"]
    options = Options()
    options.add_class_arguments(SegmentData, "data")
    made = options.instantiate(options.parse_object({"data": configured})).data
    made.setup()
    return configured, made


def bits(run: Path, data: SegmentData) -> tuple[np.ndarray, np.ndarray]:
    """Bits of each document's stretches, and their tokens: [documents, stretches]."""
    model, _ = pretrained.load(run / "checkpoints" / "last.ckpt")
    loader = data.val_dataloader()
    lengths = -(-data.packed.validation.lengths // data.segment_length)
    sums = np.zeros((2, len(lengths), len(BORDERS)))
    for step in read(model, loader, way="on", segments=lengths):
        reads = step.documents >= 0
        stretch = np.searchsorted(BORDERS, step.places[reads], side="right") - 1
        losses = step.reading.token_losses.double().sum(1).numpy()[reads] / np.log(2)
        np.add.at(sums[0], (step.documents[reads], stretch), losses)
        np.add.at(sums[1], (step.documents[reads], stretch), step.segment.target_mask.sum(1).numpy()[reads])
    return sums[0], sums[1]


def savings(own: np.ndarray, against: np.ndarray, tokens: np.ndarray) -> list[dict[str, float]]:
    """Bits a token in each stretch: the mean over the documents that reach it, its standard error, and their number."""
    found = []
    for stretch, begins in enumerate(BORDERS):
        reach = tokens[:, stretch] > 0
        gains = (against - own)[reach, stretch] / tokens[reach, stretch]
        if len(gains) > 1:
            error = gains.std(ddof=1) / len(gains) ** 0.5
            found.append({"begins": begins, "saves": gains.mean(), "error": error, "documents": len(gains)})
    return found


def draw(found: dict[str, list[dict[str, float]]], against: str, out: Path) -> None:
    """A curve for each run."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for place, (name, points) in enumerate(found.items()):
        x = [BORDERS.index(point["begins"]) + 0.04 * (place - len(found) / 2) for point in points]
        y, errors = ([point[key] for point in points] for key in ("saves", "error"))
        axes.errorbar(x, y, errors, fmt=STYLES[place % len(STYLES)], markersize=4, capsize=2, label=name)
    ends = [end - 1 for end in BORDERS[1:]]
    labels = [str(begin) if begin == end else f"{begin} to {end}" for begin, end in zip(BORDERS, ends, strict=False)]
    axes.set_xticks(range(len(BORDERS)), [*labels, f"{BORDERS[-1]} on"])
    axes.set(xlabel="segments that lie before", ylabel=f"bits a token saved against\n{against}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(out, dpi=110)


def main(out: Path, runs: list[Path]) -> None:
    """Read with every run's model, write the numbers, and draw them.

    Raises:
        ValueError: The runs were made with different data.
    """
    configured, data = data_of(runs[-1])
    if other := [str(run) for run in runs if yaml.safe_load((run / "config.yaml").read_text())["data"] != configured]:
        raise ValueError(f"{other} were trained on other data than {runs[-1]}: they cannot be compared")
    costs = {name_of(run): bits(run, data) for run in runs}
    against, tokens = costs.pop(name_of(runs[-1]))
    found = {name: savings(own, against, tokens) for name, (own, _) in costs.items()}
    out.with_suffix(".json").write_text(json.dumps({"against": name_of(runs[-1]), "saves": found}, indent=1) + "\n")
    draw(found, name_of(runs[-1]), out)


def name_of(run: Path) -> str:
    """What a run is called: in a sweep the folder of a seed lies in that of its row."""
    name = run.parent.name.rpartition("-")[0] if run.name.startswith("seed_") else run.name
    return name.replace("_", " ")


if __name__ == "__main__":
    parser = ArgumentParser(description=main.__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="the last one is what others are measured by")
    main(**vars(parser.parse_args()))
