"""Train every row of a table with every seed: ``python experiments/sweep.py experiments/table1/digits/rows.yaml``.

Several runs at once, one on each core unless told otherwise. A sweep can be killed at any moment: the same command goes
on, each run from its last checkpoint, and what is done is not done again. Every run that ends adds a line to a ledger,
``experiments/results/TABLE.jsonl``: row, seed, commit, and what ``RunRecord`` has written. ``experiments/tables.py``
makes tables and figures of it. A row whose configuration has changed since is trained anew.

No sweep library is used: Hydra, Ray Tune and their like bring a way of configuring and of resuming of their own, which
would stand beside this command line's. None was tried.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import rows
import yaml
from rows import Row, Table

DONE = "done"


class Run(NamedTuple):
    """A row with a seed."""

    table: Table
    row: Row
    seed: int
    runs: Path

    @property
    def folder(self) -> Path:
        """Where it logs; another one for another configuration."""
        return self.runs / self.table.name / f"{self.row.name}-{self.row.fingerprint}" / f"seed_{self.seed}"

    def command(self, options: list[str]) -> list[str]:
        """What trains it; what is on top of the configurations lies beside the logs."""
        override = self.folder / "row.yaml"
        override.write_text(yaml.safe_dump(dict(self.row.override)))
        logger = "--trainer.logger.init_args"
        return [
            *(sys.executable, "-m", "memformer_pl", "fit"),
            *(f"--config={path}" for path in (*self.row.configs, override)),
            *(f"--seed_everything={self.seed}", f"--data.seed={self.seed}"),
            f"{logger}.save_dir={self.folder.parent.parent}",
            *(f"{logger}.name={self.folder.parent.name}", f"{logger}.version={self.folder.name}"),
            *("--ckpt_path=last", "--trainer.callbacks+=RunRecord", "--trainer.enable_progress_bar=false"),
            *(f"--{option}" for option in options),
        ]


class Sweep:
    """Runs that are trained side by side.

    Args:
        options: Further options of every run.
        threads: Of each run.
    """

    def __init__(self, *, options: list[str], threads: int) -> None:
        self.options = options
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.stopped = threading.Event()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._ledger = threading.Lock()

    def stop(self, *_: object) -> None:
        """End all runs; each writes a checkpoint first."""
        self.stopped.set()
        for child in list(self._children):
            child.terminate()

    def train(self, run: Run) -> str:
        """Train one run to its end, and enter it in the ledger; says in a word what became of it."""
        if self.stopped.is_set():
            return "not begun"
        run.folder.mkdir(parents=True, exist_ok=True)
        with only_here(run.folder / "lock") as lock:
            if lock is None:
                return "is trained by another process"
            with (run.folder / "log.txt").open("ab") as log:
                # the child holds the lock too: one that outlives this process keeps others away
                child = subprocess.Popen(
                    run.command(self.options),
                    env=self.environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[lock],
                    start_new_session=True,
                )
                self._children.add(child)
                code = child.wait()
                self._children.discard(child)
            if self.stopped.is_set():
                return "stopped"
            if code:
                return f"failed with exit code {code}: see {run.folder / 'log.txt'}"
            self._enter(run)
        return DONE

    def _enter(self, run: Run) -> None:
        record = json.loads((run.folder / "record.json").read_text())
        line = {"row": run.row.name, "seed": run.seed, "fingerprint": run.row.fingerprint, "commit": commit(), **record}
        run.table.ledger.parent.mkdir(exist_ok=True)
        with self._ledger, run.table.ledger.open("a") as ledger:
            ledger.write(json.dumps(line) + "\n")


@contextmanager
def only_here(path: Path) -> Iterator[int | None]:
    """A lock that lasts as long as any process that has it; None where another one has."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


def commit() -> str:
    """The commit of the code, with a ``+`` where it was changed since; results are no part of it."""
    git = ["git", "-C", str(rows.EXPERIMENTS)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], stdout=subprocess.PIPE, text=True).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/", ":(exclude)results"]).returncode
    return f"{head}{'+' if changed else ''}" if head else "unknown"


def left(table: Table, *, only: list[str], seeds: list[int], runs: Path) -> list[Run]:
    """The runs that are still to be trained, all rows with the first seed before any with the second.

    Raises:
        ValueError: ``only`` names a row that is not there.
    """
    if unknown := set(only) - {row.name for row in table.rows}:
        raise ValueError(f"{table.name} has no rows {sorted(unknown)}, only {[row.name for row in table.rows]}")
    done = {(line["row"], line["seed"]) for line in rows.results(table)}
    chosen = [row for row in table.rows if not only or row.name in only]
    every = [Run(table, row, seed, runs.absolute()) for seed in seeds or table.seeds for row in chosen]
    return [run for run in every if (run.row.name, run.seed) not in done]


def main(
    tables: list[Path],
    *,
    only: list[str],
    seeds: list[int],
    workers: int,
    threads: int,
    runs: Path,
    options: list[str],
) -> bool:
    """Train what is left of the tables; says whether all of it is done."""
    todo = [run for path in tables for run in left(rows.read(path), only=only, seeds=seeds, runs=runs)]
    sweep = Sweep(options=options, threads=threads)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, sweep.stop)
    print(f"{len(todo)} runs to train, {workers} at once; logs are below {runs.absolute()}", flush=True)

    def train(run: Run) -> bool:
        outcome = sweep.train(run)
        print(f"{run.table.name} {run.row.name}, seed {run.seed}: {outcome}", flush=True)
        return outcome == DONE

    with ThreadPoolExecutor(workers) as pool:
        return all(future.result() for future in [pool.submit(train, run) for run in todo])


def arguments() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(description="Train every row of a table with every seed.")
    parser.add_argument("tables", type=Path, nargs="+", help="files of rows")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="by default all rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="by default those of each table")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="runs at once; 1 where they share a GPU"
    )
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of logs and checkpoints")
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="further options of every run, such as trainer.accelerator=gpu; they are no part of what a row is",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(not main(**vars(arguments().parse_args())))
