"""Faults that strike a run from inside at a planned moment, and what two runs that should have ended alike are compared by."""

import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memformer_pl.checkpoints import KEY

CONFIG = """
model: {{model: {{init_args: {{dropout: 0.2}}}}}}
trainer:
  max_steps: {steps}
  val_check_interval: 4
  check_val_every_n_epoch: null
  callbacks:
    - class_path: ClosingReport
    - {{class_path: faults.Fault, init_args: {{plan: {plan}}}}}
    - class_path: ModelCheckpoint
      init_args: {{filename: best, monitor: validation/bits_per_byte, enable_version_counter: false}}
    - {{class_path: LastCheckpoint, init_args: {{seconds: 0}}}}
  logger: {{init_args: {{name: {name}}}}}
"""


class Fault(Callback):
    """Sends its own process the first signal that is left in a plan, when the moment that goes with it has come.

    A line of the plan is a signal, a moment and a number: ``SIGKILL writing 3`` strikes half-way through the third file
    that this process writes. It is struck off just before. SIGKILL strikes the whole group of processes.
    """

    def __init__(self, plan: str) -> None:
        self.plan = Path(plan)
        lines = self.plan.read_text().splitlines()
        self.name, self.moment, left = (lines[0] if lines else "SIGKILL never 0").split()
        self.left = int(left)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            self.set_traps()

    def come(self, moment: str) -> None:
        """The moment has come once more."""
        self.left -= moment == self.moment
        if moment != self.moment or self.left != 0 or int(os.environ.get("LOCAL_RANK", "0")) != 0:
            return
        self.plan.write_text("\n".join(self.plan.read_text().splitlines()[1:]))
        number = signal.Signals[self.name]
        if number == signal.SIGKILL:
            assert os.getpgrp() == os.getpid(), "would kill what it was not asked to"
            os.killpg(os.getpgrp(), number)
        os.kill(os.getpid(), number)

    def set_traps(self) -> None:
        """Come to know of what callbacks are not told."""
        from memformer_pl.data import packing

        encode, save, replace = packing.encode, torch.save, Path.replace

        def encode_and_come(*args: Any, **kwargs: Any) -> Any:
            encoded = encode(*args, **kwargs)
            self.come("packing")
            return encoded

        def save_half_and_come(content: object, file: Any) -> None:
            save(content, file)
            file.flush()
            whole = file.tell()
            file.truncate(whole // 2)
            self.come("writing")
            file.seek(0)
            file.truncate()
            save(content, file)

        def come_and_replace(path: Path, target: Path) -> Path:
            self.come("replacing")
            return replace(path, target)

        packing.encode, torch.save, Path.replace = encode_and_come, save_half_and_come, come_and_replace

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The middle of a window is where the model reads."""

        def read(module: torch.nn.Module, _: object) -> None:
            if module.training:
                self.come("window")

        pl_module.model.register_forward_pre_hook(read)

    def on_before_optimizer_step(self, *_: object) -> None:
        self.come("step")

    def on_train_batch_end(self, *_: object) -> None:
        self.come("end")

    def on_validation_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.come("sanity" if trainer.sanity_checking else "validation")

    def on_train_end(self, *_: object) -> None:
        self.come("report")


def start(words: Sequence[str], log: Path) -> None:
    """What ``python -m memformer_pl`` does, in the present process, which becomes the leader of a group of its own."""
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["memformer_pl", *words]
    runpy.run_module("memformer_pl", run_name="__main__", alter_sys=True)


def content(path: Path) -> dict[str, Any]:
    """Of a checkpoint, what must not depend on how often a run was killed."""
    loaded: Mapping[str, Any] = torch.load(path, weights_only=True)
    kept = {name: loaded[name] for name in ("state_dict", "optimizer_states", "global_step", "epoch", KEY)}
    return {**kept, "corpus": loaded["loops"]["fit_loop"]["state_dict"]["combined_loader"]}


def figures(folder: Path) -> dict[tuple[str, int], float]:
    """What a run has logged, by name and step, but for how fast it was."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    names = [name for name in events.Tags()["scalars"] if not name.endswith("per_second")]
    return {(name, event.step): event.value for name in names for event in events.Scalars(name)}
