"""The default learning-rate schedule: linear warm-up, then a cosine."""

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from memformer_pl.errors import require_sizes


class WarmupCosine(LambdaLR):
    """Raise the learning rate linearly, then lower it along a cosine to a tenth.

    A resumed run takes the learning rate of its own configuration, and the place in the schedule of the checkpoint.

    Args:
        optimizer: Its learning rate is the highest of the schedule.
        warmup_steps: Steps on which the learning rate rises.
        total_steps: The step at which it reaches the tenth; -1 to keep it after the warm-up.
    """

    def __init__(self, optimizer: Optimizer, *, warmup_steps: int = 100, total_steps: int = -1) -> None:
        require_sizes(least=0, warmup_steps=warmup_steps)
        super().__init__(optimizer, lambda step: lr_factor(step, warmup_steps=warmup_steps, total_steps=total_steps))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the place in the schedule, but not the learning rate."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self._last_lr = [base * fn(self.last_epoch) for base, fn in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, base, rate in zip(self.optimizer.param_groups, self.base_lrs, self._last_lr, strict=True):
            group.update(lr=rate, initial_lr=base)


def lr_factor(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of a step, as a share of the highest.

    Args:
        step: How many steps came before.
        warmup_steps: Steps on which it rises, linearly.
        total_steps: At which it has fallen to a tenth, along a cosine; below 1, it does not fall.
    """
    rise = min(1.0, (step + 1) / (warmup_steps + 1))
    fall = 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / total_steps)) if total_steps > 0 else 1.0
    return rise * fall
