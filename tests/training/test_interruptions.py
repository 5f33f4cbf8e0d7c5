"""Killed, stopped or requeued: the same command, given until it is through, ends bit for bit where it should.

``pytest -m slow tests/training/test_interruptions.py`` has the long forms: kills at random times, and two ranks.
"""

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import write_small
from forked_runs import Forked, Run, apart, assert_ended_alike, ended, through

from memformer_pl.checkpoints.format import KEY, read

LAST = ("--ckpt_path", "last")
TWO_RANKS = (*LAST, "--trainer.strategy", "ddp", "--trainer.devices", "2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, texts: Path, pack_cache: Path) -> Run:
    """A run that nothing interrupts."""
    run = Run(write_small(tmp_path_factory.mktemp("whole"), texts, pack_cache), "whole", steps=6)
    through(run, begin=Forked)
    return run


@pytest.fixture
def chance() -> random.Random:
    """Different random numbers in each run; a test that fails prints the seed that repeats it."""
    seed = int(os.environ.get("SEED", random.randrange(10**6)))
    print(f"SEED={seed} pytest ... repeats this")
    return random.Random(seed)


def test_a_run_that_is_killed_everywhere_ends_where_one_that_is_not_killed_ends(
    whole: Run, small: Path, chance: random.Random
) -> None:
    faults = [
        "SIGKILL packing 1",
        f"SIGKILL rollout {chance.randint(1, 8)}",
        "SIGKILL writing 2",
        "SIGKILL validation 2",
        f"SIGKILL end {chance.randint(1, 3)}",
        "SIGKILL replacing 2",
        "SIGKILL report 1",
    ]
    killed = Run(small, "killed", steps=6, options=LAST)
    through(killed, faults, begin=Forked)
    assert_ended_alike(killed, whole)


def test_signals_write_a_checkpoint_between_rollouts_and_end_the_process(whole: Run, small: Path) -> None:
    faults = {
        "SIGTERM sanity 1": 128 + signal.SIGTERM,
        "SIGTERM rollout 6": 128 + signal.SIGTERM,
        "SIGINT step 2": 128 + signal.SIGINT,
        "SIGINT validation 1": 128 + signal.SIGINT,
        "SIGINT,SIGINT rollout 3": -signal.SIGINT,
        "SIGTERM report 1": 128 + signal.SIGTERM,
    }
    stopped = Run(small, "stopped", steps=6, seconds=1000.0, options=LAST)
    through(stopped, faults, begin=Forked)
    assert_ended_alike(stopped, whole)
    assert stopped.printed().count("Stopped by SIGTERM. The same command with `--ckpt_path last` resumes") == 3
    assert "Traceback" not in stopped.printed()


def test_a_slurm_job_is_requeued_and_resumes_without_an_option(whole: Run, small: Path, tmp_path: Path) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked')
    scontrol.chmod(0o755)
    job = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    requeued = Run(small, "requeued", steps=6, seconds=1000.0)
    requeued.environment |= {f"SLURM_{name}": value for name, value in job.items()}
    requeued.environment["PATH"] = f"{scontrol.parent}:{os.environ['PATH']}"
    requeued.plan.write_text("SIGUSR1 rollout 5")
    assert ended(Forked(requeued)) == 128 + signal.SIGUSR1, requeued.printed()
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert read(requeued.last)[KEY]["rollouts"] == 3  # of two segments each; not torn
    requeued.environment["SLURM_RESTART_COUNT"] = "1"
    assert ended(Forked(requeued)) == 0, requeued.printed()
    assert_ended_alike(requeued, whole)


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
        assert process.poll() is None, f"through before it could be killed\n{run.printed()}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert ended(apart(run)) == 0, run.printed()


def time_of(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [LAST, TWO_RANKS], ids=["one rank", "two ranks"])
def test_a_run_that_is_killed_at_ten_random_times_ends_where_one_that_is_not_killed_ends(
    small: Path, chance: random.Random, options: Sequence[str]
) -> None:
    whole, killed = (Run(small, name, steps=150, options=options) for name in ("whole", "killed"))
    began = time.monotonic()
    process = apart(whole)
    while process.poll() is None and not whole.last.exists():
        time.sleep(0.01)
    training = time.monotonic()
    assert ended(process) == 0, whole.printed()
    to_start, to_train = training - began, time.monotonic() - training
    # two thirds of the run are over when the last kill comes, on average
    in_training = [(True, chance.uniform(0, to_train / 6)) for _ in range(8)]
    moments = [*in_training, *((False, chance.uniform(0, to_start)) for _ in range(2))]
    chance.shuffle(moments)
    kill_at(killed, moments)
    assert_ended_alike(killed, whole)


@pytest.mark.slow
def test_two_ranks_that_are_killed_everywhere_end_where_two_that_are_not_killed_end(small: Path) -> None:
    moments = ("packing 1", "rollout 5", "step 2", "writing 2", "end 2", "validation 2", "replacing 2", "report 1")
    whole, killed = (Run(small, name, steps=6, options=TWO_RANKS) for name in ("whole", "killed"))
    through(whole)
    through(killed, [f"SIGKILL {moment}" for moment in moments])
    assert_ended_alike(killed, whole)


@pytest.mark.slow
def test_a_signal_to_one_rank_or_to_both_stops_both(small: Path) -> None:
    faults = {
        "SIGTERM sanity 1": 128 + signal.SIGTERM,
        "SIGTERM rollout 5": 128 + signal.SIGTERM,
        "SIGINT step 1": 128 + signal.SIGINT,
        "SIGTERM validation 1": 128 + signal.SIGTERM,
        "SIGINT,SIGINT rollout 3": -signal.SIGINT,
        "SIGINT report 1": 128 + signal.SIGINT,
    }
    whole, stopped = (Run(small, name, steps=6, seconds=1000.0, options=TWO_RANKS) for name in ("whole", "stopped"))
    through(whole)
    through(stopped, faults)
    assert_ended_alike(stopped, whole)
    assert "Traceback" not in stopped.printed()
