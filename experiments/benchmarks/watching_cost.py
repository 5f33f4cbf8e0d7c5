"""What it costs a validation to be watched, by what ``experiments/watch.yaml`` adds to a run.

    python experiments/benchmarks/watching_cost.py                    # the quickstart's validation; prints a table
    python experiments/benchmarks/watching_cost.py --validation 0.02  # fewer documents

Time: whole validations by Lightning's trainer, one without and one with each by turns, after a warm-up; all that a
callback does is in it, arrays and pictures too. Medians, with the quartiles of the ratio to the one without, turn by
turn. The model is as it begins: what a segment costs does not depend on its weights.
"""

import json
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from step_cost import EXPERIMENTS, build, stacked

from memformer_pl import SegmentData, SegmentTask, callbacks, data
from memformer_pl.recurrence import SegmentModel


def corpus_of(config: dict[str, Any], *, validation: float | None) -> SegmentData:
    """The data of a configuration, with another share held out if one is given."""
    given = config["data"] | ({} if validation is None else {"validation": validation})
    tokenizer = getattr(data, given["tokenizer"]["class_path"])(**given["tokenizer"]["init_args"])
    return SegmentData(**given | {"corpus": getattr(data, given["corpus"])(), "tokenizer": tokenizer})


def watchers() -> dict[str, list[str]]:
    """Names of callbacks: none, each that ``watch.yaml`` names by itself, and all together."""
    config = yaml.safe_load((EXPERIMENTS / "watch.yaml").read_text())
    names = [callback["class_path"] for callback in config["trainer"]["callbacks+"]]
    return {"nobody": [], **{name: [name] for name in names}, "all of watch.yaml": names}


def validate(model: SegmentModel, held_out: SegmentData, names: list[str]) -> float:
    """Seconds of a validation that is watched by those callbacks."""
    watching: list[Callback] = [getattr(callbacks, name)() for name in names]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        logger = TensorBoardLogger(folder)
        trainer = Trainer(accelerator="cpu", logger=logger, callbacks=watching, **quiet)
        start = time.perf_counter()
        trainer.validate(SegmentTask(model=model), datamodule=held_out, verbose=False)
        return time.perf_counter() - start


def main(
    base: Path = EXPERIMENTS / "quickstart.yaml",
    validation: float | None = None,
    repeats: int = 5,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Print a row for each way to watch, and write them as JSON where ``out`` says."""
    torch.set_num_threads(threads)
    held_out, model = corpus_of(stacked(base), validation=validation), build(base).model
    ways = watchers()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, names in ways.items():
            taken = validate(model, held_out, names)
            if repeat:  # the first round warms up
                seconds[way].append(taken)
    rows = []
    for way, taken in seconds.items():
        ratios = [one / other for one, other in zip(taken, seconds["nobody"], strict=True)]
        rows.append({"watched by": way, "seconds": median(taken), "ratio": quantiles(ratios, n=4)})
    Console().print(as_table(rows))
    if out is not None:
        settings = {"base": base.name, "documents": len(held_out.packed.validation), "threads": threads}
        out.write_text(json.dumps({"settings": settings, "torch": torch.__version__, "rows": rows}, indent=1))


def as_table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table("watched by", "s / validation", "time / nobody (quartiles)")
    for row in rows:
        low, middle, high = row["ratio"]
        table.add_row(row["watched by"], f"{row['seconds']:.2f}", f"{middle:.3f} ({low:.3f}-{high:.3f})")
    return table


if __name__ == "__main__":
    auto_cli(main)
