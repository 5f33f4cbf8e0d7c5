"""What a run has learned, in words and beside yardsticks that everybody has: gzip, xz and a table of byte pairs."""

import csv
import gzip
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from memformer_pl.recurrence import SegmentModel
from memformer_pl.task import SegmentTask, lanes_of

Sizes = Float[np.ndarray, " documents"]


class Costs(NamedTuple):
    """Bits that each held-out document takes, by the means that is used."""

    sizes: Sizes
    """In bytes."""
    with_memory: Sizes
    memory_reset: Sizes | None
    """None for a model that has no memory."""
    gzip: Sizes
    xz: Sizes
    byte_pairs: float
    """Bits per byte, see :func:`byte_pair_entropy`."""


class ClosingReport(Callback):
    """Print at the end of training what held-out documents cost, and write it to ``documents.csv`` beside the logs.

    The documents are those of the validation. The model reads them twice: once as it is, and once with its memory reset
    at every segment, which shows how much *this* model leans on its memory. Whether memory pays is another question:
    for that, train the twin without it and compare the two files with ``experiments/compare.py``.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the documents, then report."""
        if trainer.val_dataloaders is None or trainer.interrupted:
            return
        assert isinstance(pl_module, SegmentTask)
        costs = measure(pl_module, trainer)
        if trainer.is_global_zero:
            for line in describe(costs):
                Console().print(line)
            if trainer.log_dir is not None:
                write(Path(trainer.log_dir) / "documents.csv", costs)


def measure(task: SegmentTask, trainer: Trainer) -> Costs:
    """What every validation document costs the model, and the yardsticks."""
    loader = lanes_of(trainer.val_dataloaders)
    bits = [
        task.read_documents(loader, forget=forget).compute()[0].cpu().numpy() / np.log(2)
        for forget in ((False, True) if has_memory(task.model) else (False,))
    ]
    tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]  # set where a datamodule is given
    decoded = (tokenizer.decode(loader.documents.document(index)) for index in range(len(loader.documents)))
    texts = [text.encode("utf-8", "surrogateescape") for text in decoded]
    return Costs(
        sizes=loader.documents.bytes.astype(np.float64),
        with_memory=bits[0],
        memory_reset=bits[1] if len(bits) > 1 else None,
        gzip=np.array([8.0 * len(gzip.compress(text, 9)) for text in track(texts, "gzip", transient=True)]),
        xz=np.array([8.0 * len(lzma.compress(text, preset=9)) for text in track(texts, "xz", transient=True)]),
        byte_pairs=byte_pair_entropy(texts),
    )


def has_memory(model: SegmentModel) -> bool:
    """Whether the model carries numbers that it has computed, not only tokens that are still to be read."""
    return any(field.is_floating_point() and field.numel() for field in model.initial_state(1))


def byte_pair_entropy(texts: Sequence[bytes]) -> float:
    """Bits that a byte costs who knows the byte before it, and how often each pair occurs in these very texts."""
    pairs = np.zeros((256, 256))
    for text in texts:
        codes = np.frombuffer(text, dtype=np.uint8)
        np.add.at(pairs, (codes[:-1], codes[1:]), 1)
    seen = pairs[pairs > 0]
    before = np.broadcast_to(pairs.sum(1, keepdims=True), pairs.shape)[pairs > 0]
    return float(-(seen * np.log2(seen / before)).sum() / max(seen.sum(), 1))


def paired_gain(worse: Sizes, better: Sizes, sizes: Sizes) -> tuple[float, float]:
    """How many bits per byte ``better`` saves: the mean over documents, and its standard error."""
    gains = (worse - better) / sizes
    return float(gains.mean()), float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else float("nan")


def describe(costs: Costs) -> list[str | Table]:
    """The report, for a terminal."""
    table = Table("", "bits per byte", title="What the model has learned", title_justify="left")
    rows: list[tuple[str, Sizes | None]] = [
        ("this model", costs.with_memory),
        ("this model, memory reset at every segment", costs.memory_reset),
        ("gzip -9, each document by itself", costs.gzip),
        ("xz -9, each document by itself", costs.xz),
    ]
    for name, bits in rows:
        if bits is not None:
            table.add_row(name, f"{bits.sum() / costs.sizes.sum():.3f}")
    table.add_row("a table of byte pairs", f"{costs.byte_pairs:.3f}")
    lines: list[str | Table] = [
        table,
        f"On {len(costs.sizes)} documents ({costs.sizes.sum() / 1e6:.2f} MB) that it has never seen. The fewer "
        "bits, the better it foretells them: 8 is knowing nothing.",
    ]
    if costs.memory_reset is not None:
        gain, error = paired_gain(costs.memory_reset, costs.with_memory, costs.sizes)
        lines.append(
            f"Memory spares this model {gain:.4f} ± {error:.4f} bits per byte (mean over documents and its standard "
            "error). That says how much it leans on memory, not whether memory pays: for that, see its twin without."
        )
    return lines


def write(path: Path, costs: Costs) -> None:
    """Write a row for every document: its size in bytes, and its costs in bits."""
    columns = {name: value for name, value in costs._asdict().items() if isinstance(value, np.ndarray)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["document", *columns])
        rows.writerows(zip(range(len(costs.sizes)), *(column.tolist() for column in columns.values()), strict=True))
