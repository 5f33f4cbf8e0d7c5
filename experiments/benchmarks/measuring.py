"""What the benchmarks have in common: taking turns, ratios with their spread, peak memory, and one table three times.

Cases take turns on the same work after a warm-up, so that whatever else the machine does falls on all of them alike.
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

Row = dict[str, Any]
K = TypeVar("K")


def by_turns(works: Mapping[K, Callable[[], object]], *, repeats: int) -> dict[K, list[float]]:
    """Seconds of each run of each work, all by turns; the first round warms up.

    With one thread and no GPU they are seconds of the processor, which do not grow while others use the machine.
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
    """A time in seconds, when all work that was given to a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def sizes_of(kind: type, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the sizes that the constructor of a class has: an LSTM has no heads."""
    return {name: size for name, size in sizes.items() if name in inspect.signature(kind).parameters}


def ratio(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    """Quartiles of the ratio, pair by pair; of two pairs at least."""
    return quantiles([one / other for one, other in zip(ones, others, strict=True)], n=4)


def told(quartiles: Sequence[float], *, digits: int = 2) -> str:
    """Median, and the outer quartiles in brackets."""
    low, middle, high = (f"{quartile:.{digits}f}" for quartile in quartiles)
    return f"{middle} ({low}-{high})"


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most so far (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak(work: Callable[[], object], *, device: str) -> int:
    """The most bytes that the work takes above what was there before; on a CPU, of this process, once."""
    if device == "cpu":
        before = resident("VmRSS")
        work()
        return resident("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def apart(module: str, function: str, **arguments: Any) -> Any:
    """What a function of a script in this folder returns, called in a process of its own; plain data both ways.

    There glibc gives blocks above 64 KiB back as soon as they are freed, so a peak is what was held at once, and not
    what was kept for later between small blocks.
    """
    call = [sys.executable, __file__, module, function, json.dumps(arguments)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    run = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(run.stdout.splitlines()[-1])


def report(
    rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]], *, settings: Row, out: Path | None
) -> None:
    """Print a table of the rows; where ``out`` says, write rows and settings as JSON, and the table as Markdown beside.

    Args:
        rows: One for each case.
        columns: What is told of a row, by the head of its column.
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
    markdown = ["| " + " | ".join(line) + " |" for line in ([*columns], ["---"] * len(columns), *lines)]
    common = ", ".join(f"{name} {value}" for name, value in settings.items())
    out.with_suffix(".md").write_text("\n".join([*markdown, "", f"{common}.", ""]))


if __name__ == "__main__":
    name, function, arguments = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(name), function)(**json.loads(arguments))))
