"""What a run has learned, beside yardsticks that everybody has: gzip, bzip2, xz and a table of byte pairs."""

import bz2
import csv
import gzip
import lzma
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from rich.console import Console
from rich.progress import track
from rich.table import Table

from memformer_pl.atomic_write import atomic_write
from memformer_pl.contract import has_memory
from memformer_pl.data import LaneLoader, Tokenizer
from memformer_pl.data.datamodule import SegmentData
from memformer_pl.data.lanes import require_lane_loader
from memformer_pl.errors import UsageError
from memformer_pl.training.distributed import sum_over_ranks
from memformer_pl.training.task import SegmentTask

Sizes = Float[np.ndarray, " documents"]
Read = Int[np.ndarray, " documents"]


class Costs(NamedTuple):
    """Bits that each held-out document takes, by the means that is used; of what was read of it."""

    document: Read
    """Its number."""
    sizes: Sizes
    """In bytes."""
    with_memory: Sizes
    memory_reset: Sizes | None
    """None for a model that has no memory."""
    gzip: Sizes
    bzip2: Sizes
    xz: Sizes
    byte_pairs: float
    """Bits per byte, see :func:`byte_pair_entropy`."""
    lost: Sizes | None = None
    """Bytes that do not come back from the tokens, of what was read as if they were spread evenly; None if all do."""


class ClosingReport(Callback):
    """Print at the end of training what held-out documents cost, and write it to ``documents.csv`` beside the logs.

    The documents are those of the validation, with ``limit_val_batches`` as much of them as a validation reads. The
    model reads them twice: once as it is, and once with its memory reset at every segment, which shows how much *this*
    model leans on its memory. Whether memory pays is another question: for that, train the twin without it and compare
    the two runs with ``python -m memformer_pl compare``.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come after callbacks that average weights at the end; refuse what has no report.

        Raises:
            TypeError: The run is not one of ``SegmentTask`` on ``SegmentData``.
            UsageError: A part of the documents is given, so what they cost is no measure of their size.
        """
        data = getattr(trainer, "datamodule", None)
        if not (isinstance(pl_module, SegmentTask) and isinstance(data, SegmentData)):
            raise TypeError("ClosingReport needs a SegmentTask, and a SegmentData as datamodule")
        if data.packed.validation.prompt_lengths.any():
            raise UsageError(
                "ClosingReport compares what whole documents cost, but of these a part is given, which costs nothing: "
                "use AccuracyByDistance"
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside of its class
        others = [callback for callback in callbacks if callback is not self]
        averaging = [place for place, callback in enumerate(others) if isinstance(callback, WeightAveraging)]
        place = max([callbacks.index(self), *(place + 1 for place in averaging)])
        trainer.callbacks = [*others[:place], self, *others[place:]]  # type: ignore[attr-defined]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the documents, then report. Not called where training was interrupted."""
        assert isinstance(pl_module, SegmentTask)
        if not trainer.val_dataloaders or not len(loader := require_lane_loader(trainer.val_dataloaders)):
            return
        _close_progress_bar(trainer, pl_module)
        rollouts = int(trainer.num_val_batches[0])
        limit = f", limited to {rollouts} of {len(loader)} rollouts" if rollouts < len(loader) else ""
        read = tokens_read(loader, rollouts, pl_module.device) if limit else loader.documents.lengths
        if trainer.is_global_zero:
            print(f"Reading {np.count_nonzero(read)} held-out documents for the report{limit}", flush=True)
        with_memory, memory_reset = read_twice(pl_module, loader, rollouts)
        folder = trainer.log_dir  # all ranks have to ask
        if not trainer.is_global_zero:
            return
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]  # see setup
        costs = beside_yardsticks(loader, tokenizer, read, with_memory=with_memory, memory_reset=memory_reset)
        for line in describe(costs, limit=limit):
            Console().print(line)
        if folder is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write(Path(folder) / "documents.csv", costs)


def tokens_read(loader: LaneLoader, rollouts: int, device: torch.device) -> Read:
    """How many tokens of every document the first ``rollouts`` of all ranks hold, from its beginning. Collective.

    What ranks tell each other is on ``device``.
    """
    read = torch.zeros(len(loader.documents), dtype=torch.int64)
    for rollout in islice(loader, rollouts):
        for segment, documents in zip(rollout.segments, rollout.documents, strict=True):
            read.index_add_(0, documents.clamp(min=0), segment.token_mask.sum(1))
    return sum_over_ranks(read.to(device)).cpu().numpy()


def read_twice(task: SegmentTask, loader: LaneLoader, rollouts: int) -> tuple[Sizes, Sizes | None]:
    """Bits that every document costs the model; as it is, and with its memory reset at every segment, if it has one.

    Collective: every rank reads its lanes, and has the costs of all.
    """
    ways = {"reading": False}
    if has_memory(task.model.initial_state(1)):
        ways["reading, memory reset"] = True
    costs = []
    for name, reset_memory in ways.items():
        hidden = not task.trainer.is_global_zero
        shown = track(islice(loader, rollouts), f"{name:21}", rollouts, transient=True, disable=hidden)
        with task.trainer.precision_plugin.forward_context():
            nats = task.read_documents(shown, documents=len(loader.documents), reset_memory=reset_memory).compute()[0]
        costs.append(nats.cpu().numpy() / np.log(2))
    return costs[0], costs[1] if len(costs) > 1 else None


