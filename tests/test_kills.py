"""SIGKILL at any moment: the same command, given again until it is through, ends bit for bit where no kill would."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from faults import CONFIG, content, figures, start
from test_resume import assert_same

TWO_RANKS = ("--trainer.strategy", "ddp", "--trainer.devices", "2")


class Run:
    """One command, the folder in which it keeps everything, and the faults that are planned for it."""

    def __init__(self, tmp_path: Path, small: Path, name: str, *, steps: int, options: Sequence[object] = ()) -> None:
        self.plan, self.log = tmp_path / f"{name}.plan", tmp_path / f"{name}.log"
        self.cache, self.temporary = tmp_path / f"{name}.cache", tmp_path / f"{name}.tmp"
        self.folder = tmp_path / name / "version_0"
        self.last, self.best = (self.folder / "checkpoints" / file for file in ("last.ckpt", "best.ckpt"))
        self.plan.touch()
        self.temporary.mkdir()
        config = tmp_path / f"{name}.yaml"
        config.write_text(CONFIG.format(steps=steps, plan=self.plan, name=name))
        files = ("--config", small, "--config", config, "--data.cache", self.cache)
        self.words = [str(word) for word in ("fit", *files, "--ckpt_path", "last", *options)]


class Forked:
    """A command in a process that is forked from one that has imported everything: it starts in a tenth of the time."""

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["memformer_pl.cli", "memformer_pl.callbacks", "faults"])

    def __init__(self, run: Run) -> None:
        self.process: Any = self.server.Process(target=start, args=(run.words, run.log))
        self.process.start()

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        return int(self.process.exitcode)


def apart(run: Run) -> subprocess.Popen[bytes]:
    """The command as a user gives it, in a group of processes of its own."""
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(run.temporary)}
    words = [sys.executable, "-m", "memformer_pl", *run.words]
    with run.log.open("a") as file:
        return subprocess.Popen(words, env=environment, stdout=file, stderr=file, start_new_session=True)


def through(run: Run, faults: Sequence[str], begin: Callable[[Run], Any] = apart) -> None:
    """Give the command once for each fault, which kills it, and once more."""
    run.plan.write_text("\n".join(faults))
    for left in range(len(faults), -1, -1):
        code = begin(run).wait(timeout=300)
        assert code == (-signal.SIGKILL if left else 0), f"{run.plan.read_text()}\n{run.log.read_text()}"
        assert len(run.plan.read_text().splitlines()) == max(left - 1, 0)


def kill_at(run: Run, moments: Sequence[tuple[bool, float]]) -> None:
    """Give the command once for each moment, kill it then, and give it once more.

    Args:
        run: To be killed.
        moments: Seconds after the first checkpoint that a process writes, or, where False, after its start.
    """
    for trained, seconds in moments:
        process, written = apart(run), time_of(run.last)
        while trained and process.poll() is None and time_of(run.last) == written:
            time.sleep(0.01)
        time.sleep(seconds)
        assert process.poll() is None, f"through before it could be killed\n{run.log.read_text()}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert apart(run).wait(timeout=300) == 0, run.log.read_text()


def time_of(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def assert_ended_alike(got: Run, expected: Run) -> None:
    """Equal bit for bit in everything but how long it took; and nothing else is left on the disk."""
    assert_same(content(got.last), content(expected.last))
    assert_same(content(got.best), content(expected.best))
    assert figures(got.folder) == figures(expected.folder)
    assert (got.folder / "documents.csv").read_bytes() == (expected.folder / "documents.csv").read_bytes()
    for run in (got, expected):
        assert sorted(path.name for path in run.last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
        assert not [path for path in run.cache.iterdir() if ".partial" in path.suffixes and path.is_dir()]
        assert not list(run.temporary.iterdir())


def test_a_run_that_is_killed_everywhere_ends_where_one_that_is_not_killed_ends(tmp_path: Path, small: Path) -> None:
    seed = int(os.environ.get("KILLS", random.randrange(10**6)))
    print(f"KILLS={seed} pytest ... repeats this")  # shown where the test fails
    draw = random.Random(seed).randint
    faults = [
        "SIGKILL packing 1",
        f"SIGKILL window {draw(1, 8)}",
        "SIGKILL writing 2",
        "SIGKILL validation 2",
        f"SIGKILL end {draw(1, 3)}",
        "SIGKILL replacing 2",
        "SIGKILL report 1",
    ]
    whole, killed = (Run(tmp_path, small, name, steps=12) for name in ("whole", "killed"))
    through(whole, [], Forked)
    through(killed, faults, Forked)
    assert_ended_alike(killed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), TWO_RANKS], ids=["one rank", "two ranks"])
def test_a_run_that_is_killed_at_random_ends_where_one_that_is_not_killed_ends(
    tmp_path: Path, small: Path, options: Sequence[str]
) -> None:
    seed = int(os.environ.get("KILLS", random.randrange(10**6)))
    print(f"KILLS={seed} pytest ... repeats this")  # shown where the test fails
    whole, killed = (Run(tmp_path, small, name, steps=300, options=options) for name in ("whole", "killed"))
    began = time.monotonic()
    process = apart(whole)
    while process.poll() is None and not whole.last.exists():
        time.sleep(0.01)
    training = time.monotonic()
    assert process.wait(timeout=600) == 0, whole.log.read_text()
    to_start, to_train = training - began, time.monotonic() - training
    chance = random.Random(seed)
    # two thirds of the run are over when the last kill comes, on average
    in_training = [(True, chance.uniform(0, to_train / 6)) for _ in range(8)]
    moments = [*in_training, *((False, chance.uniform(0, to_start)) for _ in range(2))]
    chance.shuffle(moments)
    kill_at(killed, moments)
    assert_ended_alike(killed, whole)


@pytest.mark.slow
def test_two_ranks_that_are_killed_everywhere_end_where_two_that_are_not_killed_end(
    tmp_path: Path, small: Path
) -> None:
    moments = ("packing 1", "window 5", "step 2", "writing 2", "end 2", "validation 2", "replacing 2", "report 1")
    whole, killed = (Run(tmp_path, small, name, steps=12, options=TWO_RANKS) for name in ("whole", "killed"))
    through(whole, [])
    through(killed, [f"SIGKILL {moment}" for moment in moments])
    assert_ended_alike(killed, whole)
