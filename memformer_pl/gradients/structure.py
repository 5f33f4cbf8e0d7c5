"""States of any structure: taken apart into leaves, put together again, and compared.

Leaves are tensors, numbers, strings and None. They may lie in tuples, lists, dictionaries and dataclasses, in a cache
of transformers, and in whatever else is registered with ``torch.utils._pytree``.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.utils._pytree import SUPPORTED_NODES

from memformer_pl.contract import carries_gradient
from memformer_pl.contract.checks import in_words

LEAF = (Tensor, bool, int, float, complex, str, type(None))
Path = tuple[Hashable, ...]
"""Leads from a state to one of its leaves."""


class Container(NamedTuple):
    """A container without its content. Holds no tensor."""

    kind: type
    parts: dict[Hashable, Optional["Container"]]
    """None stands for a leaf."""
    labels: tuple[str, ...]
    """How the parts are written in Python, such as ``.memory`` or ``[0]``."""
    make: Callable[[list[Any]], Any]
    """Makes a new container from parts."""


class FlatState(NamedTuple):
    """A state, taken apart."""

    structure: Container | None
    leaves: dict[Path, Any]

    def build(self) -> Any:
        """Put the state together, with new containers."""
        return _build(self.structure, self.leaves, ())

    def tensors(self) -> dict[Path, Tensor]:
        """The leaves that are tensors."""
        return {path: leaf for path, leaf in self.leaves.items() if isinstance(leaf, Tensor)}

    def map(self, change: Callable[[Path, Tensor], Tensor]) -> "FlatState":
        """The state with other tensors."""
        changed = {path: change(path, tensor) for path, tensor in self.tensors().items()}
        return self._replace(leaves=self.leaves | changed)

    def detach(self) -> "FlatState":
        """The state without a graph."""
        return self.map(lambda path, tensor: tensor.detach())

    def label(self, path: Path) -> str:
        """How a leaf is written in Python, such as ``state.memory`` or ``state[0]['keys']``."""
        written, structure = "state", self.structure
        for key in path:
            assert structure is not None
            written += structure.labels[list(structure.parts).index(key)]
            structure = structure.parts[key]
        return written

    def form(self) -> dict[Path, str]:
        """The value of each leaf; of a tensor its dtype, shape and device."""
        return {path: _form(leaf) for path, leaf in self.leaves.items()}


def flatten(state: object, *, what: str) -> FlatState:
    """Take a state apart.

    Args:
        state: The state.
        what: Name of the state, for the message.

    Raises:
        TypeError: It holds something else than leaves and containers; says where.
    """
    leaves: dict[Path, Any] = {}
    return FlatState(_visit(state, (), what, leaves), leaves)


def _visit(value: Any, path: Path, label: str, leaves: dict[Path, Any]) -> Container | None:
    """Add the leaves of a part of a state; return its structure."""
    if isinstance(value, LEAF):
        leaves[path] = value
        return None
    parts, labels, make = _open(value, label)
    named = zip(parts.items(), labels, strict=True)
    inner = {key: _visit(part, (*path, key), label + name, leaves) for (key, part), name in named}
    return Container(type(value), inner, tuple(labels), make)


def require_same_kind(after: FlatState, before: FlatState, *, by: str) -> None:
    """Raise unless a step returned a state of the structure, dtypes and devices of the one that it was given.

    Shapes and numbers may change, None may become anything, and a plain tuple may become a named one.

    Args:
        after: The state that it returned.
        before: The state that it was given.
        by: Name of the function, for the message.

    Raises:
        TypeError: They differ; says where, and what to do.
    """
    problem = _difference(before.structure, after.structure, before, after, ())
    if problem is not None:
        given, returned = in_words(before.build()), in_words(after.build())
        raise TypeError(
            f"{by} must return the next state like the one that it was given, {given}; it returned {returned} as the "
            f"next state: {problem}"
        )


def _difference(
    old: Container | None, new: Container | None, before: FlatState, after: FlatState, path: Path
) -> str | None:
    """The first difference between two structures, in words."""
    if old is None or new is None:
        return _leaf_difference(old, new, before, after, path)
    if not (old.kind is new.kind or (old.kind is tuple and issubclass(new.kind, tuple))):
        return f"{before.label(path)} was a {old.kind.__name__} and is a {new.kind.__name__}"
    if is_empty_cache(old):
        return None
    if old.parts.keys() != new.parts.keys():
        return f"{before.label(path)} had {len(old.parts)} parts and has {len(new.parts)}, or their names differ"
    found = (_difference(old.parts[key], new.parts[key], before, after, (*path, key)) for key in old.parts)
    return next((problem for problem in found if problem is not None), None)


def _leaf_difference(
    old: Container | None, new: Container | None, before: FlatState, after: FlatState, path: Path
) -> str | None:
    if old is None and before.leaves[path] is None:
        return None
    a = before.leaves[path] if old is None else old.kind
    b = after.leaves[path] if new is None else new.kind
    label = before.label(path)
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        kinds = [each if isinstance(each, type) else type(each) for each in (a, b)]
        same = kinds[0] is kinds[1] or set(kinds) <= {int, float}
        return None if same else f"{label} was of type {kinds[0].__name__} and is of type {kinds[1].__name__}"
    if a.dtype != b.dtype:
        return f"{label} was {_name(a.dtype)} and is {_name(b.dtype)}: return it with .to(torch.{_name(a.dtype)})"
    if a.device != b.device:
        return f"{label} was on {a.device} and is on {b.device}: return it with .to({str(a.device)!r})"
    return None


def versions(state: FlatState) -> dict[Path, int]:
    """How often each tensor of a state has been edited in place, as far as torch counts it."""
    return {path: tensor._version for path, tensor in state.tensors().items() if not tensor.is_inference()}


def require_unedited(state: FlatState, before: Mapping[Path, int], *, by: str) -> None:
    """Raise a ``TypeError`` if tensors of a state have been edited in place since ``before``, its :func:`versions`."""
    for path, version in versions(state).items():
        if version != before[path]:
            raise TypeError(
                f"{by} edited {state.label(path)} in place, but the state that enters a segment is read again in the "
                "second pass: return a new tensor, or edit a clone of it"
            )


def require_repeated(state: FlatState, before: Mapping[Path, str] | None, *, ahead: str) -> None:
    """Raise a ``TypeError`` if a step returns a state of another form than the first pass did.

    Args:
        state: Returned by the step.
        before: :meth:`FlatState.form` of the state that ``ahead`` returned in the first pass; None for the last
            segment, which that pass leaves out.
        ahead: ``advance``, or ``step`` if there is no ``advance``.
    """
    now = state.form()
    if before is not None and before != now:
        path = next(path for path in (*before, *now) if before.get(path) != now.get(path))
        label = state.label(path) if path in now else "a part"
        was, found = before.get(path, "nothing"), now.get(path, "nothing")
        raise TypeError(
            f"step must return the state that {ahead} returned for the same segment in the first pass, with {label} = "
            f"{was}; it returned {found}: a step may depend on nothing that changes between two calls"
        )


def _form(leaf: object) -> str:
    return f"{in_words(leaf)} on {leaf.device}" if isinstance(leaf, Tensor) else repr(leaf)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _build(structure: Container | None, leaves: Mapping[Path, Any], path: Path) -> Any:
    if structure is None:
        return leaves[path]
    return structure.make([_build(inner, leaves, (*path, key)) for key, inner in structure.parts.items()])


Opened = tuple[dict[Hashable, Any], Sequence[str], Callable[[list[Any]], Any]]
"""The parts of a container, their labels, and how to make a new one."""


def _open(value: Any, label: str) -> Opened:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _open_object(value, [field.name for field in dataclasses.fields(value)])
    if _is_cache(type(value)):
        return _open_cache(value)
    kind: Any = type(value)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return dict(enumerate(value)), [f".{name}" for name in kind._fields], kind._make
    if kind not in SUPPORTED_NODES:
        raise TypeError(
            f"{label} is a {kind.__name__}, but a state is made of tensors, numbers and None, in tuples, lists, "
            "dictionaries, dataclasses or a cache of transformers: take the tensors out, or register the class with "
            "torch.utils._pytree.register_pytree_node"
        )
    # not tree_flatten, which leaves the parts in a cycle of references, and so in memory until they are collected
    node = SUPPORTED_NODES[kind]
    parts, context = node.flatten_fn(value)
    keys: Sequence[Hashable] = list(value) if isinstance(value, dict) else range(len(parts))
    labels = [f"[{key!r}]" for key in keys]
    return dict(zip(keys, parts, strict=True)), labels, lambda parts: node.unflatten_fn(parts, context)


def _open_object(value: Any, names: Sequence[str]) -> Opened:
    """Open an object by its attributes."""
    emptied = copy.copy(value)
    for name in names:
        object.__setattr__(emptied, name, None)

    def make(parts: list[Any]) -> Any:
        made = copy.copy(emptied)
        for name, part in zip(names, parts, strict=True):
            object.__setattr__(made, name, part)
        return made

    return {name: getattr(value, name) for name in names}, [f".{name}" for name in names], make


def _is_cache(kind: type) -> bool:
    """Whether a class is a cache of transformers, which this package does not import."""
    module = sys.modules.get("transformers.cache_utils")
    return module is not None and issubclass(kind, (module.Cache, module.CacheLayerMixin))


def is_empty_cache(structure: Container) -> bool:
    """Whether this is a cache of transformers whose layers come with the first tokens."""
    return not structure.parts and _is_cache(structure.kind)


def _open_cache(value: Any) -> Opened:
    """Open a cache by its layers, and a layer by those attributes that can be parts of a state."""
    if not hasattr(value, "layers"):
        return _open_object(value, [name for name, part in vars(value).items() if _may_be_part(part)])
    emptied = copy.copy(value)
    emptied.layers = []

    def make(parts: list[Any]) -> Any:
        made = copy.copy(emptied)
        made.layers = parts
        return made

    layers: dict[Hashable, Any] = dict(enumerate(value.layers))
    return layers, [f".layers[{n}]" for n in layers], make


def _may_be_part(value: object) -> bool:
    return isinstance(value, (tuple, list, dict, *LEAF))


def leaf_of(tensor: Tensor, *, carries: bool) -> Tensor:
    """A tensor as a leaf of a new graph, which collects a gradient if ``carries`` and its numbers can have one."""
    return tensor.detach().requires_grad_(carries and carries_gradient(tensor))
