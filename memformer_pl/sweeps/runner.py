"""Train every row of a table with every seed. POSIX alone: runs are locked by ``fcntl``.

Several runs at once, one on each core unless told otherwise. A sweep can be killed at any moment: the same command goes
on, each run from its last checkpoint, and what is done is not done again. Every run that ends adds a line to the
table's ledger: row, seed, commit or version of the code, and what ``RunRecord`` has written. A row whose configuration
has changed since is trained anew.

No sweep library is used: Hydra, Ray Tune and their like bring a way of configuring and of resuming of their own, which
would stand beside this command line's. None was tried.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from memformer_pl.errors import UsageError, usage_error
from memformer_pl.sweeps import rows, shipped
from memformer_pl.sweeps.checks import check_seeds
from memformer_pl.sweeps.rows import Row, Table

DONE = "done"
LOGGER = "TensorBoardLogger"
"""Of a run whose configuration names none: it needs a folder to log to."""


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
        override.write_text(yaml.safe_dump(rows.stack(self.row.override, self.logging())), encoding="utf-8")
        return [
            *(sys.executable, "-m", "memformer_pl", "fit"),
            *(f"--config={path}" for path in (*self.row.configs, override)),
            *(f"--seed_everything={self.seed}", f"--data.seed={self.seed}"),
            *("--ckpt_path=last", "--trainer.callbacks+=RunRecord", "--trainer.enable_progress_bar=false"),
            *(f"--{option}" for option in options),
        ]

    def logging(self) -> dict[str, Any]:
        """The options by which it logs to its folder, with the logger of its configuration if that names one."""
        given = self.row.logger
        where = {
            "save_dir": str(self.folder.parent.parent),
            "name": self.folder.parent.name,
            "version": self.folder.name,
        }
        return {"trainer": {"logger": rows.stack({"class_path": LOGGER}, given, {"init_args": where})}}


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
                if self.stopped.is_set():  # since it was begun, when it was not yet among those that are ended
                    child.terminate()
                code = child.wait()
                self._children.discard(child)
            if code == 0:  # though all were told to stop: this one had come to its end
                return self._enter(run)
            if self.stopped.is_set():
                return "stopped"
            return f"failed with exit code {code}: see {run.folder / 'log.txt'}"

    def _enter(self, run: Run) -> str:
        path = run.folder / "record.json"
        if not path.exists():
            return f"left no {path}: see {run.folder / 'log.txt'}"
        record = json.loads(path.read_text(encoding="utf-8"))
        line = {"row": run.row.name, "seed": run.seed, "fingerprint": run.row.fingerprint, "commit": commit(), **record}
        with self._ledger, run.table.ledger.open("a", encoding="utf-8") as ledger:
            ledger.write(json.dumps(line) + "\n")
        if missing := sorted(set(run.table.metrics) - set(record)):
            told = f"{run.row.name}, seed {run.seed}, logged no {', '.join(missing)}: correct the table's metrics"
            sys.stderr.write(f"warning: {told}; logged are {', '.join(name for name in record if '/' in name)}\n")
        return DONE


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
    """The commit of the code, with a ``+`` where it was changed since; results are no part of it.

    Outside a checkout of this repository the version of the package: what stands around it is another's repository.
    """
    try:
        installed = version("memformer-pl")
    except PackageNotFoundError:
        installed = "unknown"
    root = shipped.checkout()
    if root is None or shutil.which("git") is None:
        return installed
    # variables of git's would point it to another repository
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(shipped.folder()), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    top, head = git("rev-parse", "--show-toplevel").stdout.strip(), git("rev-parse", "--short", "HEAD").stdout.strip()
    if not head or Path(top).resolve() != root:
        return installed
    changed = git("diff", "--quiet", "HEAD", "--", ":/", ":(exclude)results").returncode
    return f"{head}{'+' if changed else ''}"


def left(table: Table, *, only: list[str], seeds: list[int], runs: Path) -> list[Run]:
    """The runs that are still to be trained, all rows with the first seed before any with the second.

    Raises:
        UsageError: ``only`` names a row that is not there, or a row has a logger that cannot be told where to log.
    """
    if unknown := set(only) - {row.name for row in table.rows}:
        raise UsageError(f"{table.name} has no rows {sorted(unknown)}, only {[row.name for row in table.rows]}")
    done = {(line["row"], line["seed"]) for line in rows.results(table)}
    chosen = [row for row in table.rows if not only or row.name in only]
    for row in chosen:
        _ = row.logger  # refuses what cannot be
    every = [Run(table, row, seed, runs.absolute()) for seed in seeds or table.seeds for row in chosen]
    return [run for run in every if (run.row.name, run.seed) not in done]


def main(
    tables: list[str],
    *,
    only: list[str],
    seeds: list[int],
    workers: int,
    threads: int,
    runs: Path,
    options: list[str],
) -> bool:
    """Train what is left of the tables; says whether all of it is done.

    Raises:
        UsageError: A table, a row or a seed cannot be, or the results cannot be written.
    """
    if seeds:
        check_seeds(seeds, "--seeds")
    read = {table.ledger: table for table in (rows.read(given, runs=runs) for given in tables)}
    todo = [run for table in read.values() for run in left(table, only=only, seeds=seeds, runs=runs)]
    with usage_error(OSError, about="the results cannot be written"):  # told before hours of training
        for folder in (runs, *(ledger.parent for ledger in read)):
            folder.mkdir(parents=True, exist_ok=True)
        for ledger in read:
            ledger.open("a").close()
    sweep = Sweep(options=options, threads=threads)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, sweep.stop)
    print(f"{len(todo)} runs to train, {workers} at once; logs are below {runs.absolute()}", flush=True)
    print(f"Results: {', '.join(map(str, read))}", flush=True)

    def train(run: Run) -> bool:
        outcome = sweep.train(run)
        print(f"{run.table.name} {run.row.name}, seed {run.seed}: {outcome}", flush=True)
        return outcome == DONE

    with ThreadPoolExecutor(workers) as pool:
        done = [future.result() for future in [pool.submit(train, run) for run in todo]]
    return all(done)
