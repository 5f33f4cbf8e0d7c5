"""Shared by the benchmarks: alternating measurements, ratios with quartiles, peak memory, and reports.

Cases take turns on the same work after a warm-up, so that other load on the machine affects all of them alike.
"""

import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from memformer_pl.sweeps.markdown import as_markdown

Row = dict[str, Any]
K = TypeVar("K")


def by_turns(works: Mapping[K, Callable[[], object]], *, repeats: int) -> dict[K, list[float]]:
    """Seconds of every run of each function, taking turns; the first round is a warm-up.

    With one thread and no GPU this is processor time, which other load on the machine does not increase.
    """
    seconds: dict[K, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            start = now()
            work()
            if repeat:
                seconds[name].append(now() - start)
    return seconds


def now() -> float:
    """The time in seconds, after all work given to a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock time, since a disk is waited for."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def sizes_of(kind: type, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that the constructor of a class accepts: an LSTM has no heads."""
    return {name: size for name, size in sizes.items() if name in inspect.signature(kind).parameters}


def ratio(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    """Quartiles of the ratios, pair by pair; needs two pairs or more."""
    return quantiles([one / other for one, other in zip(ones, others, strict=True)], n=4)


def with_quartiles(quartiles: Sequence[float], *, digits: int = 2) -> str:
    """Median, with the outer quartiles in brackets."""
    low, middle, high = (f"{quartile:.{digits}f}" for quartile in quartiles)
    return f"{middle} ({low}-{high})"


def resident(field: str) -> int:
    """Resident bytes of this process (Linux): ``VmRSS`` now, ``VmHWM`` the peak so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak(work: Callable[[], object], *, device: str) -> int:
    """Peak bytes of a function above the start; on a CPU of the whole process, so it can be used once."""
    if device == "cpu":
        before = resident("VmRSS")
        work()
        return resident("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def in_new_process(module: str, function: str, **arguments: Any) -> Any:
    """Call a function of a script in this folder in a new process; arguments and result are plain data.

    There, glibc returns blocks above 64 KiB as soon as they are freed, so the peak contains only memory in use.
    """
    call = [sys.executable, __file__, module, function, json.dumps(arguments)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    run = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def report(
    rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]], *, settings: Row, out: Path | None
) -> None:
    """Print a table of the rows, and write rows and settings to ``out`` as JSON, and the table as Markdown beside it.

    Args:
        rows: One per case.
        columns: Text of a row for each column, by the head of the column.
        settings: What all rows have in common.
        out: The JSON file.
    """
    lines = [[cell(row) for cell in columns.values()] for row in rows]
    table = Table(*columns)
    for line in lines:
        table.add_row(*line)
    Console(width=140).print(table)
    if out is None:
        return
    settings = {**settings, "torch": torch.__version__}
    out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    common = ", ".join(f"{name} {value}" for name, value in settings.items())
    out.with_suffix(".md").write_text(f"{as_markdown([*columns], lines)}\n\n{common}.\n")


if __name__ == "__main__":
    name, function, arguments = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(name), function)(**json.loads(arguments))))
