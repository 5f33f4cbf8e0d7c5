r"""Where a device spends a rollout: its idle time, its ten largest kernels, and what the host launches.

    python experiments/benchmarks/rollout_profile.py --ways "[Memformer/replay/1]" --sizes.device cuda --sizes.bf16 true

Ways, modes and sizes are those of ``rollout_speed.py``. Shares are of the time of a rollout without the profiler, which
slows the host down but not the kernels. On a CPU the operations of torch stand for kernels, and nothing is launched.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import auto_cli
from measuring import Row, by_turns, report
from replay_cost import Sizes
from rollout_speed import SMALL, Way, attempt, case_of, end, prepare, settings_of, ways_of
from torch.profiler import ProfilerActivity, profile

Event = Mapping[str, Any]
"""An event of a trace, in the format of Chrome: ``cat``, ``name``, and ``ts`` and ``dur`` in microseconds."""
KERNELS = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}
"""Categories of the events that occupy a device."""
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
"""Calls of the host that start work on a GPU; their names begin so."""


def trace(work: Callable[[], object], *, device: str) -> list[Event]:
    """The events of one call."""
    activity = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[activity]) as profiler:
        work()
        if device != "cpu":
            torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        profiler.export_chrome_trace(str(path := Path(folder) / "trace.json"))
        events: list[Event] = json.loads(path.read_text())["traceEvents"]
    return events


def busy(events: Iterable[Event]) -> float:
    """Seconds in which at least one of the events is under way."""
    total = end = 0.0
    for start, stop in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e6


def rows_of(way: Way, events: Sequence[Event], *, seconds: float, device: str, largest: int = 10) -> list[Row]:
    """All kernels of a rollout of so many ``seconds`` together, then each of the largest."""
    kernels = [event for event in events if event.get("cat") in KERNELS[device]]
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_name[event["name"]].append(event["dur"] / 1e6)
    runtime = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    used = busy(kernels)
    together = {
        "kernel": "all",
        "calls": len(kernels),
        "seconds": used,
        "share": used / seconds,
        "idle": 1 - used / seconds,
        "launches": sum(event["name"].startswith(LAUNCHES) for event in runtime),
        "rollout": seconds,
    }
    each = [
        {"kernel": name, "calls": len(taken), "seconds": sum(taken), "share": sum(taken) / seconds}
        for name, taken in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:largest]
    ]
    return [{**way._asdict(), **row} for row in (together, *each)]


def main(
    ways: list[str] = ["Memformer/replay/1"],  # noqa: B006  # jsonargparse shows it in --help
    modes: list[str] = ["eager"],  # noqa: B006
    sizes: Sizes = SMALL,
    runs: int = 5,
    out: Path | None = None,
) -> None:
    """Print the kernels of each way, and write them to ``out`` as JSON and Markdown.

    Ends with status 1 if a way failed other than by its memory.
    """
    trace(lambda: torch.zeros(1, device=sizes.device), device=sizes.device)  # starts up before anything is captured
    rows: list[Row] = []
    for way in ways_of(ways, modes):
        found = attempt(partial(profiled, way, sizes, runs=runs))
        rows += [{**way._asdict(), "failed": found}] if isinstance(found, str) else found
    report(rows, COLUMNS, settings={**settings_of(sizes), "runs": runs}, out=out)
    end(rows)


def profiled(way: Way, sizes: Sizes, *, runs: int) -> list[Row]:
    """The rows of a way: some rollouts without the profiler for the time, and one with it."""
    rollout, device = prepare(case_of(replace(sizes, model=way.model), way.mode), way), sizes.device
    seconds = median(by_turns({way: rollout}, repeats=runs)[way])
    return rows_of(way, trace(rollout, device=device), seconds=seconds, device=device)


def short(name: str) -> str:
    """The beginning of a kernel's name, which can be a page of template arguments."""
    return name.removeprefix("void ").replace("|", "/")[:70]


COLUMNS = {
    "way": lambda row: str(Way(*(row[field] for field in Way._fields))),
    "kernel": lambda row: row.get("failed") or short(row["kernel"]),
    "calls": lambda row: f"{row['calls']:,}" if "calls" in row else "",
    "ms": lambda row: f"{1000 * row['seconds']:.2f}" if "seconds" in row else "",
    "share of rollout": lambda row: f"{100 * row['share']:.1f} %" if "share" in row else "",
    "idle": lambda row: f"{100 * row['idle']:.1f} %" if "idle" in row else "",
    "launches": lambda row: f"{row['launches']:,}" if "launches" in row else "",
}

if __name__ == "__main__":
    auto_cli(main)
