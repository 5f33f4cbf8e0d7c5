r"""Speed of training on a device: seconds, tokens a second, share of the peak and memory of a rollout's gradient.

    python experiments/benchmarks/rollout_speed.py                                        # a small model on a CPU
    python experiments/benchmarks/rollout_speed.py --ways "[Memformer/bptt/1, Memformer/replay/8]" \
        --modes "[eager,compiled,graph]" --sizes.device cuda --sizes.bf16 true --sizes.lanes 128

A way is ``model/gradient/group``: the class, the gradient, and the segments that a decoder reads in one batch. A mode
is how its operations reach the device: one by one (``eager``), as kernels generated for whole blocks (``compiled``), or
as one captured CUDA graph of the rollout (``graph``), or of the compiled one (``compiled-graph``).

The ways take turns. In its turn a way is prepared, runs once to warm up, is timed a few times, and gives its memory
back, so each has the device to itself. Memory is the peak of a turn above models, gradients and data, in the turn that
needed least: what only the first turn does, such as compiling, does not count. A way that runs out of memory has a row
that says so; one that fails otherwise has a row too, and the script ends with status 1 after the report.

MFU: three forward passes by the formulas of ``flops.py`` (attention in full; recomputation does not count) over the
device's peak for dense products in that precision, by its data sheet.
"""

import gc
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple, TypeVar

import torch
from jsonargparse import auto_cli
from measuring import Row, now, report, with_quartiles
from replay_cost import Case, Sizes

from memformer_pl.training.compilation import compile_regions
from memformer_pl.training.flops import peak_flops_of

T = TypeVar("T")
OUT_OF_MEMORY = "out of memory"
SMALL = Sizes()


class Way(NamedTuple):
    """How the gradient of a rollout is computed."""

    model: str
    gradient: str
    group: int
    mode: str

    def __str__(self) -> str:
        groups = f", groups of {self.group}" if self.group > 1 else ""
        return f"{self.model}, {self.gradient}{groups}, {self.mode}"


class Turn(NamedTuple):
    """What one turn of a way took."""

    seconds: list[float]
    """Of each timed rollout."""
    peak: int
    """Bytes above models, gradients and data; 0 on a CPU, where this is not measured."""
    flops: int
    """Operations of a rollout."""


def ways_of(ways: Sequence[str], modes: Sequence[str]) -> list[Way]:
    """Every way in every mode.

    Raises:
        ValueError: A way is not ``model/gradient/group``.
    """
    parts = [way.split("/") for way in ways]
    if wrong := [way for way, each in zip(ways, parts, strict=True) if len(each) != 3]:
        raise ValueError(f"a way is model/gradient/group, such as Memformer/replay/8; got {wrong[0]!r}")
    return [Way(model, gradient, int(group), mode) for model, gradient, group in parts for mode in modes]


def case_of(sizes: Sizes, mode: str) -> Case:
    """A model and its rollout. Each mode has a model of its own, since compiling changes a model for good."""
    case = Case(sizes)
    if "compiled" in mode:
        compile_regions(case.model)
    return case


def prepare(case: Case, way: Way) -> Callable[[], object]:
    """Whatever a way needs before its first rollout; the returned function computes the gradient of one."""
    if "graph" not in way.mode:
        return partial(case.rollout, way.gradient, way.group)
    return case.captured(way.gradient, way.group)


def turn(case: Case, way: Way, *, runs: int) -> Turn:
    """Prepare a way, warm up, and time ``runs`` rollouts."""
    on_gpu = case.sizes.device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    rollout = prepare(case, way)
    rollout()
    times = [now()]
    for _ in range(runs):
        rollout()
        times.append(now())
    seconds = [end - start for start, end in pairwise(times)]
    return Turn(seconds, torch.cuda.max_memory_allocated() - before if on_gpu else 0, case.flops())


