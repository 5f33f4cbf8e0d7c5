"""Time and peak memory of one window against the horizon, for every way to a gradient.

    python experiments/benchmarks/replay_cost.py                      # time, interleaved, and memory; prints a table
    python experiments/benchmarks/replay_cost.py --memory false       # time alone

Time: all ways take turns on the same window, after a warm-up; medians, with the quartiles of the ratio to ``bptt`` pair
by pair. Memory: each case in a process of its own, the most that was resident above what the model and its data take
before the first window.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table

from memformer_pl.gradients import GRADIENTS
from memformer_pl.models import Memformer
from memformer_pl.recurrence import Segment, State, detach, state_bytes

LANES, SEGMENT_LENGTH, VOCAB = 4, 64, 256


class Case:
    """A model and a window of random tokens.

    Args:
        horizon: Segments of the window.
        encoder_layers: Of the model.
        decoder_layers: Of the model.
        dim: Of the model.
    """

    def __init__(self, *, horizon: int, encoder_layers: int, decoder_layers: int, dim: int) -> None:
        torch.manual_seed(0)
        self.model = Memformer(
            vocab=VOCAB,
            dim=dim,
            heads=4,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            slots=32,
            segment_length=SEGMENT_LENGTH,
        )
        tokens = torch.randint(VOCAB, (horizon, LANES, SEGMENT_LENGTH))
        present = torch.ones(LANES, SEGMENT_LENGTH, dtype=torch.bool)
        self.segments = [Segment(each, present, torch.full((LANES,), t == 0)) for t, each in enumerate(tokens)]
        self.state = detach(self.model.initial_state(LANES))

    def window(self, gradient: str) -> None:
        """The gradient of one window."""
        self.model.zero_grad(set_to_none=False)
        GRADIENTS[gradient](self._step, self.segments, self.state, advance=self.model.advance)

    def _step(self, segment: Segment, state: State) -> tuple[torch.Tensor, State]:
        reading, leaving = self.model(segment, state)
        return reading.losses.mean(), leaving


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most so far (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak(gradient: str, horizon: int, encoder_layers: int, decoder_layers: int, dim: int) -> dict[str, int]:
    """Bytes above the start in this process, and those of the stored states."""
    torch.set_num_threads(1)
    case = Case(horizon=horizon, encoder_layers=encoder_layers, decoder_layers=decoder_layers, dim=dim)
    case.model.zero_grad(set_to_none=False)
    for parameter in case.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = resident("VmRSS")
    case.window(gradient)
    return {"peak": resident("VmHWM") - before, "states": horizon * LANES * state_bytes(case.state)}


def peak_apart(gradient: str, horizon: int, encoder_layers: int, decoder_layers: int, dim: int) -> dict[str, int]:
    """The same, in a process of its own."""
    case = (gradient, horizon, encoder_layers, decoder_layers, dim)
    call = f"import json, replay_cost; print(json.dumps(replay_cost.peak(*{case!r})))"
    run = subprocess.run(
        [sys.executable, "-c", call], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    measured: dict[str, int] = json.loads(run.stdout)
    return measured


def times(case: Case, *, repeats: int) -> dict[str, list[float]]:
    """Seconds of each window, all ways by turns."""
    seconds: dict[str, list[float]] = {gradient: [] for gradient in GRADIENTS}
    for repeat in range(repeats + 1):
        for gradient in GRADIENTS:
            start = time.perf_counter()
            case.window(gradient)
            if repeat:  # the first round warms up
                seconds[gradient].append(time.perf_counter() - start)
    return seconds


def main(
    horizons: list[int] = [4, 16, 64],  # noqa: B006  # jsonargparse shows it in --help
    encoder_layers: int = 4,
    decoder_layers: int = 8,
    dim: int = 128,
    repeats: int = 7,
    threads: int = 1,
    memory: bool = True,
    out: Path | None = None,
) -> None:
    """Print a row for each horizon and way, and write them as JSON where ``out`` says."""
    torch.set_num_threads(threads)
    sizes = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers, "dim": dim}
    rows = []
    for horizon in horizons:
        seconds = times(Case(horizon=horizon, **sizes), repeats=repeats)
        for gradient, taken in seconds.items():
            ratios = [one / other for one, other in zip(taken, seconds["bptt"], strict=True)]
            low, middle, high = quantiles(ratios, n=4)
            row = {"horizon": horizon, "gradient": gradient, "seconds": median(taken), "ratio": [low, middle, high]}
            rows.append(row | (peak_apart(gradient, horizon, **sizes) if memory else {}))
    Console().print(as_table(rows))
    if out is not None:
        settings = {**sizes, "lanes": LANES, "segment_length": SEGMENT_LENGTH, "threads": threads}
        out.write_text(json.dumps({"settings": settings, "torch": torch.__version__, "rows": rows}, indent=1))


def as_table(rows: list[dict]) -> Table:
    """The rows for a terminal."""
    table = Table("horizon", "gradient", "s / window", "time / bptt (quartiles)", "peak MiB", "of it states MiB")
    for row in rows:
        low, middle, high = row["ratio"]
        figures = [f"{row[key] / 2**20:.2f}" if key in row else "" for key in ("peak", "states")]
        ratio = f"{middle:.2f} ({low:.2f}-{high:.2f})"
        table.add_row(str(row["horizon"]), row["gradient"], f"{row['seconds']:.3f}", ratio, *figures)
    return table


if __name__ == "__main__":
    auto_cli(main)
