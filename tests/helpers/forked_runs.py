"""Runs from the command line with planned faults, and a comparison of two runs that should end alike."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from identical import assert_identical
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memformer_pl.checkpoints.format import KEY

CONFIG = """
model: {{accumulate_grad_batches: 2, model: {{init_args: {{dropout: 0.2}}}}}}
trainer:
  max_steps: {steps}
  val_check_interval: 4
  check_val_every_n_epoch: null
  callbacks:
    - class_path: ClosingReport
    - {{class_path: faults.Fault, init_args: {{plan: {plan}}}}}
    - class_path: ModelCheckpoint
      init_args: {{filename: best, monitor: validation/bits_per_byte, enable_version_counter: false}}
    - {{class_path: LastCheckpoint, init_args: {{seconds: {seconds}}}}}
  logger: {{init_args: {{name: {name}}}}}
"""


class Run:
    """A command, the folder of its files, and the faults that are planned for it.

    Args:
        small: The configuration that this one is stacked on; its folder is used.
        name: Name of the run.
        steps: Number of optimizer steps, of two rollouts each.
        seconds: Time between two checkpoints.
        options: Further words of the command.
    """

    def __init__(
        self,
        small: Path,
        name: str,
        *,
        steps: int,
        seconds: float = 0.0,
        options: Sequence[str] = (),
    ) -> None:
        self.plan, self.log, self.cache, self.temporary, config = (
            small.with_name(f"{name}.{kind}") for kind in ("plan", "log", "cache", "tmp", "yaml")
        )
        self.folder = small.with_name(name) / "version_0"
        self.last, self.best = (self.folder / "checkpoints" / file for file in ("last.ckpt", "best.ckpt"))
        self.plan.touch()
        self.temporary.mkdir()
        config.write_text(CONFIG.format(name=name, steps=steps, seconds=seconds, plan=self.plan))
        files = ("--config", small, "--config", config, "--data.cache", self.cache)
        self.words = [str(word) for word in ("fit", *files, *options)]
        self.environment: dict[str, str] = {"TMPDIR": str(self.temporary)}

    def printed(self) -> str:
        return self.log.read_text()


class Forked:
    """A command in a process forked from one that has imported everything, which starts in a tenth of the time."""

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["memformer_pl.cli.lightning_cli", "memformer_pl.callbacks", "runs", "faults"])

    def __init__(self, run: Run) -> None:
        self.process: Any = self.server.Process(target=start, args=(run.words, run.log, run.environment))
        self.process.start()

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise TimeoutError(f"not finished within {timeout} seconds")
        return int(self.process.exitcode)


def start(words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """Do what ``python -m memformer_pl`` does in this process, which becomes the leader of its own group."""
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.argv = ["memformer_pl", *words]
    runpy.run_module("memformer_pl", run_name="__main__", alter_sys=True)


def apart(run: Run) -> subprocess.Popen[bytes]:
    """Start the command as a user does, in its own group of processes."""
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, "-m", "memformer_pl", *run.words]
    with run.log.open("a") as file:
        environment = {**os.environ, "PYTHONPATH": paths, **run.environment}
        return subprocess.Popen(words, env=environment, stdout=file, stderr=file, start_new_session=True)


def ended(process: Any) -> int:
    """Wait for a process and return its exit code; kill it if anything goes wrong."""
    try:
        return int(process.wait(timeout=600))
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def through(run: Run, faults: Mapping[str, int] | Sequence[str] = (), *, begin: Callable[[Run], Any] = apart) -> None:
    """Run the command once for each fault, and once more.

    Args:
        run: The run to complete.
        faults: Faults, each for one process, with the exit code of that process; by default that of SIGKILL.
        begin: Starts a process.
    """
    codes = dict(faults) if isinstance(faults, Mapping) else dict.fromkeys(faults, -signal.SIGKILL)
    run.plan.write_text("\n".join(codes))
    for left, expected in zip(range(len(codes), -1, -1), (*codes.values(), 0), strict=True):
        code = ended(begin(run))
        assert code == expected, f"{run.plan.read_text()}\n{run.printed()}"
        assert len(run.plan.read_text().splitlines()) == max(left - 1, 0), run.printed()


def content(path: Path) -> dict[str, Any]:
    """The part of a checkpoint that must not depend on interruptions."""
    loaded: Mapping[str, Any] = torch.load(path, weights_only=True)
    kept = {name: loaded[name] for name in ("state_dict", "optimizer_states", "global_step", "epoch", KEY)}
    return {**kept, "corpus": loaded["loops"]["fit_loop"]["state_dict"]["combined_loader"]}


def figures(run: Run) -> dict[tuple[str, int], float]:
    """What a run has logged, except speeds, for each metric and rollout."""
    events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0}).Reload()
    logged = {
        (name, event.step): event.value
        for name in events.Tags()["scalars"]
        if not name.endswith("per_second")
        for event in events.Scalars(name)
    }
    # in a rollout without a step, Lightning repeats what it has from the one before, if that was in the same process
    by_step = ("train/gradient_norm", "train/learning_rate", "train/skipped")
    return {key: value for key, value in logged.items() if key[0] not in by_step or key[1] % 2 == 1}


def assert_ended_alike(got: Run, expected: Run) -> None:
    """Equal bit for bit in everything except time, with no other files left on disk."""
    assert_identical(content(got.last), content(expected.last))
    assert_identical(content(got.best), content(expected.best))
    assert figures(got) == figures(expected)
    assert (got.folder / "documents.csv").read_bytes() == (expected.folder / "documents.csv").read_bytes()
    for run in (got, expected):
        assert sorted(path.name for path in run.last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
        assert not list(run.cache.glob("*.partial"))
        assert not list(run.temporary.iterdir())
