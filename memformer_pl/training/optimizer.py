"""The optimizer and the learning-rate schedule of a run, and which parameters decay."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from memformer_pl.errors import OptionError, UsageError, require_sizes
from memformer_pl.training.lr_schedule import WARMUP_STEPS, WarmupCosine

OptimizerCallable = Callable[[Iterable], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01
"""Defaults of AdamW."""
MONITOR = "validation/loss"
"""The metric that a ``ReduceLROnPlateau`` without an attribute ``monitor`` follows."""
NO_DECAY: dict[type[nn.Module], tuple[str, ...]] = {
    nn.LayerNorm: ("weight", "bias"),
    nn.RMSNorm: ("weight",),
    nn.MultiheadAttention: ("bias_k", "bias_v"),
}
"""What modules of torch would declare as ``no_decay``: parameters that are not matrices, whatever their axes."""


FACTOR = "lr_factor"
"""In a group of the optimizer: its learning rate, as a multiple of that of the other groups."""
FALL = "lr_fall"
"""In a group of the optimizer: by what its learning rate is multiplied in the first step and in the last."""
Factor = float | tuple[float, float]
"""Of a learning rate: the same in all steps, or in the first step and in the last, and on a line between."""


class Optimization(NamedTuple):
    """The options of :class:`~memformer_pl.SegmentTask` that concern the optimizer.

    The first three configure the default AdamW and its schedule, and are refused beside another optimizer or schedule.
    The last one is a factor of the learning rate for each pattern of names of parameters.
    """

    learning_rate: float | None
    warmup_steps: int | None
    weight_decay: float | None
    optimizer: OptimizerCallable | None
    lr_scheduler: LRSchedulerCallable | None
    learning_rate_factors: Mapping[str, float] = {}

    def check(self) -> None:
        """Refuse impossible values, and options that would have no effect.

        Raises:
            UsageError: Names the option, its value, and what to set instead.
        """
        require_sizes(least=0, warmup_steps=self._warmup_steps)
        if not (0 < self._learning_rate < math.inf and 0 <= self._weight_decay < math.inf):
            given = f"learning_rate={self._learning_rate} and weight_decay={self._weight_decay}"
            raise UsageError(f"learning_rate must be above 0 and weight_decay at least 0, got {given}")
        for name, replaced_by, instead in (
            ("learning_rate", "optimizer", "lr"),
            ("weight_decay", "optimizer", "weight_decay"),
            ("warmup_steps", "lr_scheduler", "a warm-up of its own"),
        ):
            if getattr(self, name) is not None and getattr(self, replaced_by) is not None:
                raise UsageError(
                    f"{name}={getattr(self, name)} has no effect beside {replaced_by}: set {name} to null (in Python "
                    f"None), and {instead} in the init_args of {replaced_by}"
                )

    def build(self, module: nn.Module, *, total_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Build the optimizer of a module, and its schedule.

        Args:
            module: The module to optimize, in the groups of :func:`parameter_groups`.
            total_steps: Number of steps of the run; -1 for no limit.

        Raises:
            UsageError: A pattern of the factors matches no parameter, or one that another pattern matches.
        """
        groups = parameter_groups(module, self.learning_rate_factors)
        optimizer = self._adamw(groups) if self.optimizer is None else self.optimizer(groups)
        for group in optimizer.param_groups:
            if FACTOR in group:
                group["lr"] = group["lr"] * group[FACTOR]
        if self.lr_scheduler is not None:
            return optimizer, self.lr_scheduler(optimizer)
        return optimizer, WarmupCosine(optimizer, warmup_steps=self._warmup_steps, total_steps=total_steps)

    def restore_options(self, optimizer: Optimizer, module: nn.Module) -> None:
        """Set the falling factors of any optimizer, and the weight decay of AdamW, to those of this run, which may
        differ from those of the checkpoint.
        """
        built = parameter_groups(module, self.learning_rate_factors)
        falls = {parameter: group[FALL] for group in built if FALL in group for parameter in group["params"]}
        decayed = {parameter for group in built if "weight_decay" not in group for parameter in group["params"]}
        for group in optimizer.param_groups:  # a callback may have added some
            if (fall := next((falls[p] for p in group["params"] if p in falls), None)) is not None:
                group[FALL] = fall
            if self.optimizer is None and decayed.intersection(group["params"]):
                group["weight_decay"] = self._weight_decay

    def _adamw(self, groups: list[dict[str, Any]]) -> Optimizer:
        betas, decay = (0.9, 0.95), self._weight_decay
        return torch.optim.AdamW(groups, lr=self._learning_rate, weight_decay=decay, betas=betas, fused=True)

    @property
    def _learning_rate(self) -> float:
        return LEARNING_RATE if self.learning_rate is None else self.learning_rate

    @property
    def _weight_decay(self) -> float:
        return WEIGHT_DECAY if self.weight_decay is None else self.weight_decay

    @property
    def _warmup_steps(self) -> int:
        return WARMUP_STEPS if self.warmup_steps is None else self.warmup_steps


