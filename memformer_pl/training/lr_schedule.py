"""The default learning-rate schedule: linear warm-up, then a cosine."""

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from memformer_pl.errors import require_sizes

WARMUP_STEPS = 100
"""Unless told otherwise."""


class WarmupCosine(LambdaLR):
    """Raise the learning rate linearly, then lower it along a cosine to a tenth.

    A resumed run takes its step from the checkpoint, but the learning rate and the schedule from its own configuration.

    Args:
        optimizer: Its learning rate is the highest of the schedule.
        warmup_steps: Number of steps on which the learning rate rises.
        total_steps: Step at which the learning rate reaches a tenth; -1 to keep it constant after the warm-up.
    """

    def __init__(self, optimizer: Optimizer, *, warmup_steps: int = WARMUP_STEPS, total_steps: int = -1) -> None:
        require_sizes(least=0, warmup_steps=warmup_steps)
        super().__init__(optimizer, lambda step: lr_factor(step, warmup_steps=warmup_steps, total_steps=total_steps))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the step, but not the learning rate."""
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        self._last_lr = [base * fn(self.last_epoch) for base, fn in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, base, rate in zip(self.optimizer.param_groups, self.base_lrs, self._last_lr, strict=True):
            group.update(lr=rate, initial_lr=base)


def lr_factor(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of a step, as a fraction of the highest.

    Args:
        step: Number of steps taken before.
        warmup_steps: Number of steps on which it rises linearly.
        total_steps: Step at which it has fallen to a tenth along a cosine; if below 1, it does not fall.
    """
    rise = min(1.0, (step + 1) / (warmup_steps + 1))
    fall = 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / total_steps)) if total_steps > 0 else 1.0
    return rise * fall
