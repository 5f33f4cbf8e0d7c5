r"""Time and peak memory of the gradient of a rollout against the vocabulary, with logits in pieces and all at once.

    python experiments/benchmarks/loss_cost.py

Time: pieces and whole take turns on the same rollout; the ratio pair by pair. Memory: each case in a process of its own,
the most above what the model, its gradients and its data take before the rollout.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from measuring import Row, apart, by_turns, peak, ratio, report, told
from replay_cost import Case, Sizes

from memformer_pl.layers import reading

PIECE = reading.LARGEST
WINDOW = Sizes(lanes=32, horizon=2, encoder_layers=2, decoder_layers=2)
CUTS = {"all at once": 1 << 62, "in pieces": PIECE}


def rollout(case: Case, largest: int) -> Callable[[], None]:
    """The gradient of one rollout by replay, with no more logits at once."""

    def work() -> None:
        reading.LARGEST = largest
        case.rollout("replay", 1)

    return work


def peak_of(sizes: dict[str, Any], largest: int) -> int:
    """Bytes above the start."""
    torch.set_num_threads(1)
    case = Case(Sizes(**sizes))
    return peak(rollout(case, largest), device=case.sizes.device)


def main(
    vocabs: list[int] = [2048, 8192, 50257],  # noqa: B006  # jsonargparse shows it in --help
    sizes: Sizes = WINDOW,
    repeats: int = 5,
    out: Path | None = None,
) -> None:
    """Print a row for each vocabulary and cut, and write them as JSON and Markdown where ``out`` says."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for vocab_size in vocabs:
        case = Case(replace(sizes, vocab_size=vocab_size))
        seconds = by_turns({name: rollout(case, largest) for name, largest in CUTS.items()}, repeats=repeats)
        for name, largest in CUTS.items():
            row = {"vocab_size": vocab_size, "logits": name, "seconds": median(seconds[name])}
            row["ratio"] = ratio(seconds[name], seconds["all at once"])
            rows.append({**row, "peak": apart("loss_cost", "peak_of", sizes=asdict(case.sizes), largest=largest)})
        del case
    settings = {name: value for name, value in asdict(sizes).items() if name != "vocab_size"}
    report(rows, COLUMNS, settings={**settings, "piece": PIECE, "threads": 1, "repeats": repeats}, out=out)


COLUMNS = {
    "vocabulary": lambda row: f"{row['vocab_size']:,}",
    "logits": lambda row: row["logits"],
    "s / rollout": lambda row: f"{row['seconds']:.3f}",
    "time / all at once (quartiles)": lambda row: told(row["ratio"]),
    "peak MiB": lambda row: f"{row['peak'] / 2**20:.0f}",
}

if __name__ == "__main__":
    auto_cli(main)
