"""The state that a model carries between segments, and functions of any state."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]
"""A flat (named) tuple of tensors, lanes first in each. Integer and boolean fields carry no gradient."""

S = TypeVar("S", bound=State)


def carries_gradient(field: Tensor) -> bool:
    """Whether gradients can flow through a field: it holds real or complex numbers."""
    return field.is_floating_point() or field.is_complex()


def as_state(like: S, tensors: Iterable[Tensor]) -> S:
    """``tensors`` in the tuple type of the state ``like``."""
    return like._make(tensors) if hasattr(like, "_make") else type(like)(tensors)


def select_lanes(lanes: Bool[Tensor, " B"], selected: S, others: S) -> S:
    """The lanes of ``selected`` where ``lanes`` is True, and those of ``others`` elsewhere; gradients reach both.

    A field that has grown further in one of them has rows of zeros in the lanes of the other.
    """
    pairs = zip(selected, others, strict=True)
    return as_state(selected, (a if a is b else _select(lanes, a, b) for a, b in pairs))


def _select(lanes: Bool[Tensor, " B"], a: Tensor, b: Tensor) -> Tensor:
    rows = [max(sizes) for sizes in zip(a.shape[1:], b.shape[1:], strict=True)]
    return torch.where(lanes.view(-1, *[1] * (a.dim() - 1)), grow_to(rows, a), grow_to(rows, b))


def grow_to(shape: Sequence[int], field: Tensor) -> Tensor:
    """A field with zeros behind its last rows, so that each lane has this shape."""
    missing = [wanted - size for wanted, size in zip(shape, field.shape[1:], strict=True)]
    padding = [number for more in reversed(missing) for number in (0, more)]
    return F.pad(field, padding) if any(missing) else field


def detach(state: S) -> S:
    """The same values without a graph."""
    return as_state(state, (tensor.detach() for tensor in state))


def concat_states(states: Sequence[S]) -> S:
    """Concatenate the lanes of several states; rows of zeros fill up a field that has grown further in another."""
    return as_state(states[0], (_concat(fields) for fields in zip(*states, strict=True)))


def _concat(fields: Sequence[Tensor]) -> Tensor:
    rows = [max(sizes) for sizes in zip(*(field.shape[1:] for field in fields), strict=True)]
    return torch.cat([grow_to(rows, field) for field in fields])


def take_lanes(state: S, lanes: Int[Tensor, " b"]) -> S:
    """Some lanes of a state, copied."""
    return as_state(state, (field[lanes] for field in state))


def put_lanes(whole: Tensor, lanes: Int[Tensor, " b"], part: Tensor) -> Tensor:
    """A field with other values in some lanes; rows of zeros fill up whichever has fewer rows."""
    rows = [max(sizes) for sizes in zip(whole.shape[1:], part.shape[1:], strict=True)]
    return grow_to(rows, whole).index_copy(0, lanes, grow_to(rows, part).to(whole.dtype))


def state_bytes(state: State) -> int:
    """Bytes that one lane carries from segment to segment."""
    return sum(tensor[0].numel() * tensor.element_size() for tensor in state)
