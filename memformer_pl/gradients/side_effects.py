"""Capture and restore the side effects of a step, so that a second pass starts from the same values as the first.

Side effects are the default random streams, and the buffers of modules that change in a forward pass: running averages
(BatchNorm), the vectors of a power iteration (spectral norm), codebooks, counts. Attributes of modules that change are
not restored; a warning names them.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from memformer_pl.gradients.rng import RandomState

HOPS = 2
"""The most attributes that are followed on the way from a function to a module."""
CONTAINER = 100
"""Longer lists and dictionaries are taken for data and not searched for modules."""

CHANGES = -1
_watched: WeakSet[nn.Module] = WeakSet()
"""The modules whose attributes have been compared before and after a step."""
_versions: WeakKeyDictionary[nn.Module, dict[tuple[str, bool], int]] = WeakKeyDictionary()
"""The buffers seen in a rollout, by module, name and mode: the version of a constant, ``CHANGES`` for the others."""


class Buffer(NamedTuple):
    """A captured buffer of a module."""

    module: nn.Module
    name: str
    tensor: Tensor
    value: Tensor
    """A copy."""


class Captured(NamedTuple):
    """Captured random streams and buffers."""

    random: RandomState
    buffers: list[Buffer]

    def restore(self) -> None:
        """Restore them."""
        self.random.restore()
        restore(self.buffers)


class SideEffects:
    """The default random streams, and the buffers of the modules that functions refer to.

    A buffer that did not change in its first rollout is taken for a constant until torch counts another version of it,
    or its module switches between training and evaluation. So constants, however large, are copied once.

    Args:
        functions: Such as a step; see :func:`modules_of`.
    """

    modules: list[nn.Module]
    """The modules that the functions refer to."""
    placed: list[Tensor]
    """A tensor of theirs on each device: a step may draw there, though its inputs come from elsewhere."""

    def __init__(self, *functions: object) -> None:
        self.modules = modules_of(*functions)
        self._with_buffers = [module for module in self.modules if module._buffers]
        tensors = (each for part in self.modules for each in (*part._parameters.values(), *part._buffers.values()))
        self.placed = list({tensor.device: tensor for tensor in tensors if tensor is not None}.values())
        self._first: list[Buffer] = []
        self._last: dict[tuple[nn.Module, str], Tensor] = {}

    def capture(self, inputs: object) -> Captured:
        """Capture everything, including the streams of the devices of the modules and of the tensors in ``inputs``."""
        return Captured(RandomState.capture((inputs, self.placed)), self.buffers())

    def buffers(self) -> list[Buffer]:
        """Capture the buffers that change, or may change."""
        captured = [
            Buffer(module, name, tensor, self._copy(module, name, tensor))
            for module in self._with_buffers
            for name, tensor in module.named_buffers(recurse=False)
            if _changing(module, name, tensor) is not False
        ]
        self._first = self._first or captured
        return captured

    def end_rollout(self) -> None:
        """Note which of the new buffers changed in the rollout."""
        for module, name, tensor, value in self._first:
            if _changing(module, name, tensor) is None:
                unchanged = getattr(module, name) is tensor and torch.equal(tensor, value)
                _versions.setdefault(module, {})[name, module.training] = _version(tensor) if unchanged else CHANGES

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Warn, once for each module, of attributes that change in the body: they are not restored.

        Modules of torch itself keep in buffers what changes.
        """
        of_users = [module for module in self.modules if not type(module).__module__.startswith("torch.")]
        modules = [module for module in of_users if module not in _watched]
        before = [_attributes(module) for module in modules]
        yield
        _watched.update(modules)
        changed = [
            f"{type(module).__name__}.{name}"
            for module, attributes in zip(modules, before, strict=True)
            for name, mark in _attributes(module).items()
            if not _is_same(mark, attributes.get(name))
        ]
        if changed:
            warnings.warn(
                f"the step changes {', '.join(changed[:3])}{' and more' * (len(changed) > 3)}, and it runs twice for "
                "each segment: carry such values in the state, register tensors as buffers, which are restored, or log "
                "and count after the call",
                stacklevel=2,
            )

    def _copy(self, module: nn.Module, name: str, tensor: Tensor) -> Tensor:
        last = self._last.get((module, name))
        # compare only new buffers: a comparison waits for the device
        if last is None or _changing(module, name, tensor) or not torch.equal(last, tensor):
            last = self._last[module, name] = tensor.detach().clone()
        return last


