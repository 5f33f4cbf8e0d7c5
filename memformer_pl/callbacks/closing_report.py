"""Report at the end of a run: the model beside gzip, bzip2, xz and a table of byte pairs."""

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
from memformer_pl.data import LaneLoader, Tokenizer
from memformer_pl.data.datamodule import SegmentData
from memformer_pl.data.lanes import require_lane_loader
from memformer_pl.errors import UsageError
from memformer_pl.training.distributed import sum_over_ranks
from memformer_pl.training.run_folder import folder_of
from memformer_pl.training.task import SegmentTask

Sizes = Float[np.ndarray, " documents"]
Read = Int[np.ndarray, " documents"]


class Costs(NamedTuple):
    """Bits that each validation document, or the part of it that was read, takes by each method."""

    document: Read
    """Number of the document."""
    sizes: Sizes
    """Size in bytes."""
    with_memory: Sizes
    memory_reset: Sizes | None
    """None for a model without memory."""
    gzip: Sizes
    bzip2: Sizes
    xz: Sizes
    byte_pairs: float
    """Bits per byte; see :func:`byte_pair_entropy`."""
    lost: Sizes | None = None
    """Bytes that the tokenizer loses, as if they were spread evenly over the document; None if it loses none."""


class ClosingReport(Callback):
    """Print bits per byte of validation documents at the end of training; write ``documents.csv`` beside the logs.

    With ``limit_val_batches``, the report covers what a validation reads. The model reads the documents twice: once as
    it is, and once with its memory reset at every segment, which shows how much *this* model relies on its memory. It
    does not show whether memory pays: for that, train the same model without memory, and compare the two runs with
    ``python -m memformer_pl compare``.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the run, and move this callback behind those that average weights at the end.

        Raises:
            TypeError: The run does not train a ``SegmentTask`` on a ``SegmentData``.
            UsageError: The documents have prompts, whose tokens cost nothing, so bits per byte would mean little.
        """
        data = getattr(trainer, "datamodule", None)
        if not (isinstance(pl_module, SegmentTask) and isinstance(data, SegmentData)):
            raise TypeError("ClosingReport needs a SegmentTask, and a SegmentData as datamodule")
        if data.packed.validation.prompt_lengths.any():
            raise UsageError(
                "ClosingReport measures whole documents, but these have prompts, which cost nothing: use "
                "AccuracyByDistance"
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside of its class
        others = [callback for callback in callbacks if callback is not self]
        averaging = [index for index, callback in enumerate(others) if isinstance(callback, WeightAveraging)]
        position = max([callbacks.index(self), *(index + 1 for index in averaging)])
        trainer.callbacks = [*others[:position], self, *others[position:]]  # type: ignore[attr-defined]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the documents and report; Lightning does not call this if training was interrupted."""
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
        folder = folder_of(trainer)  # all ranks must evaluate this
        if not trainer.is_global_zero:
            return
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]  # see setup
        costs = beside_yardsticks(loader, tokenizer, read, with_memory=with_memory, memory_reset=memory_reset)
        for line in describe(costs, limit=limit):
            Console().print(line)
        if folder is not None:
            write(folder / "documents.csv", costs)


def tokens_read(loader: LaneLoader, rollouts: int, device: torch.device) -> Read:
    """Count the tokens of every document in the first rollouts of all ranks. Collective.

    Args:
        loader: The loader of this rank.
        rollouts: Number of rollouts to read.
        device: Device on which the counts of the ranks are summed.
    """
    read = torch.zeros(len(loader.documents), dtype=torch.int64)
    for rollout in islice(loader, rollouts):
        for segment, documents in zip(rollout.segments, rollout.documents, strict=True):
            read.index_add_(0, documents.clamp(min=0), segment.token_mask.sum(1))
    return sum_over_ranks(read.to(device)).cpu().numpy()


def read_twice(task: SegmentTask, loader: LaneLoader, rollouts: int) -> tuple[Sizes, Sizes | None]:
    """Bits of every document by the model as it is, and with its memory reset at every segment if it has a memory.

    Collective: every rank reads its own lanes, and gets the costs of all documents.
    """
    ways = {"reading": False}
    if task.model.has_memory():
        ways["reading, memory reset"] = True
    costs = []
    for name, reset_memory in ways.items():
        hidden = not (task.trainer.is_global_zero and Console().is_terminal)
        shown = track(islice(loader, rollouts), f"{name:21}", rollouts, transient=True, disable=hidden)
        with task.trainer.precision_plugin.forward_context():
            nats = task.read_documents(shown, documents=len(loader.documents), reset_memory=reset_memory).compute()[0]
        costs.append(nats.cpu().numpy() / np.log(2))
    return costs[0], costs[1] if len(costs) > 1 else None


