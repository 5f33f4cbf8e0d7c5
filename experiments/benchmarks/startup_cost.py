"""Seconds until the command line answers, and until the first training step is done.

    python experiments/benchmarks/startup_cost.py                     # a minute; packs the corpus first

Whole processes take turns. ``fit`` ends after its first step, without validation and report, so it takes slightly
longer than until that step begins. Processor seconds stand beside wall-clock seconds: the time on an idle core.
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
    """Wall-clock and processor seconds of one run of the command line."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, "-m", "memformer_pl", *arguments], check=True, **quiet)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def main(base: Path = EXPERIMENTS / "quickstart.yaml", repeats: int = 5, out: Path | None = None) -> None:
    """Print a row for each command, and write them to ``out`` as JSON and Markdown."""
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
    "wall-clock s": lambda row: f"{row['wall']:.2f}",
    "processor s": lambda row: f"{row['processor']:.2f}",
}

if __name__ == "__main__":
    auto_cli(main)
