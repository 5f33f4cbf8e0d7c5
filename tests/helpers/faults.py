"""A callback that sends signals to its own process at planned moments."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer


class Fault(Callback):
    """Sends the first signal of a plan to its own process when the planned moment comes.

    A line of the plan is a signal, a moment and a number: ``SIGKILL writing 3`` acts half-way through the third file
    that this process writes. The line is removed just before. SIGKILL goes to the whole group of processes, and so does
    SIGINT, as from a terminal; other signals go to the first rank alone. Two signals, joined by a comma, are sent with
    a pause.
    """

    def __init__(self, plan: str) -> None:
        self.plan = Path(plan)
        lines = self.plan.read_text().splitlines()
        if lines and int(os.environ.get("LOCAL_RANK", "0")) == 0:
            self.signals, self.moment, left = lines[0].split()
            self.left = int(left)
            self.set_traps()
        else:
            self.moment = "never"

    def come(self, moment: str) -> None:
        """Count a moment, and act if it is the planned one."""
        if moment != self.moment:
            return
        self.left -= 1
        if self.left == 0:
            self.plan.write_text("\n".join(self.plan.read_text().splitlines()[1:]))
            for name in self.signals.split(","):
                self.strike(signal.Signals[name])
                time.sleep(1.1 * ("," in self.signals))

    def strike(self, number: int) -> None:
        if number in (signal.SIGKILL, signal.SIGINT):
            assert os.getpgrp() == os.getpid(), "would signal other processes"
            os.killpg(os.getpgrp(), number)
        else:
            os.kill(os.getpid(), number)

    def set_traps(self) -> None:
        """Hook into functions that have no callback."""
        from memformer_pl.data.packing import pack

        encode, save, replace = pack.encode, torch.save, Path.replace

        def encode_and_come(*args: Any, **kwargs: Any) -> Any:
            encoded = encode(*args, **kwargs)
            self.come("packing")
            return encoded

        def save_half_and_come(content: object, file: Any, **others: Any) -> None:
            save(content, file, **others)
            if others:  # not a file, but a tensor on its way to other ranks
                return
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

        pack.encode, torch.save, Path.replace = encode_and_come, save_half_and_come, come_and_replace

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The middle of a rollout is a forward pass of the model."""

        def read(module: torch.nn.Module, _: object) -> None:
            if module.training:
                self.come("rollout")

        pl_module.model.register_forward_pre_hook(read)

    def on_before_optimizer_step(self, *_: object) -> None:
        self.come("step")

    def on_train_batch_end(self, *_: object) -> None:
        self.come("end")

    def on_validation_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.come("sanity" if trainer.sanity_checking else "validation")

    def on_train_end(self, *_: object) -> None:
        self.come("report")
