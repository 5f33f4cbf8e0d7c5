"""The state that a model carries between segments, and functions of any state."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

State = tuple[Tensor, ...]
"""A flat (named) tuple of tensors, lanes first in each. Integer and boolean fields carry no gradient."""

S = TypeVar("S", bound=State)


def carries_gradient(field: Tensor) -> bool:
    """Whether gradients can flow through a field: it holds real or complex numbers."""
    return field.is_floating_point() or field.is_complex()


def has_memory(state: State) -> bool:
    """Whether a state holds computed numbers, and not only tokens that are still to be read."""
    return any(carries_gradient(field) and field.numel() for field in state)


def as_state(like: S, tensors: Iterable[Tensor]) -> S:
    """``tensors`` in the tuple type of the state ``like``."""
    return like._make(tensors) if hasattr(like, "_make") else type(like)(tensors)


def select_lanes(lanes: Bool[Tensor, " B"], selected: S, others: S) -> S:
    """The lanes of ``selected`` where ``lanes`` is True, and those of ``others`` elsewhere; gradients reach both."""
    pairs = zip(selected, others, strict=True)
    return as_state(selected, (torch.where(lanes.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))


def detach(state: S) -> S:
    """The same values without a graph."""
    return as_state(state, (tensor.detach() for tensor in state))


def concat_states(states: Sequence[S]) -> S:
    """Concatenate the lanes of several states."""
    return as_state(states[0], (torch.cat(fields) for fields in zip(*states, strict=True)))


def state_bytes(state: State) -> int:
    """Bytes that one lane carries from segment to segment."""
    return sum(tensor[0].numel() * tensor.element_size() for tensor in state)
