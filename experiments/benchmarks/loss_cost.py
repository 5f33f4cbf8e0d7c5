"""Time and peak memory of the gradient of a rollout against the vocabulary, with logits in pieces and all at once.

    python experiments/benchmarks/loss_cost.py

Time: both ways take turns on the same rollout; ratios are taken pair by pair. Memory: each case runs in its own
process; the peak above what the model, its gradients and its data take before the rollout.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from measuring import Row, by_turns, in_new_process, peak, ratio, report, with_quartiles
from replay_cost import Case, Sizes

from memformer_pl.layers import cross_entropy

PIECE = cross_entropy.LARGEST
ROLLOUT = Sizes(lanes=32, horizon=2, encoder_layers=2, decoder_layers=2)
WAYS = {"all at once": 1 << 62, "in pieces": PIECE}


def rollout(case: Case, largest: int) -> Callable[[], None]:
    """A function that computes the gradient of one rollout by replay with at most ``largest`` logits at once."""

    def work() -> None:
        cross_entropy.LARGEST = largest
        case.rollout("replay", 1)

    return work


def peak_of(sizes: dict[str, Any], largest: int) -> int:
    """Peak bytes above the start."""
    torch.set_num_threads(1)
    case = Case(Sizes(**sizes))
    return peak(rollout(case, largest), device=case.sizes.device)


def main(
    vocabs: list[int] = [2048, 8192, 50257],  # noqa: B006  # jsonargparse shows it in --help
    sizes: Sizes = ROLLOUT,
    repeats: int = 5,
    out: Path | None = None,
) -> None:
    """Print a row for each vocabulary and way, and write them to ``out`` as JSON and Markdown."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for vocab_size in vocabs:
        case = Case(replace(sizes, vocab_size=vocab_size))
        seconds = by_turns({name: rollout(case, largest) for name, largest in WAYS.items()}, repeats=repeats)
        for name, largest in WAYS.items():
            row = {"vocab_size": vocab_size, "logits": name, "seconds": median(seconds[name])}
            row["ratio"] = ratio(seconds[name], seconds["all at once"])
            rows.append(
                {**row, "peak": in_new_process("loss_cost", "peak_of", sizes=asdict(case.sizes), largest=largest)}
            )
        del case
    settings = {name: value for name, value in asdict(sizes).items() if name != "vocab_size"}
    report(rows, COLUMNS, settings={**settings, "piece": PIECE, "threads": 1, "repeats": repeats}, out=out)


COLUMNS = {
    "vocabulary": lambda row: f"{row['vocab_size']:,}",
    "logits": lambda row: row["logits"],
    "s / rollout": lambda row: f"{row['seconds']:.3f}",
    "time / all at once (quartiles)": lambda row: with_quartiles(row["ratio"]),
    "peak MiB": lambda row: f"{row['peak'] / 2**20:.0f}",
}

if __name__ == "__main__":
    auto_cli(main)