def beside_yardsticks(
    loader: LaneLoader, tokenizer: Tokenizer, read: Read, *, with_memory: Sizes, memory_reset: Sizes | None
) -> Costs:
    """The costs of a model, and what the same texts cost by other means. One document is in memory at a time.

    Args:
        loader: Of the documents.
        tokenizer: That of their tokens.
        read: How many tokens of each document count. One of which none was read is left out.
        with_memory: Of every document.
        memory_reset: Likewise.
    """
    (places,) = np.nonzero(read)
    documents = loader.documents
    share = (read / documents.lengths.clip(1))[places]

    def contents(name: str) -> Iterator[bytes]:
        for place in track(places.tolist(), f"{name:21}", transient=True):
            yield content(loader, tokenizer, place, int(read[place]))

    return Costs(
        document=places,
        sizes=documents.bytes[places] * share,
        with_memory=with_memory[places],
        memory_reset=None if memory_reset is None else memory_reset[places],
        gzip=np.array([8.0 * len(gzip.compress(text, 9)) for text in contents("gzip")]),
        bzip2=np.array([8.0 * len(bz2.compress(text, 9)) for text in contents("bzip2")]),
        xz=np.array([8.0 * len(xz(text)) for text in contents("xz")]),
        byte_pairs=byte_pair_entropy(contents("byte pairs")),
        lost=documents.lost[places] * share if documents.lost_share else None,
    )


def content(loader: LaneLoader, tokenizer: Tokenizer, place: int, tokens: int | None = None) -> bytes:
    """A document, or its first ``tokens``, as it was before it became tokens, as far as the tokenizer gives it back."""
    return tokenizer.bytes_of_all(loader.documents.document(place)[:tokens])


def xz(text: bytes) -> bytes:
    """What ``xz -9`` makes of a text. Its dictionary is no larger than that, where xz would clear 64 MB for each."""
    dictionary = min(max(len(text), 4096), 64 << 20)
    return lzma.compress(text, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}])


def byte_pair_entropy(texts: Iterable[bytes]) -> float:
    """Bits that a byte costs who knows the byte before it, and how often each pair occurs in these very texts."""
    pairs = np.zeros((256, 256))
    for text in texts:
        codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
        pairs += np.bincount(codes[:-1] * 256 + codes[1:], minlength=256 * 256).reshape(256, 256)
    seen = pairs[pairs > 0]
    before = np.broadcast_to(pairs.sum(1, keepdims=True), pairs.shape)[pairs > 0]
    return float(-(seen * np.log2(seen / before)).sum() / max(seen.sum(), 1))


def paired_gain(worse: Sizes, better: Sizes, sizes: Sizes) -> tuple[float, float]:
    """How many bits per byte ``better`` saves: the mean over documents, and its standard error (NaN for one)."""
    gains = (worse - better) / sizes
    return float(gains.mean()), float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else float("nan")


def describe(costs: Costs, *, limit: str = "") -> list[str | Table]:
    """The report, for a terminal; ``limit`` says where not all was read."""
    table = Table("", "bits per byte", title="What the model has learned", title_justify="left")
    rows: list[tuple[str, Sizes | None]] = [
        ("this model", costs.with_memory),
        ("this model, memory reset at every segment", costs.memory_reset),
        ("gzip -9, each document by itself", costs.gzip),
        ("bzip2 -9, each document by itself", costs.bzip2),
        ("xz -9, each document by itself", costs.xz),
    ]
    for name, bits in rows:
        if bits is not None:
            table.add_row(name, f"{bits.sum() / costs.sizes.sum():.3f}")
    table.add_row("a table of byte pairs", f"{costs.byte_pairs:.3f}")
    lines: list[str | Table] = [
        table,
        f"On {len(costs.sizes)} documents ({costs.sizes.sum() / 1e6:.2f} MB{limit}) that it has never seen. The fewer "
        "bits, the better it foretells them: 8 is knowing nothing.",
    ]
    if costs.lost is not None:
        lines.append(
            f"The tokenizer loses {costs.lost.sum() / costs.sizes.sum():.2%} of the bytes: they do not come back from "
            "its tokens, but all rows count them; gzip and its like compress what comes back."
        )
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
    with atomic_write(path) as partial, partial.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))


def _close_progress_bar(trainer: Trainer, task: SegmentTask) -> None:
    """Close the trainer's bar now, not after all callbacks: it would be drawn over what is printed."""
    bar = trainer.progress_bar_callback
    if bar is not None:
        bar.on_train_end(trainer, task)
        bar.teardown(trainer, task, stage="fit")
