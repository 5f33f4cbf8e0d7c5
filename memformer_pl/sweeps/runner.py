"""Train every row of a table with every seed. POSIX only: runs are locked with ``fcntl``.

Several runs train at once, by default one on each core. A sweep can be killed at any moment: the same command continues
each run from its last checkpoint and skips finished runs. Every finished run adds a line to the table's results: row,
seed, commit or version of the code, and the content of ``RunRecord``'s file. A row whose configuration has changed is
trained again.

No sweep library is used: Hydra and Ray Tune bring their own ways to configure and resume runs, beside those of this
command line. We have tried none.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from memformer_pl.errors import OptionError, UsageError, option_error, usage_error
from memformer_pl.sweeps import rows, shipped
from memformer_pl.sweeps.checks import check_seeds
from memformer_pl.sweeps.rows import Row, Table

DONE, DIVERGED = "done", "diverged"
ENDED = (DONE, DIVERGED)
"""The outcomes that are results."""
LOGGER = "TensorBoardLogger"
"""The logger of a run whose configuration names none, since every run needs a folder."""


class Run(NamedTuple):
    """A row with a seed."""

    table: Table
    row: Row
    seed: int
    runs: Path

    @property
    def folder(self) -> Path:
        """The folder of its logs, which differs between configurations."""
        return self.runs / self.table.name / f"{self.row.name}-{self.row.fingerprint}" / f"seed_{self.seed}"

    @property
    def checkpoint(self) -> Path:
        """The file with its last weights."""
        return self.folder / "checkpoints" / "last.ckpt"

    def result(self) -> dict[str, Any] | None:
        """Its line in the table's results, if it has ended."""
        lines = rows.results(self.table._replace(rows=[self.row]))
        return next((line for line in lines if line["seed"] == self.seed), None)

    def command(self, options: list[str], *, stage: str = "fit") -> list[str]:
        """The command that trains it, or tests it. Writes the row's own options to ``row.yaml`` beside the logs."""
        override = self.folder / "row.yaml"
        override.write_text(yaml.safe_dump(rows.stack(self.row.override, self.logging())), encoding="utf-8")
        return [
            *(sys.executable, "-m", self.table.program, stage),
            *(f"--config={path}" for path in (*self.row.configs, override)),
            *(f"--seed_everything={self.seed}", f"--data.seed={self.seed}"),
            *("--ckpt_path=last", "--trainer.callbacks+=RunRecord", "--trainer.enable_progress_bar=false"),
            *self.beginning(),
            *(f"--{option}" for option in options),
        ]

    def beginning(self) -> list[str]:
        """Options that give it the weights of the row before, if there is one."""
        if self.row.after is None:
            return []
        before = self._replace(row=self.row.after).checkpoint
        return ["--trainer.callbacks+=InitialWeights", f"--trainer.callbacks.path={before}"]

    def logging(self) -> dict[str, Any]:
        """Options that make the logger of its configuration, or the default one, log to its folder."""
        given = self.row.logger
        where = {
            "save_dir": str(self.folder.parent.parent),
            "name": self.folder.parent.name,
            "version": self.folder.name,
        }
        return {"trainer": {"logger": rows.stack({"class_path": LOGGER}, given, {"init_args": where})}}


class Sweep:
    """Train runs in processes of their own.

    Args:
        options: Options for every run.
        threads: Threads of each run.
    """

    def __init__(self, *, options: list[str], threads: int) -> None:
        self.options = options
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.stopped = threading.Event()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._ledger = threading.Lock()

    def stop(self, *_: object) -> None:
        """Stop all runs; each writes a checkpoint first."""
        self.stopped.set()
        for child in list(self._children):
            child.terminate()

    def train(self, run: Run) -> str:
        """Train one run to its end, test it if the table asks for it, and record its result; returns a word about the
        outcome.
        """
        if self.stopped.is_set():
            return "not started"
        run.folder.mkdir(parents=True, exist_ok=True)
        with only_here(run.folder / "lock") as lock:
            if lock is None:
                return "another process is training it"
            if line := run.result():  # another process has ended it since it was taken
                return DIVERGED if line.get("diverged") else DONE
            begun = commit()
            code = self._call(run, "fit", lock)
            if code == 0 and run.table.tested:
                code = self._call(run, "test", lock)
            if code == 0 or _diverged(run):  # a run that finishes while the sweep stops counts
                return self._enter(run, begun)
            if self.stopped.is_set():
                return "stopped"
            return f"failed with exit code {code}: see {run.folder / 'log.txt'}"

    def _call(self, run: Run, stage: str, lock: int) -> int:
        """Train or test a run in a process of its own; returns its exit code."""
        with (run.folder / "log.txt").open("ab") as log:
            # the child inherits the lock, so it keeps others away even if it outlives this process
            child = subprocess.Popen(
                run.command(self.options, stage=stage),
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                start_new_session=True,
            )
            self._children.add(child)
            if self.stopped.is_set():  # stop() may have come before the child was added
                child.terminate()
            code = child.wait()
            self._children.discard(child)
        return code

    def _enter(self, run: Run, begun: str) -> str:
        path = run.folder / "record.json"
        if not path.exists():
            return f"wrote no {path}: see {run.folder / 'log.txt'}"
        record = json.loads(path.read_text(encoding="utf-8"))
        line = {"row": run.row.name, "seed": run.seed, "fingerprint": run.row.fingerprint, "commit": begun, **record}
        with self._ledger, run.table.ledger.open("a", encoding="utf-8") as ledger:
            ledger.write(json.dumps(line) + "\n")
        if record.get("diverged"):
            return DIVERGED
        if missing := sorted(set(run.table.metrics) - set(record)):
            logged = ", ".join(name for name in record if "/" in name)
            sys.stderr.write(
                f"warning: {run.row.name}, seed {run.seed}, logged no {', '.join(missing)}: correct the table's "
                f"metrics (the run logged {logged})\n"
            )
        return DONE


