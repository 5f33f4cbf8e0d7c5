"""Time to open a pack and to deal its documents out, for a small and a large corpus.

    python experiments/benchmarks/corpus_size.py --out experiments/results/corpus_size.json    # five minutes, 2 GB

A pack is opened as a run does it, for the first time, when it is compared with its checksums, and again. Its tokens are
zeros that take no room on the disk. Documents have 1 to 63 tokens of two bytes, but for the last one, which has the
rest of the corpus. Then rollouts are loaded.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from jsonargparse import auto_cli
from measuring import Row, report, seconds_of

from memformer_pl.data.lanes import LaneLoader
from memformer_pl.data.packing import documents as files
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.data.packing.pack import SETTLED, is_intact, write_checksums


def make(folder: Path, *, documents: int, gigabytes: float) -> None:
    """Write a pack of so many documents and bytes."""
    folder.mkdir()
    lengths = np.random.default_rng(0).integers(1, 64, size=documents)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    np.save(folder / files.OFFSETS, np.append(offsets, max(int(gigabytes * 5e8), offsets[-1] + 1)))
    for name in (files.BYTES, files.WORDS, files.LOST, files.PROMPT_LENGTHS):
        np.save(folder / name, np.zeros(documents + 1, dtype=np.int64))
    with (folder / files.TOKENS).open("wb") as tokens:
        tokens.truncate(2 * int(np.load(folder / files.OFFSETS)[-1]))
    write_checksums(folder)


def measure(folder: Path, *, rollouts: int) -> Row:
    """Open a pack twice, and load rollouts."""
    time.sleep(SETTLED + 1)
    first, again = (seconds_of(lambda: is_intact(folder)) for _ in range(2))
    opened: list[PackedDocuments] = []
    opening = seconds_of(lambda: opened.append(PackedDocuments.open(folder, dtype="uint16", fingerprint="")))
    sizes = {"batch_size": 64, "interleave": 16, "segment_length": 16, "horizon": 8}
    loaders: list[LaneLoader] = []
    planning = seconds_of(lambda: loaders.append(LaneLoader(opened[0], **sizes)))
    loading = iter(loaders[0])
    steps = [seconds_of(lambda: next(loading)) for _ in range(rollouts)]
    return {"verify": first, "open": again + opening, "plan": planning, "first": steps[0], "longest": max(steps[1:])}


def main(rollouts: int = 400, out: Path | None = None) -> None:
    """Print a row for each size, and write them to ``out`` as JSON and Markdown."""
    rows = []
    for documents, gigabytes in ((100_000, 0.1), (10_000_000, 10.0), (10_000_000, 100.0)):
        with tempfile.TemporaryDirectory() as cache:
            folder = Path(cache, "pack")
            make(folder, documents=documents, gigabytes=gigabytes)
            rows.append({"documents": documents, "gigabytes": gigabytes, **measure(folder, rollouts=rollouts)})
    report(rows, COLUMNS, settings={"rollouts": rollouts}, out=out)


COLUMNS = {
    "documents": lambda row: f"{row['documents']:,}",
    "GB": lambda row: f"{row['gigabytes']:g}",
    "open for the first time, s": lambda row: f"{row['verify']:.2f}",
    "open again, s": lambda row: f"{row['open']:.4f}",
    "make a loader, s": lambda row: f"{row['plan']:.3f}",
    "first rollout, s": lambda row: f"{row['first']:.3f}",
    "longest of the others, s": lambda row: f"{row['longest']:.4f}",
}

if __name__ == "__main__":
    auto_cli(main)
