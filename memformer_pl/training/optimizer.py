"""The optimizer of a run, and its learning rate."""

import math

import torch
from torch import nn

from memformer_pl.errors import UsageError

NO_DECAY: dict[type[nn.Module], tuple[str, ...]] = {
    nn.LayerNorm: ("weight", "bias"),
    nn.RMSNorm: ("weight",),
    nn.MultiheadAttention: ("bias_k", "bias_v"),
}
"""What torch's own modules would declare: scales and shifts that may have more than one axis."""


def adamw(module: nn.Module) -> torch.optim.AdamW:
    """AdamW in two groups: what decays, and what does not.

    Matrices decay: every parameter of two axes or more, such as the weights of linear maps, tables, recurrences and
    convolutions. Vectors do not: biases, scales of norms, a learned token. A class that owns parameters of several axes
    that are not matrices, such as a set of learned vectors, names them in a tuple ``no_decay``, and they do not decay.

    Raises:
        UsageError: ``no_decay`` names something that is not a parameter of that module.
    """
    left_out = {parameter for part in module.modules() for parameter in not_decayed(part)}
    decayed = {p for p in module.parameters() if p.dim() >= 2} - left_out
    groups = [[p for p in module.parameters() if p in decayed], [p for p in module.parameters() if p not in decayed]]
    return torch.optim.AdamW([{"params": group} for group in groups], betas=(0.9, 0.95), fused=True)


def not_decayed(part: nn.Module) -> list[nn.Parameter]:
    """The parameters that a module owns itself and whose class, or one above it, declares not to decay."""
    own = dict(part.named_parameters(recurse=False, remove_duplicate=False))
    declared: list[str] = []
    for kind in type(part).__mro__:
        names = kind.__dict__.get("no_decay", NO_DECAY.get(kind, ()))
        # an option may leave a parameter out: it is None then
        wrong = [name for name in names if name not in own and getattr(part, name, "missing") is not None]
        if isinstance(names, str) or wrong:
            raise UsageError(
                f"{kind.__name__}.no_decay must be a tuple of names of parameters that {type(part).__name__} owns "
                f"itself ({', '.join(own) or 'it owns none'}), got {names!r}"
            )
        declared += names
    return [own[name] for name in declared if name in own]


def pace(step: int, *, warmup_steps: int, steps: int) -> float:
    """The learning rate of a step, as a share of the highest.

    Args:
        step: How many steps came before.
        warm_up: Steps on which it rises, linearly.
        steps: At which it has fallen to a tenth, along a cosine; below 1, it does not fall.
    """
    rise = min(1.0, (step + 1) / (warmup_steps + 1))
    fall = 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / steps)) if steps > 0 else 1.0
    return rise * fall
