"""Fields of a state that only gain rows, such as a KV cache: stored once, with one buffer for their gradient.

A field of T states, each with the rows of the one before and some more, is held by the last. So each earlier one is a
view of its beginning, and the gradients of all of them are sums over the same rows::

    rows         0 ........ 4 ........ 8 ........ 12
    entering 1   ==========                             views of the field that enters the last segment
    entering 2   =====================
    entering 3   ================================
    gradient     added up in place, from the last segment to the first

Between two states, old rows are the same numbers. So their gradient need not pass through a step: what enters the graph
of a segment is the gradient of its new rows alone, and what comes out is added to that of the old rows.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memformer_pl.contract import checks
from memformer_pl.errors import UsageError
from memformer_pl.gradients.structure import Container, FlatState, Path, is_empty_cache

Axes = dict[Path, int]
"""The axis of the rows, for each leaf that grows."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Of a size in bytes."""
ASSERTED = 254
"""The most characters that CUDA takes for the message of an assertion."""


def axes_of(state: FlatState, growing: Any) -> Axes:
    """The growing leaves of a state.

    Args:
        state: The state.
        growing: A prefix of its structure: None, or an axis, for a leaf or for all tensors of a part. For a part that
            is not there yet, None in the state or a cache without layers, it may be anything. A dictionary may leave
            out what does not grow.

    Raises:
        UsageError: It is not; says where.
    """
    found: Axes = {}
    _find_axes(state, state.structure, growing, (), found)
    return found


def _find_axes(state: FlatState, structure: Container | None, prefix: Any, path: Path, found: Axes) -> None:
    if prefix is None:
        return
    if structure is None:
        leaf = state.leaves[path]
        if isinstance(leaf, Tensor):
            found[path] = _axis(leaf, prefix, state.label(path))
        return
    if is_empty_cache(structure):
        return
    if isinstance(prefix, tuple | list):
        prefixes: Mapping[Any, Any] = dict(enumerate(prefix))
        fits = prefixes.keys() == structure.parts.keys()
    else:
        prefixes = prefix if isinstance(prefix, Mapping) else dict.fromkeys(structure.parts, prefix)
        fits = prefixes.keys() <= structure.parts.keys()
    if not fits:
        raise UsageError(
            "growing must have the structure of the state, or an axis in place of a part: "
            f"{state.label(path)} has the parts {', '.join(structure.labels)}, got {prefix!r}"
        )
    for key in prefixes:
        _find_axes(state, structure.parts[key], prefixes[key], (*path, key), found)


def _axis(leaf: Tensor, axis: object, label: str) -> int:
    if not isinstance(axis, int):
        raise UsageError(f"growing must be an axis or None for {label}, got {axis!r}")
    if not -leaf.dim() <= axis < leaf.dim():
        raise UsageError(f"growing names axis {axis} of {label}, which has the shape {list(leaf.shape)}")
    return axis % leaf.dim()


def require_grown(after: FlatState, before: FlatState, axes: Axes, *, by: str) -> None:
    """Raise unless the growing leaves of ``after`` begin with those of ``before``.

    Shapes are checked anywhere; numbers on a CPU, bit by bit, and elsewhere by an assertion on the device, so that the
    host does not wait.

    Raises:
        TypeError: They do not; says which.
    """
    for path, axis in axes.items():
        old, new = before.leaves.get(path), after.leaves[path]
        if not isinstance(old, Tensor) or old is new:
            continue
        shape = [new.shape[n] if n == axis else size for n, size in enumerate(old.shape)]
        fits = list(new.shape) == shape and new.shape[axis] >= old.shape[axis]
        kept = _same_bits(new.narrow(axis, 0, old.shape[axis]), old) if fits else torch.tensor(False)
        told = (
            f"growing says that {after.label(path)} only gains rows along axis {axis}, but {by} was given "
            f"{list(old.shape)} and returned {list(new.shape)}, {'with other' if fits else 'without the'} old rows: "
            "return them as they are, with new ones behind them, or leave the field out of growing"
        )
        if not checks.has_values(kept):
            torch._assert_async(kept, told[:ASSERTED])
        elif not kept:
            raise TypeError(told)