def parameter_groups(module: nn.Module, chosen: Mapping[str, float] = {}) -> list[dict[str, Any]]:
    """Split parameters into groups: those with the optimizer's weight decay, those without, and those with a learning
    rate of their own.

    Parameters of two axes or more decay: weights of linear maps, embeddings, recurrences and convolutions. Vectors do
    not: biases, scales of norms, a learned token. A class whose parameters have several axes but are not matrices, such
    as a set of learned vectors, lists their names in a tuple ``no_decay``. A class whose parameters need larger or
    smaller steps than all others, such as the gate of a head, gives their names a factor of the learning rate in a
    dictionary ``learning_rates``; they do not decay either. The factor multiplies the rate with which an optimizer is
    built: schedules keep it, unless they set rates themselves, as ``OneCycleLR`` does. A pair of factors is for the
    first step and the last; see :func:`falling_rates`.

    Args:
        module: The module to optimize.
        chosen: Further factors, by patterns of names of parameters, such as ``*.writer.*``. They multiply those that
            classes declare, and change nothing about what decays.

    Raises:
        UsageError: ``no_decay`` or ``learning_rates`` lists something that is not a parameter of that module, or a
            factor is not above 0 and finite, or modules that share a parameter give it two; or a pattern matches no
            parameter, or one that another pattern matches.
    """
    factors = learning_rate_factors(module)
    exempt = {parameter for part in module.modules() for parameter in not_decayed(part)} | factors.keys()
    decayed = {p for p in module.parameters() if p.dim() >= 2} - exempt
    groups = [[p for p in module.parameters() if p in decayed], []]
    groups[1] = [p for p in module.parameters() if p not in decayed and p not in factors]
    own = {factor: [p for p in module.parameters() if factors.get(p) == factor] for factor in factors.values()}
    declared: list[dict[str, Any]] = [
        {"params": groups[0]},
        {"params": groups[1], "weight_decay": 0.0},
        *({"params": own[factor], "weight_decay": 0.0, **_entry(factor)} for factor in sorted(own, key=_pair)),
    ]
    return set_apart(declared, module, chosen)


def set_apart(groups: list[dict[str, Any]], module: nn.Module, chosen: Mapping[str, float]) -> list[dict[str, Any]]:
    """Take the parameters that patterns match out of their groups, into groups with a further factor behind them.

    Raises:
        UsageError: As for :func:`parameter_groups`.
    """
    matches: dict[nn.Parameter, str] = {}
    apart = []
    for pattern, factor in chosen.items():
        found = {parameter: name for name, parameter in module.named_parameters() if fnmatchcase(name, pattern)}
        if not found or not 0 < factor < math.inf:
            names = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name, _ in module.named_parameters()))
            raise UsageError(
                f"learning_rate_factors: {pattern!r} with the factor {factor} must match a parameter, with a factor "
                f"above 0 and finite; the parameters are {names}"
            )
        if shared := matches.keys() & found.keys():
            twice = next(iter(shared))
            raise UsageError(
                f"learning_rate_factors: {pattern!r} and {matches[twice]!r} both match {found[twice]}: give it one"
            )
        matches |= dict.fromkeys(found, pattern)
        for group in groups:
            taken = [parameter for parameter in group["params"] if parameter in found]
            if taken:
                group["params"] = [parameter for parameter in group["params"] if parameter not in found]
                before = group.get(FALL, group.get(FACTOR, 1.0))
                scaled = tuple(factor * part for part in before) if isinstance(before, tuple) else factor * before
                apart.append({**group, "params": taken, **_entry(scaled)})
    return groups + apart


def not_decayed(part: nn.Module) -> list[nn.Parameter]:
    """The direct parameters of a module that its class, or a base class, lists in ``no_decay``."""
    return [parameter for parameter, _ in declared(part, "no_decay", tuple, NO_DECAY)]


