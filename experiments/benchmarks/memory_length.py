"""Time of one segment against the length of a cache, for every model that caches.

    python experiments/benchmarks/memory_length.py                    # prints a table; two minutes on one core

Reading, and training with the gradient of one segment. All models and lengths take turns on the same random tokens with
full caches, after a warm-up; times are medians. The last column is the time with the longest cache divided by that with
the shortest: the ratio of the lengths if the cost is linear, less if part of it does not depend on the cache.
"""

from pathlib import Path
from statistics import median

import torch
from jsonargparse import auto_cli
from measuring import by_turns, report

from memformer_pl.contract import Segment, SegmentModel, State, detach
from memformer_pl.models import CompressiveTransformer, LaMemo, TransformerXL

VOCAB, KINDS = 256, ("read", "train")


def build(memory_length: int, *, dim: int, layers: int, segment_length: int) -> dict[str, SegmentModel]:
    """Every model that caches; half of the Compressive Transformer's cache is compressed."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "dim": dim, "heads": 4, "layers": layers, "segment_length": segment_length}
    half = memory_length // 2
    return {
        "TransformerXL": TransformerXL(**sizes, memory_length=memory_length),
        "CompressiveTransformer": CompressiveTransformer(**sizes, memory_length=half, compressed_length=half),
        "LaMemo": LaMemo(**sizes, memory_length=memory_length),
    }


def tokens(*, lanes: int, segment_length: int, document_start: bool) -> Segment:
    """A full segment of random tokens."""
    token_mask = torch.ones(lanes, segment_length, dtype=torch.bool)
    return Segment(torch.randint(VOCAB, token_mask.shape), token_mask, torch.full((lanes,), document_start))


class Case:
    """A model with full caches, and a segment."""

    def __init__(self, model: SegmentModel, memory_length: int, *, lanes: int) -> None:
        self.model, length = model, model.segment_length
        self.state: State = model.initial_state(lanes)
        with torch.no_grad():
            # half of a Compressive Transformer's cached vectors stand for four tokens each
            for n in range(1 + 5 * memory_length // (2 * length)):
                segment = tokens(lanes=lanes, segment_length=length, document_start=n == 0)
                self.state = model.advance(segment, self.state)
        self.segment = tokens(lanes=lanes, segment_length=length, document_start=False)

    def read(self) -> None:
        """Read the segment, as in evaluation."""
        with torch.no_grad():
            self.model(self.segment, self.state)

    def train(self) -> None:
        """Compute the gradient of the segment."""
        output, _ = self.model(self.segment, detach(self.state))
        (output.token_losses.mean() + output.auxiliary_loss).backward()


def main(
    lengths: list[int] = [400, 800, 1600],  # noqa: B006  # jsonargparse shows it in --help
    dim: int = 128,
    layers: int = 4,
    segment_length: int = 64,
    lanes: int = 4,
    repeats: int = 7,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Print a row for each model, and write them to ``out`` as JSON and Markdown."""
    torch.set_num_threads(threads)
    settings = {"dim": dim, "layers": layers, "segment_length": segment_length}
    cases = {
        (name, length): Case(model, length, lanes=lanes)
        for length in lengths
        for name, model in build(length, **settings).items()
    }
    works = {f"{name} {kind} {n}": getattr(case, kind) for (name, n), case in cases.items() for kind in KINDS}
    seconds = {work: median(taken) for work, taken in by_turns(works, repeats=repeats).items()}
    rows = [
        {"model": name, "kind": kind, "seconds": {n: seconds[f"{name} {kind} {n}"] for n in lengths}}
        for name in dict.fromkeys(name for name, _ in cases)
        for kind in KINDS
    ]
    columns = {
        "model": lambda row: row["model"],
        "": lambda row: row["kind"],
        **{f"ms at {n}": lambda row, n=n: f"{1000 * row['seconds'][n]:.1f}" for n in lengths},
        "longest / shortest": lambda row: f"{row['seconds'][lengths[-1]] / row['seconds'][lengths[0]]:.2f}",
    }
    report(rows, columns, settings=settings | {"lanes": lanes, "threads": threads, "repeats": repeats}, out=out)


if __name__ == "__main__":
    auto_cli(main)
