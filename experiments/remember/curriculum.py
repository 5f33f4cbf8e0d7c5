"""Train the rows of a table through the stages of ARMT's curriculum, each from the weights of the one before:

    python experiments/remember/curriculum.py Remember
    python experiments/remember/curriculum.py Rewrite --only armt rmt --seeds 0 --stages 4

A stage ends when ``LEARNT`` of the documents with most pairs are exactly right, or after the ``max_steps`` of the
configuration; then the next one begins, whether it was learnt or not. Every stage is a run of ``fit`` with a folder
below ``runs/`` and a line in ``experiments/results/remember.jsonl``. Stop it at any moment: the same command goes on
with each run where it was, and skips stages that have a line. A stage whose configuration has changed is trained again,
and all stages behind it. Linux, macOS or WSL.
"""

import signal
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Any, NamedTuple

from memformer_pl.data.corpora.remember import SYMBOLS, capacity
from memformer_pl.sweeps import rows
from memformer_pl.sweeps.runner import DIVERGED, DONE, Run, Sweep
from memformer_pl.sweeps.tables import spread

LEARNT = 0.99
"""Share of exactly right documents at which a stage ends early."""
TABLE = Path(__file__).with_name("rows.yaml")
VALUE_LENGTH = 1


class Stage(NamedTuple):
    """Training documents with up to so many pairs, and the symbols of their keys."""

    pairs: int
    key_length: int


STAGES = {
    "Remember": list(map(Stage, (1, 2, 3, 5, 10, 20, 40, 50, 200), (1, 1, 1, 1, 1, 2, 2, 2, 3))),
    "Rewrite": [Stage(pairs, key_length=1) for pairs in (1, 2, 3, 5, 10, 20, 40, 50)],
}


def stage_options(task: str, stage: Stage) -> dict[str, Any]:
    """The options of a stage. It is tested at its number of pairs, and at twice as many where there are keys for them.

    A rollout holds two of the longest documents: three quarters of all documents lie in one rollout, with their whole
    gradient.
    """
    pairs, key_length = stage
    twice = [2 * pairs] if task == "Rewrite" or 2 * pairs <= len(SYMBOLS) ** key_length else []
    sizes = {"pairs": pairs, "tested": [pairs, *twice], "key_length": key_length, "value_length": VALUE_LENGTH}
    stopping = {"monitor": f"exact/{pairs}", "mode": "max", "stopping_threshold": LEARNT, "patience": 1 << 30}
    return {
        "data": {
            "corpus": {"class_path": task, "init_args": sizes},
            "segment_length": key_length + VALUE_LENGTH + 2,
            "horizon": 2 * (pairs + 1),
        },
        "trainer": {"callbacks": ["AccuracyByDistance", {"class_path": "EarlyStopping", "init_args": stopping}]},
    }


def stage_rows(row: rows.Row, task: str, stages: list[Stage]) -> Iterator[rows.Row]:
    """A row at each stage, in order; named ``armt.remember.5``, for example."""
    before = None
    for stage in stages:
        override = rows.stack(row.override, stage_options(task, stage))
        name = f"{row.name}.{task.lower()}.{stage.pairs}"
        before = row._replace(name=name, of=name, override=override, after=before)
        yield before


def capacities(table: rows.Table, staged: dict[str, list[rows.Row]], stages: list[Stage]) -> str:
    """A table in Markdown: for each row and stage, the capacity at the stage's number of pairs."""
    lines = rows.results(table._replace(rows=[row for chain in staged.values() for row in chain]))
    text = [f"| | {' | '.join(str(stage.pairs) for stage in stages)} |", f"|---|{'---|' * len(stages)}"]
    for chain in staged.values():
        cells = []
        for row, stage in zip(chain, stages, strict=True):
            ended = [line for line in lines if line["row"] == row.name and not line.get("diverged")]
            exact = {line["seed"]: line[f"exact/{stage.pairs}"] for line in ended}
            held = [capacity(pairs=stage.pairs, accuracy=each, value_length=VALUE_LENGTH) for each in exact.values()]
            cells.append(f"{spread(held).formatted(2)}, {len(held)} seeds" if held else "")
        text.append(f"| {chain[0].title} | {' | '.join(cells)} |")
    return "\n".join(text)


def chains(table: rows.Table, task: str, *, stages: int, only: list[str]) -> dict[str, list[rows.Row]]:
    """The rows of a table, or those in ``only``, each at the first ``stages`` of a task.

    Raises:
        SystemExit: ``only`` names a row that the table does not have.
    """
    every = {row.name: list(stage_rows(row, task, STAGES[task][:stages])) for row in table.rows}
    if unknown := set(only) - every.keys():
        raise SystemExit(f"{table.name} has no rows {sorted(unknown)}: choose from {list(every)}")
    return {name: chain for name, chain in every.items() if not only or name in only}


def train(sweep: Sweep, table: rows.Table, chain: list[rows.Row], seed: int, *, runs: Path) -> bool:
    """Train a row through its stages with a seed, and print each outcome; returns whether all that can be is done."""
    for row in chain:
        alone = table._replace(rows=[row], metrics={})
        outcome = sweep.train(Run(alone, row, seed, runs.absolute()))
        print(f"{row.name}, seed {seed}: {outcome}", flush=True)
        if outcome != DONE:  # after a run that diverged there is nothing to go on from
            return outcome == DIVERGED
    return True


def main(
    task: str,
    *,
    only: list[str],
    seeds: list[int],
    stages: int,
    workers: int,
    runs: Path,
    table: Path,
    options: list[str],
) -> bool:
    """Train every row with every seed through the stages, and print the capacities; returns whether all are done."""
    read = rows.read(table, runs=runs)
    staged = chains(read, task, stages=stages, only=only)
    sweep = Sweep(options=options, threads=1)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, sweep.stop)
    read.ledger.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        started = [
            pool.submit(train, sweep, read, chain, seed, runs=runs)
            for seed in seeds or read.seeds
            for chain in staged.values()
        ]
        done = [each.result() for each in started]
    print(capacities(read, staged, STAGES[task][:stages]))
    return all(done)


if __name__ == "__main__":
    parser = ArgumentParser(description=main.__doc__)
    parser.add_argument("task", choices=STAGES)
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="by default those of the table")
    parser.add_argument("--stages", type=int, default=len(STAGES["Remember"]), help="how many, from the first on")
    parser.add_argument("--workers", type=int, default=cpu_count(), help="runs at once, of one thread each")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of logs and checkpoints")
    parser.add_argument("--table", type=Path, default=TABLE, help="a file of rows")
    parser.add_argument("--options", nargs="+", default=[], metavar="NAME=VALUE", help="for every run, as in sweep")
    sys.exit(not main(**vars(parser.parse_args())))