@torch.no_grad()
def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Whether two tensors have the same bits, so that a NaN is equal to itself; on their device."""
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    size = a.element_size()
    return (a.view(INTEGERS[size]) == b.view(INTEGERS[size])).all()


class Rows(NamedTuple):
    """Stands for a growing leaf: the first rows of its last value."""

    axis: int
    rows: int


class Storage:
    """The states that enter the segments of a rollout, in order.

    Args:
        growing: A prefix of the structure of a state; see :func:`axes_of`.
    """

    def __init__(self, growing: Any) -> None:
        self._growing = growing
        self._states: list[FlatState] = []
        self._last: dict[Path, Tensor] = {}

    def push(self, state: FlatState) -> None:
        """Store a state. Its growing leaves replace those of the states before it."""
        axes = self.hold(state)
        rows = {path: Rows(axis, state.leaves[path].shape[axis]) for path, axis in axes.items()}
        self._states.append(state._replace(leaves=state.leaves | rows))

    def hold(self, state: FlatState) -> Axes:
        """Let the growing leaves of a later state hold the rows of all; return their axes."""
        axes = axes_of(state, self._growing)
        self._last |= {path: state.leaves[path].detach() for path in axes}
        return axes

    def pop(self) -> FlatState:
        """Remove the last state; its growing leaves are views."""
        state = self._states.pop()
        rows = {path: leaf for path, leaf in state.leaves.items() if isinstance(leaf, Rows)}
        views = {path: self._last[path].narrow(axis, 0, count) for path, (axis, count) in rows.items()}
        return state._replace(leaves=state.leaves | views)


class GradientBuffers:
    """The gradient of growing leaves, added up from the last segment to the first."""

    def __init__(self, growing: Any) -> None:
        self._growing = growing
        self._buffers: dict[Path, Tensor] = {}

    def collect(self, entering: FlatState) -> tuple[FlatState, set[Path]]:
        """A state whose growing tensors add their gradient to the buffers, and their paths."""
        collecting: dict[Path, Tensor] = {}
        axes = axes_of(entering, self._growing)
        for path, axis in axes.items():
            rows = entering.leaves[path]
            if rows.requires_grad:
                if path not in self._buffers:  # the last segment, with most rows, comes first
                    self._buffers[path] = torch.zeros_like(rows, memory_format=torch.contiguous_format)
                into = self._buffers[path].narrow(axis, 0, rows.shape[axis])
                graph = rows.new_zeros((), requires_grad=True)
                collecting[path] = _Collecting.apply(rows.detach(), into, graph)  # type: ignore[no-untyped-call]
        return entering._replace(leaves=entering.leaves | collecting), set(axes)

    def roots(self, next_state: FlatState, entering: FlatState) -> list[tuple[Tensor, Tensor]]:
        """Roots of a backward call that pass on the gradient of the rows that a segment has added.

        A hook adds it when the gradient of its field is computed, so that no field of zeros waits for that.
        """
        roots = []
        for path, axis in axes_of(next_state, self._growing).items():
            field, buffer, old = next_state.leaves[path], self._buffers.get(path), entering.leaves.get(path)
            first = old.shape[axis] if isinstance(old, Tensor) else 0
            count = field.shape[axis] - first
            # the last segment adds rows that nothing reads
            if buffer is not None and count and field.shape[axis] <= buffer.shape[axis] and field.requires_grad:
                field.register_hook(partial(_add_rows, rows=buffer.narrow(axis, first, count), axis=axis, first=first))
                roots.append((field, field.new_zeros(()).expand_as(field)))
        return roots

    def of(self, state: FlatState) -> dict[Path, Tensor]:
        """The gradient of the growing leaves of a state."""
        axes = axes_of(state, self._growing)
        grown = {path: axis for path, axis in axes.items() if path in self._buffers}
        return {
            path: self._buffers[path].narrow(axis, 0, state.leaves[path].shape[axis]) for path, axis in grown.items()
        }


class _Collecting(torch.autograd.Function):
    """Rows whose gradient is added to a buffer.

    A leaf would not do: its gradient may not lie inside of a larger tensor.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, buffer: Tensor, graph: Tensor) -> Tensor:
        """The rows; ``graph`` is any number that requires a gradient."""
        ctx.buffer = buffer
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        """Add the gradient."""
        ctx.buffer.add_(grad)
        return None, None, None


def _add_rows(grad: Tensor, *, rows: Tensor, axis: int, first: int) -> Tensor:
    total = grad.clone(memory_format=torch.contiguous_format)
    total.narrow(axis, first, rows.shape[axis]).add_(rows)
    return total
