"""Draw what memory saves by position in the document: ``python experiments/loss_by_position.py OUT.png RUN ...
REFERENCE``; with ``--of segment``, by position in the segment.

Each run is the folder of a finished run (``runs/rivals/memformer-.../seed_0``); all must have the same corpus. Their
models read the held-out documents, and the picture shows what each saves against the last one by the number of tokens
before, in the document or in the segment: the mean over documents, and its standard error. The numbers are written
beside the picture as JSON, with the bits per token of every run. Needs matplotlib (the extra ``analysis``).
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

from memformer_pl.analysis.ablation import Step, read
from memformer_pl.checkpoints.pretrained import load_pretrained
from memformer_pl.data.datamodule import SegmentData

BORDERS = {"document": [0, 16, 64, 256, 1024, 4096], "segment": [0, 1, 2, 4, 8, 16, 32]}
"""Where each stretch begins, in tokens; the last one is open-ended."""
SAME = {
    "document": ("corpus", "tokenizer", "validation", "test"),
    "segment": ("corpus", "tokenizer", "validation", "test", "segment_length"),
}
"""Options of the data that runs must share to be compared."""
STYLES = ("-o", "--s", ":^", "-.d", "-v", "--P", ":X", "-.<")


def data_of(run: Path) -> tuple[dict[str, Any], SegmentData]:
    """The data configuration of a run, and the data, opened."""
    config = yaml.safe_load((run / "config.yaml").read_text())["data"]
    options = Options()
    options.add_class_arguments(SegmentData, "data")
    made = options.instantiate(options.parse_object({"data": config})).data
    made.setup()
    return config, made


def bits(run: Path, data: SegmentData, *, of: str) -> tuple[np.ndarray, np.ndarray]:
    """Bits and tokens of each stretch of each document, or of its segments: [documents, stretches]."""
    model = load_pretrained(run / "checkpoints" / "last.ckpt").model
    loader, borders = data.val_dataloader(), BORDERS[of]
    segments = -(-data.packed.validation.lengths // data.segment_length)
    sums = np.zeros((2, len(segments), len(borders)))
    for step in read(model, loader, way="on", segments=segments):
        reads = step.documents >= 0
        before_BL = positions(step, data.segment_length, of=of)[reads]
        at = step.documents[reads, None], np.searchsorted(borders, before_BL, side="right") - 1
        np.add.at(sums[0], at, step.output.token_losses.double().numpy()[reads] / np.log(2))
        np.add.at(sums[1], at, step.segment.target_mask.numpy()[reads])
    return sums[0], sums[1]


def positions(step: Step, segment_length: int, *, of: str) -> np.ndarray:
    """Tokens before each token of a step, in its document or in its segment: [lanes, tokens]."""
    within = np.broadcast_to(np.arange(segment_length), step.segment.tokens.shape)
    return within + segment_length * step.positions[:, None] if of == "document" else within


def savings(costs: np.ndarray, reference: np.ndarray, tokens: np.ndarray, *, of: str) -> list[dict[str, float]]:
    """Bits per token saved in each stretch: mean over the documents that reach it, its standard error, and their
    number.
    """
    found = []
    for stretch, begins in enumerate(BORDERS[of]):
        reach = tokens[:, stretch] > 0
        gains = (reference - costs)[reach, stretch] / tokens[reach, stretch]
        if len(gains) > 1:
            error = gains.std(ddof=1) / len(gains) ** 0.5
            found.append({"begins": begins, "saves": gains.mean(), "error": error, "documents": len(gains)})
    return found


def draw(found: dict[str, list[dict[str, float]]], against: str, out: Path, *, of: str) -> None:
    """Draw a curve for each run."""
    matplotlib.use("Agg")
    borders = BORDERS[of]
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for index, (name, points) in enumerate(found.items()):
        x = [borders.index(point["begins"]) + 0.04 * (index - len(found) / 2) for point in points]
        y, errors = ([point[key] for point in points] for key in ("saves", "error"))
        axes.errorbar(x, y, errors, fmt=STYLES[index % len(STYLES)], markersize=4, capsize=2, label=name)
    ends = [end - 1 for end in borders[1:]]
    labels = [str(begin) if begin == end else f"{begin} to {end}" for begin, end in zip(borders, ends, strict=False)]
    reached = 1 + max(borders.index(point["begins"]) for points in found.values() for point in points)
    axes.set_xticks(range(reached), [*labels, f"{borders[-1]} on"][:reached], fontsize=8)
    axes.set(xlabel=f"tokens before, in the {of}", ylabel=f"bits per token saved against\n{against}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(out, dpi=110)


def main(out: Path, runs: list[Path], *, of: str = "document") -> None:
    """Read with every run's model, write the numbers, and draw them.

    Raises:
        ValueError: The runs were made with different data.
    """
    opened = {run: data_of(run) for run in runs}
    config, _ = opened[runs[-1]]
    if other := [str(run) for run in runs if any(opened[run][0][name] != config[name] for name in SAME[of])]:
        raise ValueError(f"{other} differ from {runs[-1]} in one of {', '.join(SAME[of])}: they cannot be compared")
    costs = {name_of(run): bits(run, data, of=of) for run, (_, data) in opened.items()}
    against = name_of(runs[-1])
    reference, tokens = costs[against]
    found = {name: savings(total, reference, tokens, of=of) for name, (total, _) in costs.items() if name != against}
    reached = tokens.sum(0) > 0
    means = {name: (total.sum(0)[reached] / tokens.sum(0)[reached]).tolist() for name, (total, _) in costs.items()}
    numbers = {"of": of, "borders": BORDERS[of], "against": against, "saves": found, "bits_per_token": means}
    out.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw(found, against, out, of=of)


def name_of(run: Path) -> str:
    """Label of a run: in a sweep, the folder of a seed lies in that of its row."""
    name = run.parent.name.rpartition("-")[0] if run.name.startswith("seed_") else run.name
    return name.replace("_", " ")


if __name__ == "__main__":
    parser = ArgumentParser(description=main.__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="the others are compared with the last one")
    parser.add_argument("--of", choices=list(BORDERS), default="document", help="position in the document or segment")
    main(**vars(parser.parse_args()))
