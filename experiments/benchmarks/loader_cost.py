"""What it takes to feed a model: packing a corpus once, opening it again, and rollouts of lanes, against the disk and
against training.

    python experiments/benchmarks/loader_cost.py                      # the quickstart's corpus; two minutes on one core

The pack lies in a folder of its own that is removed at the end. Disk: the packed tokens are copied and forced out, and
read again (from the system's cache). Windows of lanes and the gradient of a rollout of the quickstart take turns, the
optimizer's step left out.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from measuring import Row, by_turns, ratio, report, told
from step_cost import EXPERIMENTS, build

from memformer_pl import data
from memformer_pl.data.datamodule import SegmentData


def open_data(base: Path, **other: Any) -> SegmentData:
    """The data of a configuration, not yet packed, with some values replaced."""
    config = yaml.safe_load(base.read_text())["data"] | other
    parts = {}
    for name in ("corpus", "tokenizer"):
        given = config.pop(name)
        given = given if isinstance(given, dict) else {"class_path": given}
        parts[name] = getattr(data, given["class_path"])(**given.get("init_args", {}))
    return SegmentData(**parts, **config)


def seconds_of(work: Callable[[], object]) -> float:
    """By the clock on the wall: a disk is waited for."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def write(path: Path, content: bytes) -> None:
    """Write a file, and wait for the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def once(base: Path, cache: Path) -> tuple[SegmentData, list[Row]]:
    """The packed data, and what packing, opening and the disk took."""
    first, again = open_data(base, cache=cache), open_data(base, cache=cache)
    took = {"read the documents": seconds_of(lambda: [None for _ in first.corpus.documents()])}
    took |= {"pack": seconds_of(first.setup), "open the pack": seconds_of(again.setup)}
    documents = again.packed.train
    text, packed = int(documents.bytes.sum()), documents.tokens.tobytes()
    copy = cache / "copy"
    sizes = dict.fromkeys(took, text)
    took |= {"write the tokens": seconds_of(lambda: write(copy, packed)), "read them": seconds_of(copy.read_bytes)}
    sizes |= dict.fromkeys(took.keys() - sizes, len(packed))
    tokens = len(documents.tokens)
    rows: list[Row] = [
        {"what": what, "seconds": taken, "bytes_per_second": sizes[what] / taken, "tokens_per_second": tokens / taken}
        for what, taken in took.items()
    ]
    return again, rows


def lanes(base: Path, opened: SegmentData, *, rollouts: int, repeats: int) -> list[Row]:
    """Tokens per second of rollouts, and of training on them."""
    run, loader = build(base), opened.train_dataloader()
    read = iter(loader)

    def load() -> None:
        nonlocal read
        for _ in range(rollouts):
            if next(read, None) is None:
                read = iter(loader)

    seconds = by_turns({"rollouts of lanes": load, "training": run.train}, repeats=repeats)
    each = {
        "rollouts of lanes": [taken / rollouts for taken in seconds["rollouts of lanes"]],
        "training": seconds["training"],
    }
    tokens = run.lanes * run.horizon * run.model.segment_length
    return [
        {
            "what": what,
            "seconds": median(taken),
            "tokens_per_second": tokens / median(taken),
            "times_training": ratio(seconds["training"], taken),
        }
        for what, taken in each.items()
    ]


def main(
    base: Path = EXPERIMENTS / "quickstart.yaml",
    rollouts: int = 100,
    repeats: int = 9,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Print a row for each part of the way, and write them as JSON and Markdown where ``out`` says."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as cache:
        opened, rows = once(base, Path(cache))
        rows += lanes(base, opened, rollouts=rollouts, repeats=repeats)
    report(rows, COLUMNS, settings={"base": base.name, "rollouts": rollouts, "threads": threads}, out=out)


COLUMNS = {
    "what": lambda row: row["what"],
    "s": lambda row: f"{row['seconds']:.4f}",
    "MB / s": lambda row: f"{row['bytes_per_second'] / 1e6:,.1f}" if "bytes_per_second" in row else "",
    "tokens / s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "times training (quartiles)": lambda row: told(row["times_training"]) if "times_training" in row else "",
}

if __name__ == "__main__":
    auto_cli(main)
