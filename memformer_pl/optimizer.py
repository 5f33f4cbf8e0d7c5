"""The optimizer of a run, and its learning rate."""

import math

import torch
from torch import nn


def adamw(module: nn.Module) -> torch.optim.AdamW:
    """AdamW in two groups: what decays, which are the weights of linear maps and tables, and the rest."""
    decayed = {part.weight for part in module.modules() if isinstance(part, nn.Linear | nn.Embedding)}
    groups = [[p for p in module.parameters() if p in decayed], [p for p in module.parameters() if p not in decayed]]
    return torch.optim.AdamW([{"params": group} for group in groups], betas=(0.9, 0.95), fused=True)


def pace(step: int, *, warm_up: int, steps: int) -> float:
    """The learning rate of a step, as a share of the highest.

    Args:
        step: How many steps came before.
        warm_up: Steps on which it rises, linearly.
        steps: At which it has fallen to a tenth, along a cosine; below 1, it does not fall.
    """
    rise = min(1.0, (step + 1) / (warm_up + 1))
    fall = 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / steps)) if steps > 0 else 1.0
    return rise * fall
