"""Draw what memory saves by position in the document: ``python experiments/loss_by_position.py OUT.png RUN ...
REFERENCE``.

Each run is the folder of a finished run (``runs/rivals/memformer-.../seed_0``); all must have the same data. Their
models read the held-out documents, and the picture shows what each saves against the last one by the number of segments
before: the mean over documents, and its standard error. The numbers are written beside the picture as JSON. Needs
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

from memformer_pl.analysis.ablation import read
from memformer_pl.checkpoints.pretrained import load_pretrained
from memformer_pl.data.datamodule import SegmentData

BORDERS = [0, 1, 4, 16, 64, 256]
"""Where each stretch of a document begins, in segments; the last one is open-ended."""
STYLES = ("-o", "--s", ":^", "-.d", "-v", "--P", ":X", "-.<")


def data_of(run: Path) -> tuple[dict[str, Any], SegmentData]:
    """The data configuration of a run, and the data, opened."""
    config = yaml.safe_load((run / "config.yaml").read_text())["data"]
    options = Options()
    options.add_class_arguments(SegmentData, "data")
    made = options.instantiate(options.parse_object({"data": config})).data
    made.setup()
    return config, made


def bits(run: Path, data: SegmentData) -> tuple[np.ndarray, np.ndarray]:
    """Bits and tokens of each stretch of each document: [documents, stretches]."""
    model = load_pretrained(run / "checkpoints" / "last.ckpt").model
    loader = data.val_dataloader()
    lengths = -(-data.packed.validation.lengths // data.segment_length)
    sums = np.zeros((2, len(lengths), len(BORDERS)))
    for step in read(model, loader, way="on", segments=lengths):
        reads = step.documents >= 0
        stretch = np.searchsorted(BORDERS, step.positions[reads], side="right") - 1
        losses = step.output.token_losses.double().sum(1).numpy()[reads] / np.log(2)
        np.add.at(sums[0], (step.documents[reads], stretch), losses)
        np.add.at(sums[1], (step.documents[reads], stretch), step.segment.target_mask.sum(1).numpy()[reads])
    return sums[0], sums[1]


def savings(costs: np.ndarray, reference: np.ndarray, tokens: np.ndarray) -> list[dict[str, float]]:
    """Bits per token saved in each stretch: mean over the documents that reach it, its standard error, and their
    number.
    """
    found = []
    for stretch, begins in enumerate(BORDERS):
        reach = tokens[:, stretch] > 0
        gains = (reference - costs)[reach, stretch] / tokens[reach, stretch]
        if len(gains) > 1:
            error = gains.std(ddof=1) / len(gains) ** 0.5
            found.append({"begins": begins, "saves": gains.mean(), "error": error, "documents": len(gains)})
    return found


def draw(found: dict[str, list[dict[str, float]]], against: str, out: Path) -> None:
    """Draw a curve for each run."""
    matplotlib.use("Agg")
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for index, (name, points) in enumerate(found.items()):
        x = [BORDERS.index(point["begins"]) + 0.04 * (index - len(found) / 2) for point in points]
        y, errors = ([point[key] for point in points] for key in ("saves", "error"))
        axes.errorbar(x, y, errors, fmt=STYLES[index % len(STYLES)], markersize=4, capsize=2, label=name)
    ends = [end - 1 for end in BORDERS[1:]]
    labels = [str(begin) if begin == end else f"{begin} to {end}" for begin, end in zip(BORDERS, ends, strict=False)]
    axes.set_xticks(range(len(BORDERS)), [*labels, f"{BORDERS[-1]} on"])
    axes.set(xlabel="segments before", ylabel=f"bits per token saved against\n{against}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(out, dpi=110)


def main(out: Path, runs: list[Path]) -> None:
    """Read with every run's model, write the numbers, and draw them.

    Raises:
        ValueError: The runs were made with different data.
    """
    config, data = data_of(runs[-1])
    if other := [str(run) for run in runs if yaml.safe_load((run / "config.yaml").read_text())["data"] != config]:
        raise ValueError(f"{other} were trained on different data than {runs[-1]}: they cannot be compared")
    costs = {name_of(run): bits(run, data) for run in runs}
    reference, tokens = costs.pop(name_of(runs[-1]))
    found = {name: savings(run_bits, reference, tokens) for name, (run_bits, _) in costs.items()}
    out.with_suffix(".json").write_text(json.dumps({"against": name_of(runs[-1]), "saves": found}, indent=1) + "\n")
    draw(found, name_of(runs[-1]), out)


def name_of(run: Path) -> str:
    """Label of a run: in a sweep, the folder of a seed lies in that of its row."""
    name = run.parent.name.rpartition("-")[0] if run.name.startswith("seed_") else run.name
    return name.replace("_", " ")


if __name__ == "__main__":
    parser = ArgumentParser(description=main.__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="the others are compared with the last one")
    main(**vars(parser.parse_args()))
