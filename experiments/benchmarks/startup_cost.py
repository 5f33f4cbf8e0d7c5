"""Seconds until the command line answers, and until training has taken its first step.

    python experiments/benchmarks/startup_cost.py                     # a minute; packs the corpus first

Whole processes, by turns. ``fit`` ends behind its first step, without validation and report, so it takes a bit longer
than until that step begins. Beside the clock on the wall stand seconds of the processor: what the clock would show on
an idle core.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from jsonargparse import auto_cli
from measuring import Row, report
from step_cost import EXPERIMENTS

ONE_STEP = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.callbacks=[]"]


def run(*arguments: str) -> Row:
    """Seconds of one run of the command line: on the wall, and of the processor."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, "-m", "memformer_pl", *arguments], check=True, **quiet)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def main(base: Path = EXPERIMENTS / "quickstart.yaml", repeats: int = 5, out: Path | None = None) -> None:
    """Print a row for each command, and write them as JSON and Markdown where ``out`` says."""
    with tempfile.TemporaryDirectory() as folder:
        fit = ["fit", f"--config={base}", *ONE_STEP, f"--trainer.logger.init_args.save_dir={folder}"]
        commands = {"--help": ["--help"], "fit, one step": fit}
        taken: dict[str, list[Row]] = {name: [] for name in commands}
        for repeat in range(repeats + 1):
            for name, arguments in commands.items():
                row = run(*arguments)
                if repeat:  # the first round fills caches
                    taken[name].append(row)
    rows = [
        {"command": name, **{clock: median(row[clock] for row in each) for clock in ("wall", "processor")}}
        for name, each in taken.items()
    ]
    report(rows, COLUMNS, settings={"base": base.name, "repeats": repeats, "threads": torch.get_num_threads()}, out=out)


COLUMNS = {
    "command": lambda row: row["command"],
    "s on the wall": lambda row: f"{row['wall']:.2f}",
    "s of the processor": lambda row: f"{row['processor']:.2f}",
}

if __name__ == "__main__":
    auto_cli(main)
