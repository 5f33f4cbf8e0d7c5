"""Time and peak memory of the gradient of one long segment, by blocks and at once.

    python experiments/benchmarks/block_cost.py

Each case runs in a process of its own: the most that was resident above what the model takes before it reads, and the
shortest time of three segments.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from jsonargparse import auto_cli
from replay_cost import resident
from rich.console import Console
from rich.table import Table

from memformer_pl.models import Transformer
from memformer_pl.recurrence import Segment

VOCAB = 2048


def case(length: int, block: int | None, dim: int, layers: int) -> dict[str, float]:
    """Seconds, and bytes above the start in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(vocab=VOCAB, dim=dim, heads=4, layers=layers, segment_length=length, block=block, dropout=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tokens = torch.randint(VOCAB, (1, length))
    segment = Segment(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([True]))
    # a short segment first: what the libraries take for themselves is not counted
    model(Segment(*(field[:, :32] for field in segment[:2]), segment.starts), ())[0].losses.mean().backward()
    before, seconds = resident("VmRSS"), []
    for _ in range(3):
        start = time.perf_counter()
        model(segment, ())[0].losses.mean().backward()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "peak": resident("VmHWM") - before}


def case_apart(*arguments: int | None) -> dict[str, float]:
    """The same, in a process of its own."""
    call = f"import json, block_cost; print(json.dumps(block_cost.case(*{arguments!r})))"
    run = subprocess.run(
        [sys.executable, "-c", call], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    measured: dict[str, float] = json.loads(run.stdout)
    return measured


def main(
    lengths: list[int] = [1024, 4096],  # noqa: B006  # jsonargparse shows it in --help
    blocks: list[int] = [128, 512],  # noqa: B006
    dim: int = 128,
    layers: int = 4,
    out: Path | None = None,
) -> None:
    """Print a row for each length and block, and write them as JSON where ``out`` says."""
    rows = [
        {"length": length, "block": block, **case_apart(length, block, dim, layers)}
        for length in lengths
        for block in (None, *blocks)
    ]
    table = Table("length", "block", "s / segment", "peak MiB")
    for row in rows:
        block = "all" if row["block"] is None else str(row["block"])
        table.add_row(str(row["length"]), block, f"{row['seconds']:.2f}", f"{row['peak'] / 2**20:.0f}")
    Console().print(table)
    if out is not None:
        settings = {"dim": dim, "layers": layers, "vocab": VOCAB, "threads": 1}
        out.write_text(json.dumps({"settings": settings, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    auto_cli(main)
