"""Cost of the callbacks of ``experiments/watch.yaml`` in a validation.

    python experiments/benchmarks/watching_cost.py                    # the quickstart's validation; prints a table
    python experiments/benchmarks/watching_cost.py --validation 0.02  # fewer documents

Whole validations by Lightning's trainer, with and without each callback, take turns after a warm-up; everything that a
callback does is included, arrays and pictures too. Times are medians, with the quartiles of the ratio to a validation
without callbacks. The model is untrained: the cost of a segment does not depend on its weights.
"""

import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
import yaml
from jsonargparse import auto_cli
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from loader_cost import open_data
from measuring import Row, by_turns, ratio, report, with_quartiles
from step_cost import EXPERIMENTS, build

from memformer_pl import SegmentData, SegmentTask, callbacks
from memformer_pl.contract import SegmentModel


def watchers() -> dict[str, list[str]]:
    """Names of callbacks: none, each one of ``watch.yaml`` alone, and all together."""
    config = yaml.safe_load((EXPERIMENTS / "watch.yaml").read_text())
    names = [callback["class_path"] for callback in config["trainer"]["callbacks+"]]
    return {"none": [], **{name: [name] for name in names}, "all of watch.yaml": names}


def validate(model: SegmentModel, held_out: SegmentData, names: list[str]) -> None:
    """A validation with these callbacks."""
    watching: list[Callback] = [getattr(callbacks, name)() for name in names]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        logger = TensorBoardLogger(folder)
        trainer = Trainer(accelerator="cpu", logger=logger, callbacks=watching, **quiet)
        trainer.validate(SegmentTask(model=model), datamodule=held_out, verbose=False)


def main(
    base: Path = EXPERIMENTS / "quickstart.yaml",
    validation: float | None = None,
    repeats: int = 5,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Print a row for each set of callbacks, and write them to ``out`` as JSON and Markdown."""
    torch.set_num_threads(threads)
    model, held_out = build(base).model, open_data(base, **({} if validation is None else {"validation": validation}))
    works = {way: partial(validate, model, held_out, names) for way, names in watchers().items()}
    seconds = by_turns(works, repeats=repeats)
    rows: list[Row] = [
        {"callbacks": way, "seconds": median(taken), "ratio": ratio(taken, seconds["none"])}
        for way, taken in seconds.items()
    ]
    settings = {"base": base.name, "documents": len(held_out.packed.validation), "threads": threads}
    report(rows, COLUMNS, settings=settings, out=out)


COLUMNS = {
    "callbacks": lambda row: row["callbacks"],
    "s / validation": lambda row: f"{row['seconds']:.2f}",
    "time / none (quartiles)": lambda row: with_quartiles(row["ratio"], digits=3),
}

if __name__ == "__main__":
    auto_cli(main)
