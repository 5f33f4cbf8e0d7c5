"""Cost of feeding a model: packing a corpus once, opening it again and loading rollouts, against the disk and against
training.

    python experiments/benchmarks/loader_cost.py                      # the quickstart's corpus; two minutes on one core

The pack lies in a temporary folder. Disk: the packed tokens are copied, synced, and read again (from the system's
cache). Loading a rollout and computing its gradient, without the optimizer step, take turns.
"""

import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from measuring import Row, by_turns, ratio, report, seconds_of, with_quartiles
from step_cost import EXPERIMENTS, build

from memformer_pl import data
from memformer_pl.data.datamodule import SegmentData


def open_data(base: Path, **other: Any) -> SegmentData:
    """The data of a configuration, not yet packed, with some values replaced."""
    config = yaml.safe_load(base.read_text())["data"] | other
    parts = {}
    for name in ("corpus", "tokenizer"):
        value = config.pop(name)
        value = value if isinstance(value, dict) else {"class_path": value}
        parts[name] = getattr(data, value["class_path"])(**value.get("init_args", {}))
    return SegmentData(**parts, **config)


def write(path: Path, content: bytes) -> None:
    """Write a file, and sync it to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def once(base: Path, cache: Path) -> tuple[SegmentData, list[Row]]:
    """The packed data, and the cost of packing, opening and the disk."""
    first, again = open_data(base, cache=cache), open_data(base, cache=cache)
    took = {"read the documents": seconds_of(lambda: [None for _ in first.corpus.documents()])}
    took |= {"pack": seconds_of(first.setup), "open the pack": seconds_of(again.setup)}
    documents = again.packed.train
    text, packed = int(documents.bytes.sum()), documents.tokens.tobytes()
    copy = cache / "copy"
    sizes = dict.fromkeys(took, text)
    took |= {
        "write the tokens": seconds_of(lambda: write(copy, packed)),
        "read the tokens": seconds_of(copy.read_bytes),
    }
    sizes |= dict.fromkeys(took.keys() - sizes, len(packed))
    tokens = len(documents.tokens)
    rows: list[Row] = [
        {"what": what, "seconds": taken, "bytes_per_second": sizes[what] / taken, "tokens_per_second": tokens / taken}
        for what, taken in took.items()
    ]
    return again, rows


def loading(base: Path, opened: SegmentData, *, rollouts: int, repeats: int) -> list[Row]:
    """Tokens per second of loading rollouts, and of training on them."""
    run, loader = build(base), opened.train_dataloader()
    rollouts_left = iter(loader)

    def load() -> None:
        nonlocal rollouts_left
        for _ in range(rollouts):
            if next(rollouts_left, None) is None:
                rollouts_left = iter(loader)

    seconds = by_turns({"load a rollout": load, "train on a rollout": run.train}, repeats=repeats)
    each = {
        "load a rollout": [taken / rollouts for taken in seconds["load a rollout"]],
        "train on a rollout": seconds["train on a rollout"],
    }
    tokens = run.lanes * run.horizon * run.model.segment_length
    return [
        {
            "what": what,
            "seconds": median(taken),
            "tokens_per_second": tokens / median(taken),
            "times_training": ratio(seconds["train on a rollout"], taken),
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
    """Print a row for each stage, and write them to ``out`` as JSON and Markdown."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as cache:
        opened, rows = once(base, Path(cache))
        rows += loading(base, opened, rollouts=rollouts, repeats=repeats)
    report(rows, COLUMNS, settings={"base": base.name, "rollouts": rollouts, "threads": threads}, out=out)


COLUMNS = {
    "what": lambda row: row["what"],
    "s": lambda row: f"{row['seconds']:.4f}",
    "MB / s": lambda row: f"{row['bytes_per_second'] / 1e6:,.1f}" if "bytes_per_second" in row else "",
    "tokens / s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "times training (quartiles)": lambda row: with_quartiles(row["times_training"]) if "times_training" in row else "",
}

if __name__ == "__main__":
    auto_cli(main)
