"""What a step changes besides what it returns, put back so that a second pass finds what the first one found.

These are the default random streams, and the buffers of modules that change in a forward pass: running averages
(BatchNorm), the vectors of a power iteration (spectral norm), codebooks, counts.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from memformer_pl.gradients.rng import RandomState

HOPS = 2
"""From an object to what its attributes hold: how often, on the way from a function to a module."""
CONTAINER = 100
"""A list or dictionary that is longer holds data, and is not searched for modules."""

CHANGES = -1
_versions: WeakKeyDictionary[nn.Module, dict[tuple[str, bool], int]] = WeakKeyDictionary()
"""Of the buffers that were seen in a rollout, by name and training mode: the version of one that stayed as it was, and
``CHANGES`` for the others."""


class Buffer(NamedTuple):
    """A buffer of a module as it stood."""

    module: nn.Module
    name: str
    tensor: Tensor
    value: Tensor
    """A copy."""


class Captured(NamedTuple):
    """Where the random streams stood, and the buffers."""

    random: RandomState
    buffers: list[Buffer]

    def restore(self) -> None:
        """Put them back."""
        self.random.restore()
        restore(self.buffers)


class SideEffects:
    """The default random streams, and the buffers of the modules that some functions refer to.

    A buffer that did not change in the first rollout in which it was seen is taken to be a constant until torch counts
    another version of it, or its module changes between training and evaluation. So constants, however large, are
    copied once.

    Args:
        functions: Such as a step; see :func:`modules_of`.
    """

    def __init__(self, *functions: object) -> None:
        self._modules = [module for module in modules_of(*functions) if module._buffers]
        self._first: list[Buffer] = []
        self._last: dict[tuple[nn.Module, str], Tensor] = {}

    def capture(self, inputs: object) -> Captured:
        """Where all of it stands, the streams of the devices of the tensors in ``inputs`` included."""
        return Captured(RandomState.capture(inputs), self.buffers())

    def buffers(self) -> list[Buffer]:
        """The buffers that change, or may."""
        found = [
            Buffer(module, name, tensor, self._copy(module, name, tensor))
            for module in self._modules
            for name, tensor in module.named_buffers(recurse=False)
            if _changing(module, name, tensor) is not False
        ]
        self._first = self._first or found
        return found

    def judge(self) -> None:
        """After a rollout: note which of the buffers that were new have changed in it."""
        for module, name, tensor, value in self._first:
            if _changing(module, name, tensor) is None:
                same = getattr(module, name) is tensor and torch.equal(tensor, value)
                _versions.setdefault(module, {})[name, module.training] = _version(tensor) if same else CHANGES

    def _copy(self, module: nn.Module, name: str, tensor: Tensor) -> Tensor:
        last = self._last.get((module, name))
        # only of one that is new: to compare values is to wait for the device
        if last is None or _changing(module, name, tensor) or not torch.equal(last, tensor):
            last = self._last[module, name] = tensor.detach().clone()
        return last


def restore(buffers: list[Buffer]) -> None:
    """Put buffers back to where they stood."""
    for module, name, tensor, value in buffers:
        if getattr(module, name) is not tensor:
            setattr(module, name, tensor)
        if _changing(module, name, tensor) or not torch.equal(tensor, value):
            # by ``data``: a graph that has saved the buffer did not see this pass, and need not be told
            tensor.data.copy_(value)


@contextmanager
def restored(side_effects: SideEffects, buffers: list[Buffer]) -> Iterator[None]:
    """Run the body on buffers as they stood, and put them back to where they stand now."""
    now = side_effects.buffers()
    restore(buffers)
    try:
        yield
    finally:
        restore(now)


def modules_of(*functions: object) -> list[nn.Module]:
    """The modules that functions refer to, with all that are in them.

    Those are found that a function has in its closure, its defaults or as a global, that it is bound to, or that are an
    argument of a ``partial``; also inside a list, tuple or dictionary, as an attribute of an object that a function
    refers to, or one attribute further; and those of the functions to which it refers in the same way.
    """
    found: dict[nn.Module, None] = {}
    seen: dict[int, object] = {}
    waiting: list[tuple[object, int]] = [(function, 0) for function in functions]
    while waiting:
        value, hops = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # kept, so that no other object gets its id
        if isinstance(value, nn.Module):
            found.update(dict.fromkeys(value.modules()))
        else:
            further = hops + (not isinstance(value, FunctionType | MethodType | partial | list | tuple | dict))
            waiting += [(held, further) for held in _held(value)] if further <= HOPS else []
    return list(found)


def _held(value: object) -> list[Any]:
    match value:
        case MethodType():
            return [value.__self__, value.__func__]
        case partial():
            return [value.func, *value.args, *value.keywords.values()]
        case FunctionType():
            return _referred(value)
        case list() | tuple():
            return list(value) if len(value) <= CONTAINER else []
        case dict():
            return list(value.values()) if len(value) <= CONTAINER else []
        case type() | ModuleType() | Tensor():
            return []
    return list(getattr(value, "__dict__", {}).values())


def _referred(function: FunctionType) -> list[Any]:
    """What a function refers to; of the functions among its globals, those of the same file."""
    closed = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty as yet
            closed.append(cell.cell_contents)
    named = [function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__]
    near = [v for v in named if not isinstance(v, FunctionType) or v.__globals__ is function.__globals__]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*closed, *defaults, *near]


def _names(code: CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _changing(module: nn.Module, name: str, tensor: Tensor) -> bool | None:
    """Whether a buffer changes in this mode of its module; None if that is not known yet."""
    version = _versions.get(module, {}).get((name, module.training))
    return version == CHANGES or (False if version == _version(tensor) else None)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