def _diverged(run: Run) -> bool:
    """Whether the run has recorded that it diverged; a run that goes on removes its record."""
    path = run.folder / "record.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8")).get("diverged", False)


@contextmanager
def only_here(path: Path) -> Iterator[int | None]:
    """Take a lock that lasts while any process holds it; yield its file number, or None if another process has it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


def commit() -> str:
    """The commit of the code, with a ``+`` if the working tree has changes other than results.

    Outside a checkout of this repository it is the package's version: a repository around it is somebody else's.
    """
    try:
        installed = version("memformer-pl")
    except PackageNotFoundError:
        installed = "unknown"
    root = shipped.checkout()
    if root is None or shutil.which("git") is None:
        return installed
    # GIT_ variables could point git to another repository
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", "-C", str(shipped.folder()), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    top, head = git("rev-parse", "--show-toplevel").stdout.strip(), git("rev-parse", "--short", "HEAD").stdout.strip()
    if not head or Path(top).resolve() != root:
        return installed
    changed = git("diff", "--quiet", "HEAD", "--", ":/", ":(exclude)results").returncode
    return f"{head}{'+' if changed else ''}"


def remaining(table: Table, *, only: list[str], seeds: list[int], runs: Path) -> list[Run]:
    """The runs that can be trained now: all rows with the first seed, then all with the second, and so on.

    A row of a table with learning rates is trained with all of them and the table's first seed; with other seeds once
    the best of them is known. A row after another one is trained once that one has ended with the same seed; if it
    diverged, never.

    Raises:
        UsageError: ``only`` names an unknown row, or one whose row before is neither named nor trained; the learning
            rate of a row is not chosen yet, and ``seeds`` lacks the one that chooses it; or a row has several loggers
            or none.
    """
    names = list(dict.fromkeys(row.of for row in table.rows))
    if unknown := set(only) - set(names):
        raise OptionError(f"{table.name} has no rows {sorted(unknown)}: choose from {names}")
    lines = {(line["row"], line["seed"]): line for line in rows.results(table)}
    chosen = [row for row in table.rows if not only or row.of in only]
    for row in chosen:
        _ = row.logger  # raises if the logger is not supported
    best, first = rows.settled(table), table.seeds[0]
    undecided = sorted({row.of for row in chosen} - set(best))
    if undecided and first not in (seeds or table.seeds):
        raise OptionError(
            f"{table.name}: the learning rate of {undecided} is not chosen yet, which seed {first} does: add it to "
            "--seeds, or name other rows by --only"
        )
    every = [
        Run(table, row, seed, runs.absolute())
        for seed in seeds or table.seeds
        for row in chosen
        if seed == first or row == best.get(row.of)
    ]
    left = [run for run in every if (run.row.name, run.seed) not in lines]
    return [run for run in left if run.row.after is None or _may_follow(run, run.row.after, lines, among=chosen)]


def _may_follow(run: Run, before: Row, lines: dict[tuple[str, int], dict[str, Any]], *, among: list[Row]) -> bool:
    """Whether the row before a run's has weights with which it can begin."""
    line = lines.get((before.name, run.seed))
    if line is None and before not in among:
        raise UsageError(
            f"{run.table.name}: {run.row.name} begins with the weights of {before.name}, which has no result with seed "
            f"{run.seed}: name that row, too"
        )
    return line is not None and not line.get("diverged")


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
    """Train the remaining runs of tables; returns whether all are finished.

    Raises:
        UsageError: A table, a row or a seed is invalid, or a folder of results is not writable.
    """
    if seeds:
        with option_error():
            check_seeds(seeds, "--seeds")
    read = {table.ledger: table for table in (rows.read(given, runs=runs) for given in tables)}

    def left() -> list[Run]:
        return [run for table in read.values() for run in remaining(table, only=only, seeds=seeds, runs=runs)]

    todo = left()
    with usage_error(OSError, about="cannot write the results"):  # before hours of training
        for folder in (runs, *(ledger.parent for ledger in read)):
            folder.mkdir(parents=True, exist_ok=True)
        for ledger in read:
            ledger.open("a").close()
    sweep = Sweep(options=options, threads=threads)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, sweep.stop)
    print(f"{len(todo)} runs to train, {workers} at once; logs are below {runs.absolute()}", flush=True)
    print(f"Results: {', '.join(map(str, read))}", flush=True)
    return train_all(sweep, left, workers=workers)


def train_all(sweep: Sweep, left: Callable[[], list[Run]], *, workers: int) -> bool:
    """Train each run that is left, once, until none is; returns whether all are finished.

    Args:
        sweep: Trains them.
        left: The runs that are left now. A result may add some: those of the learning rate that turned out best.
        workers: Runs to train at once.
    """
    tried: dict[Path, bool | None] = {}
    """Whether each run is finished; None while it is trained."""
    changed = threading.Condition()

    def take() -> Run | None:
        with changed:
            while True:
                if run := next((run for run in left() if run.folder not in tried), None):
                    tried[run.folder] = None
                    return run
                if None not in tried.values():
                    return None
                changed.wait()

    def work() -> None:
        while run := take():
            outcome = "failed"
            try:
                outcome = sweep.train(run)
                print(f"{run.table.name} {run.row.name}, seed {run.seed}: {outcome}", flush=True)
            finally:
                with changed:
                    tried[run.folder] = outcome in ENDED
                    changed.notify_all()

    with ThreadPoolExecutor(workers) as pool:
        for worker in [pool.submit(work) for _ in range(workers)]:
            worker.result()
    return all(tried.values())