def attempt(work: Callable[[], T]) -> T | str:
    """The result, or why there is none; leaves no memory behind on a GPU."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def take_turns(ways: Sequence[Way], sizes: Sizes, *, turns: int, runs: int) -> dict[Way, list[Turn] | str]:
    """The turns of every way, or why it failed. A way that has failed takes no other turn.

    Models and their data are kept between turns, and nothing else.
    """
    kept = cache(lambda model, mode: case_of(replace(sizes, model=model), mode))
    taken: dict[Way, list[Turn] | str] = {way: [] for way in ways}
    for _ in range(turns):
        for way, before in taken.items():
            if not isinstance(before, str):
                new = attempt(lambda: turn(kept(way.model, way.mode), way, runs=runs))  # noqa: B023  # called here and now
                taken[way] = new if isinstance(new, str) else [*before, new]
    return taken


def row_of(way: Way, turns: list[Turn] | str, sizes: Sizes) -> Row:
    """What the turns of a way say: quartiles of the seconds, tokens and operations a second, and memory."""
    if isinstance(turns, str):
        return {**way._asdict(), "failed": turns}
    seconds = quantiles([each for turn in turns for each in turn.seconds], n=4)
    row = {
        **way._asdict(),
        "seconds": seconds,
        "tokens_per_second": sizes.horizon * sizes.lanes * sizes.segment_length / seconds[1],
        "flops_per_second": (rate := turns[0].flops / seconds[1]),
    }
    if sizes.device != "cpu":
        row["peak"] = min(turn.peak for turn in turns)
    if peak := peak_flops_of(torch.device(sizes.device), precision_of(sizes)):
        row["mfu"] = rate / peak
    return row


def settings_of(sizes: Sizes) -> Row:
    """What all ways have in common."""
    common = {name: value for name, value in asdict(sizes).items() if name not in ("model", "bf16")}
    return {**common, "precision": precision_of(sizes)}


def precision_of(sizes: Sizes) -> str:
    """The precision, in the words of a trainer."""
    return "bf16-mixed" if sizes.bf16 else "32-true"


def main(
    ways: list[str] = ["Memformer/bptt/1", "Memformer/replay/1", "Memformer/replay/8"],  # noqa: B006
    modes: list[str] = ["eager"],  # noqa: B006  # jsonargparse shows it in --help
    sizes: Sizes = SMALL,
    turns: int = 2,
    runs: int = 4,
    out: Path | None = None,
) -> None:
    """Print a row for each way and mode, and write them to ``out`` as JSON and Markdown.

    Needs two timed rollouts or more. Ends with status 1 if a way failed other than by its memory.
    """
    taken = take_turns(ways_of(ways, modes), sizes, turns=turns, runs=runs)
    rows = [row_of(way, each, sizes) for way, each in taken.items()]
    report(rows, COLUMNS, settings={**settings_of(sizes), "turns": turns, "runs": runs}, out=out)
    end(rows)


def end(rows: Sequence[Row]) -> None:
    """End the script: with status 1 if a row failed other than by its memory."""
    sys.exit(any(row.get("failed", OUT_OF_MEMORY) != OUT_OF_MEMORY for row in rows))


COLUMNS = {
    "model": lambda row: row["model"],
    "gradient": lambda row: row["gradient"] + (f", groups of {row['group']}" if row["group"] > 1 else ""),
    "mode": lambda row: row["mode"],
    "s / rollout (quartiles)": lambda row: row.get("failed") or with_quartiles(row["seconds"], digits=3),
    "tokens / s": lambda row: f"{row['tokens_per_second']:,.0f}" if "seconds" in row else "",
    "model TFLOP/s": lambda row: f"{row['flops_per_second'] / 1e12:.3g}" if "seconds" in row else "",
    "MFU": lambda row: f"{100 * row['mfu']:.1f} %" if "mfu" in row else "",
    "peak GiB": lambda row: f"{row['peak'] / 2**30:.2f}" if "peak" in row else "",
}

if __name__ == "__main__":
    auto_cli(main)
