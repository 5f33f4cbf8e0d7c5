"""SIGKILL at any moment: the same command, given again until it is through, ends bit for bit where no kill would."""

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from runs import Forked, Run, apart, assert_ended_alike, ended, through

LAST = ("--ckpt_path", "last")
TWO_RANKS = (*LAST, "--trainer.strategy", "ddp", "--trainer.devices", "2")


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


def test_a_run_that_is_killed_everywhere_ends_where_one_that_is_not_killed_ends(small: Path) -> None:
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
    whole, killed = (Run(small, name, steps=12, options=LAST) for name in ("whole", "killed"))
    through(whole, begin=Forked)
    through(killed, faults, begin=Forked)
    assert_ended_alike(killed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("options", [LAST, TWO_RANKS], ids=["one rank", "two ranks"])
def test_a_run_that_is_killed_at_random_ends_where_one_that_is_not_killed_ends(
    small: Path, options: Sequence[str]
) -> None:
    seed = int(os.environ.get("KILLS", random.randrange(10**6)))
    print(f"KILLS={seed} pytest ... repeats this")  # shown where the test fails
    whole, killed = (Run(small, name, steps=300, options=options) for name in ("whole", "killed"))
    began = time.monotonic()
    process = apart(whole)
    while process.poll() is None and not whole.last.exists():
        time.sleep(0.01)
    training = time.monotonic()
    assert ended(process) == 0, whole.printed()
    to_start, to_train = training - began, time.monotonic() - training
    chance = random.Random(seed)
    # two thirds of the run are over when the last kill comes, on average
    in_training = [(True, chance.uniform(0, to_train / 6)) for _ in range(8)]
    moments = [*in_training, *((False, chance.uniform(0, to_start)) for _ in range(2))]
    chance.shuffle(moments)
    kill_at(killed, moments)
    assert_ended_alike(killed, whole)


@pytest.mark.slow
def test_two_ranks_that_are_killed_everywhere_end_where_two_that_are_not_killed_end(small: Path) -> None:
    moments = ("packing 1", "window 5", "step 2", "writing 2", "end 2", "validation 2", "replacing 2", "report 1")
    whole, killed = (Run(small, name, steps=12, options=TWO_RANKS) for name in ("whole", "killed"))
    through(whole)
    through(killed, [f"SIGKILL {moment}" for moment in moments])
    assert_ended_alike(killed, whole)