@contextmanager
def falling_rates(optimizer: Optimizer, *, step: int, total_steps: int) -> Iterator[None]:
    """Multiply, for one step, the learning rates of groups whose factor falls; a schedule never sees the product.

    The factor goes on a line from its first value to its last, which it has in the last step of the run; without a
    last step it stays at the first.

    Args:
        optimizer: It is to take the step.
        step: Number of steps taken before.
        total_steps: Number of steps of the run; -1 for no limit.
    """
    rates = [(group, group["lr"]) for group in optimizer.param_groups if FALL in group]
    share = min(1.0, step / max(1, total_steps - 1)) if total_steps > 0 else 0.0
    for group, rate in rates:
        first, last = group[FALL]
        group["lr"] = rate * (first + (last - first) * share)
    try:
        yield
    finally:
        for group, rate in rates:
            group["lr"] = rate


def learning_rate_factors(module: nn.Module) -> dict[nn.Parameter, Factor]:
    """The factors that classes declare in ``learning_rates``."""
    factors: dict[nn.Parameter, Factor] = {}
    for part in module.modules():
        for parameter, factor in declared(part, "learning_rates", dict, {}):
            kind = type(part).__name__
            if not all(0 < each < math.inf for each in _pair(factor)):
                raise UsageError(f"{kind}.learning_rates must hold factors above 0 and finite, got {factor}")
            if factors.setdefault(parameter, factor) != factor:
                raise UsageError(
                    f"{kind}.learning_rates gives a parameter the factor {factor}, and another module that shares it "
                    f"{factors[parameter]}: give it one"
                )
    return factors


def _entry(factor: Factor) -> dict[str, Factor]:
    """The entry of a group with this factor."""
    return {FALL if isinstance(factor, tuple) else FACTOR: factor}


def _pair(factor: Factor) -> tuple[float, float]:
    """The factor in the first step and in the last."""
    return factor if isinstance(factor, tuple) else (factor, factor)


def declared(
    part: nn.Module, attribute: str, form: type[tuple] | type[dict], known: Mapping[type[nn.Module], Any]
) -> list[tuple[nn.Parameter, Any]]:
    """The direct parameters of a module that its class, or a base class, names in a class attribute, and what it says
    of each; None in a tuple.

    Args:
        part: The module.
        attribute: Name of the attribute.
        form: Its type: a tuple of names, or a dictionary.
        known: What classes that do not have the attribute would declare.

    Raises:
        UsageError: The attribute has another type, or names something that is not a direct parameter.
    """
    direct = dict(part.named_parameters(recurse=False, remove_duplicate=False))
    found: dict[str, Any] = {}
    for kind in reversed(type(part).__mro__):
        names = kind.__dict__.get(attribute, known.get(kind, form()))
        # a parameter that an option left out is None
        wrong = [name for name in names if name not in direct and getattr(part, name, "missing") is not None]
        if not isinstance(names, form) or wrong:
            what = "a tuple of names" if form is tuple else "a dictionary with names"
            raise UsageError(
                f"{kind.__name__}.{attribute} must be {what} of direct parameters of {type(part).__name__} "
                f"({', '.join(direct) or 'it has none'}), got {names!r}"
            )
        found |= names if isinstance(names, dict) else dict.fromkeys(names)
    return [(direct[name], said) for name, said in found.items() if name in direct]


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether an optimizer can skip a step by a flag that the host does not know: fused Adam and AdamW.

    Fused SGD cannot: if its first step is skipped, its momentum starts from uninitialized memory.
    """
    fused = all(group.get("fused") and not isinstance(group["lr"], Tensor) for group in optimizer.param_groups)
    return fused and isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


@contextmanager
def skipped_unless(take: Bool[Tensor, ""], optimizer: Optimizer) -> Iterator[None]:
    """Let :func:`skips_on_device` optimizers keep weights, moments and their count of steps where ``take`` is False.

    This is the flag that ``torch.amp.GradScaler`` sets for them.
    """
    optimizer.found_inf = (~take).float()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def reduce_on_plateau(scheduler: ReduceLROnPlateau, metrics: Mapping[str, Any]) -> None:
    """Advance a schedule with the metric that it follows.

    Raises:
        OptionError: The metric is not logged.
    """
    monitor = getattr(scheduler, "monitor", MONITOR)
    if monitor not in metrics:
        choices = ", ".join(sorted(metrics))
        raise OptionError(f"lr_scheduler monitors {monitor!r}, which is not logged: choose one of {choices}")
    scheduler.step(float(metrics[monitor]))