def restore(buffers: list[Buffer]) -> None:
    """Restore buffers."""
    for module, name, tensor, value in buffers:
        if getattr(module, name) is not tensor:
            setattr(module, name, tensor)
        if _changing(module, name, tensor) or not torch.equal(tensor, value):
            # by ``data``, so that a graph that has saved the buffer does not refuse its backward pass
            tensor.data.copy_(value)


@contextmanager
def restored(side_effects: SideEffects, buffers: list[Buffer]) -> Iterator[None]:
    """Run the body on captured buffers, and restore the present ones."""
    present = side_effects.buffers()
    restore(buffers)
    try:
        yield
    finally:
        restore(present)


def modules_of(*functions: object) -> list[nn.Module]:
    """Find the modules that functions refer to, with their submodules.

    A function refers to what is in its closure, its defaults and its globals, to the object that it is bound to, and to
    the arguments of a ``partial``; also to the items of lists, tuples and dictionaries, to attributes of such objects,
    up to two in a row, and to whatever functions among all these refer to.
    """
    found: dict[nn.Module, None] = {}
    seen: dict[int, object] = {}
    waiting: list[tuple[object, int]] = [(function, 0) for function in functions]
    while waiting:
        value, hops = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # a reference, so that no other object gets its id
        if isinstance(value, nn.Module):
            found.update(dict.fromkeys(value.modules()))
        else:
            further = hops + (not isinstance(value, FunctionType | MethodType | partial | list | tuple | dict))
            waiting += [(referred, further) for referred in _references(value)] if further <= HOPS else []
    return list(found)


def _references(value: object) -> list[Any]:
    match value:
        case MethodType():
            return [value.__self__, value.__func__]
        case partial():
            return [value.func, *value.args, *value.keywords.values()]
        case FunctionType():
            return _references_of_function(value)
        case list() | tuple():
            return list(value) if len(value) <= CONTAINER else []
        case dict():
            return list(value.values()) if len(value) <= CONTAINER else []
        case type() | ModuleType() | Tensor():
            return []
    return list(getattr(value, "__dict__", {}).values())


def _references_of_function(function: FunctionType) -> list[Any]:
    """The closure, defaults and globals of a function; of functions among its globals, those of the same file."""
    closed = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # the cell is still empty
            closed.append(cell.cell_contents)
    named = [function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__]
    near = [v for v in named if not isinstance(v, FunctionType) or v.__globals__ is function.__globals__]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*closed, *defaults, *near]


def _names(code: CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _attributes(module: nn.Module) -> dict[str, tuple[object, int]]:
    """The attributes of a module apart from parameters, buffers and modules, with the version of tensors."""
    return {
        name: (value, _version(value) if isinstance(value, Tensor) else 0)
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules")
    }


def _is_same(mark: tuple[object, int], before: tuple[object, int] | None) -> bool:
    if before is None or mark[1] != before[1]:
        return False
    plain = isinstance(mark[0], bool | int | float | complex | str)
    return mark[0] is before[0] or (plain and mark[0] == before[0])


def _changing(module: nn.Module, name: str, tensor: Tensor) -> bool | None:
    """Whether a buffer changes in the present mode of its module; None if that is not known yet."""
    version = _versions.get(module, {}).get((name, module.training))
    return version == CHANGES or (False if version == _version(tensor) else None)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
