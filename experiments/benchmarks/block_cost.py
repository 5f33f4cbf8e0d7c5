"""Time and peak memory of the gradient of one long segment, by blocks and at once.

    python experiments/benchmarks/block_cost.py

Each case runs in its own process. Memory is the peak resident memory above what the model takes before the segment;
time is the shortest of three segments.
"""

import time
from pathlib import Path

import torch
from jsonargparse import auto_cli
from measuring import in_new_process, report, resident

from memformer_pl.contract import Segment
from memformer_pl.models import Transformer

VOCAB = 2048


def case(length: int, block: int | None, dim: int, layers: int) -> dict[str, float]:
    """Seconds, and bytes above the start, measured in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(
        vocab_size=VOCAB, dim=dim, heads=4, layers=layers, segment_length=length, chunk=block, dropout=0.0
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(VOCAB, (1, length))
    segment = Segment(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([True]))
    # a short segment first, so that one-off allocations of the libraries do not count
    model(Segment(*(field[:, :32] for field in segment[:2]), segment.document_start), ())[
        0
    ].token_losses.mean().backward()
    before, seconds = resident("VmRSS"), []
    for _ in range(3):
        start = time.perf_counter()
        model(segment, ())[0].token_losses.mean().backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "peak": resident("VmHWM") - before}


def main(
    lengths: list[int] = [1024, 4096],  # noqa: B006  # jsonargparse shows it in --help
    blocks: list[int] = [128, 512],  # noqa: B006
    dim: int = 128,
    layers: int = 4,
    out: Path | None = None,
) -> None:
    """Print a row for each length and block, and write them to ``out`` as JSON and Markdown."""
    rows = [
        {
            "length": length,
            "block": block,
            **in_new_process("block_cost", "case", length=length, block=block, dim=dim, layers=layers),
        }
        for length in lengths
        for block in (None, *blocks)
    ]
    report(rows, COLUMNS, settings={"dim": dim, "layers": layers, "vocab_size": VOCAB, "threads": 1}, out=out)


COLUMNS = {
    "length": lambda row: str(row["length"]),
    "block": lambda row: "all" if row["block"] is None else str(row["block"]),
    "s / segment": lambda row: f"{row['seconds']:.2f}",
    "peak MiB": lambda row: f"{row['peak'] / 2**20:.0f}",
}

if __name__ == "__main__":
    auto_cli(main)