def beside_yardsticks(
    loader: LaneLoader, tokenizer: Tokenizer, read: Read, *, with_memory: Sizes, memory_reset: Sizes | None
) -> Costs:
    """Add what compressors make of the same texts to the costs of a model. One document is in memory at a time.

    Args:
        loader: Loader of the documents.
        tokenizer: Their tokenizer.
        read: Number of tokens read of each document; a document with none is left out.
        with_memory: Bits of every document by the model.
        memory_reset: Bits of every document with memory reset at every segment.
    """
    (numbers,) = np.nonzero(read)
    documents = loader.documents
    share_read = (read / documents.lengths.clip(1))[numbers]

    def contents(name: str) -> Iterator[bytes]:
        for number in track(numbers.tolist(), f"{name:21}", transient=True, disable=not Console().is_terminal):
            yield content(loader, tokenizer, number, int(read[number]))

    return Costs(
        document=numbers,
        sizes=documents.bytes[numbers] * share_read,
        with_memory=with_memory[numbers],
        memory_reset=None if memory_reset is None else memory_reset[numbers],
        gzip=np.array([8.0 * len(gzip.compress(text, 9)) for text in contents("gzip")]),
        bzip2=np.array([8.0 * len(bz2.compress(text, 9)) for text in contents("bzip2")]),
        xz=np.array([8.0 * len(xz(text)) for text in contents("xz")]),
        byte_pairs=byte_pair_entropy(contents("byte pairs")),
        lost=documents.lost[numbers] * share_read if documents.lost_share else None,
    )


def content(loader: LaneLoader, tokenizer: Tokenizer, number: int, tokens: int | None = None) -> bytes:
    """The bytes of a document, or of its first ``tokens`` tokens, as the tokenizer decodes them."""
    return tokenizer.bytes_of_all(loader.documents.document(number)[:tokens])


def xz(text: bytes) -> bytes:
    """Compress like ``xz -9``, with a dictionary no larger than the text, where xz would clear 64 MB each time."""
    dictionary = min(max(len(text), 4096), 64 << 20)
    return lzma.compress(text, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": dictionary}])


def byte_pair_entropy(texts: Iterable[bytes]) -> float:
    """Conditional entropy in bits of a byte given the one before it, with the frequencies of pairs in these texts."""
    pairs = np.zeros((256, 256))
    for text in texts:
        codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
        pairs += np.bincount(codes[:-1] * 256 + codes[1:], minlength=256 * 256).reshape(256, 256)
    seen = pairs[pairs > 0]
    before = np.broadcast_to(pairs.sum(1, keepdims=True), pairs.shape)[pairs > 0]
    return float(-(seen * np.log2(seen / before)).sum() / max(seen.sum(), 1))


def paired_gain(worse: Sizes, better: Sizes, sizes: Sizes) -> tuple[float, float]:
    """Bits per byte that ``better`` saves: the mean over documents and its standard error (NaN for one document)."""
    gains = (worse - better) / sizes
    return float(gains.mean()), float(gains.std(ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else float("nan")


def describe(costs: Costs, *, limit: str = "") -> list[str | Table]:
    """The lines of the report; ``limit`` says so if only a part was read."""
    table = Table("", "bits per byte", title="What the model has learned", title_justify="left")
    rows: list[tuple[str, Sizes | None]] = [
        ("this model", costs.with_memory),
        ("this model, memory reset at every segment", costs.memory_reset),
        ("gzip -9, document by document", costs.gzip),
        ("bzip2 -9, document by document", costs.bzip2),
        ("xz -9, document by document", costs.xz),
    ]
    for name, bits in rows:
        if bits is not None:
            table.add_row(name, f"{bits.sum() / costs.sizes.sum():.3f}")
    table.add_row("a table of byte pairs", f"{costs.byte_pairs:.3f}")
    lines: list[str | Table] = [
        table,
        f"On {len(costs.sizes)} documents ({costs.sizes.sum() / 1e6:.2f} MB{limit}) that were held out of training. "
        "Lower is better; 8 bits per byte is chance.",
    ]
    if costs.lost is not None:
        lines.append(
            f"The tokenizer loses {costs.lost.sum() / costs.sizes.sum():.2%} of the bytes: all rows count them, but "
            "the compressors get only the bytes that it decodes."
        )
    if costs.memory_reset is not None:
        gain, error = paired_gain(costs.memory_reset, costs.with_memory, costs.sizes)
        lines.append(
            f"Memory saves this model {gain:.4f} ± {error:.4f} bits per byte (mean over documents and its standard "
            "error). This shows how much it relies on memory, not whether memory pays: for that, train it without."
        )
    return lines


def write(path: Path, costs: Costs) -> None:
    """Write a row for every document: its size in bytes, and its cost in bits by each method."""
    columns = {name: value for name, value in costs._asdict().items() if isinstance(value, np.ndarray)}
    with atomic_write(path) as partial, partial.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))


def _close_progress_bar(trainer: Trainer, task: SegmentTask) -> None:
    """Close the progress bar before anything is printed, since it would be drawn over the report."""
    bar = trainer.progress_bar_callback
    if bar is not None:
        bar.on_train_end(trainer, task)
        bar.teardown(trainer, task, stage="fit")
