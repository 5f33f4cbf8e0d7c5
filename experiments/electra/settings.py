"""Train ELECTRA in five settings with every seed, and print the table: ``python experiments/electra/settings.py RUNS``.

A run that has reached its last step is not repeated, so the command can be stopped and started again; a run that was
stopped begins anew, in an empty folder. Seconds are those between the first and the last entry of a run's log: compare
them only if the runs had a core each.
"""

import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS, LONGER = 2000, 3000
"""``LONGER`` takes about the seconds of ``STEPS`` with replay."""
RULES = {"uniform": "drawn alike", "loss_difference": "by difference of losses", "gradient_norm": "by norm of gradient"}
AUC = "validation/auc"


class Setting(NamedTuple):
    """A row of the table."""

    title: str
    steps: int
    options: Sequence[str] = ()


SETTINGS = {
    "none": Setting("no buffer", STEPS),
    "longer": Setting("no buffer, more steps", LONGER),
    **{
        rule: Setting(title, STEPS, [f"--model.replay={{share: 0.5, size: 4096, priority: {rule}}}"])
        for rule, title in RULES.items()
    },
}


class Result(NamedTuple):
    """The end of a run."""

    auc: float
    seconds: float


def command(name: str, seed: int, runs: Path, more: Sequence[str] = ()) -> list[str]:
    """The command that trains a setting."""
    setting, logger = SETTINGS[name], "--trainer.logger.init_args"
    where = [f"{logger}.save_dir={runs}", f"{logger}.name={name}", f"{logger}.version=seed_{seed}"]
    seeds = [f"--seed_everything={seed}", f"--data.seed={seed}"]
    program = [sys.executable, "-m", "memformer_pl.electra", "fit", "--config", "electra/base"]
    return [*program, f"--trainer.max_steps={setting.steps}", *seeds, *where, *setting.options, *more]


def result(name: str, seed: int, runs: Path) -> Result | None:
    """What a run ended with; None if it has not reached its last step."""
    folder = runs / name / f"seed_{seed}"
    if not folder.is_dir():
        return None
    events = EventAccumulator(str(folder)).Reload()
    if AUC not in events.Tags()["scalars"]:
        return None
    last, first = events.Scalars(AUC)[-1], events.Scalars("train/bit")[0]
    return Result(last.value, last.wall_time - first.wall_time) if last.step + 1 >= SETTINGS[name].steps else None


def table(runs: Path, seeds: Sequence[int]) -> str:
    """Mean and standard error over the seeds that are done."""
    lines = ["|  | AUC | generator passes | seconds | seeds |", "| --- | --- | --- | --- | --- |"]
    for name, setting in SETTINGS.items():
        found = [done for seed in seeds if (done := result(name, seed, runs)) is not None]
        cells = ["", "", "0"]
        if found:
            areas = np.array([done.auc for done in found])
            error = areas.std(ddof=1) / len(areas) ** 0.5 if len(areas) > 1 else float("nan")
            seconds = np.mean([done.seconds for done in found])
            cells = [f"{areas.mean():.4f} ± {error:.4f}", f"{seconds:.0f}", str(len(found))]
        lines.append(f"| {setting.title} | {cells[0]} | {setting.steps:,} | {cells[1]} | {cells[2]} |")
    return "\n".join(lines)


def main(runs: Path, seeds: Sequence[int], train: bool) -> None:
    """Train what is left, one run after the other, and print the table.

    Args:
        runs: Folder of ``SETTING/seed_N``.
        seeds: Seeds.
        train: Whether to train.
    """
    for seed in seeds:
        for name in SETTINGS:
            if train and result(name, seed, runs) is None:
                shutil.rmtree(runs / name / f"seed_{seed}", ignore_errors=True)
                subprocess.run(command(name, seed, runs), check=True)
    print(table(runs, seeds))


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--no-train", dest="train", action="store_false", help="Only print the table.")
    main(**vars(parser.parse_args()))
