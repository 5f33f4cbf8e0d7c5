"""Resets of lanes that start a document: the same for every model, inside every step.

A reset depends on the segment alone and is part of the graph. So a resumed run resets where the first one did, and the
gradient reaches a learned initial state.
"""

import torch
from torch import Tensor

from memformer_pl.contract.segment import Segment
from memformer_pl.contract.state import S, State, as_state, select_lanes


def reset_at_document_start(segment: Segment, initial: S, state: S) -> S:
    """The state that enters a segment: ``initial`` in lanes that start a document, ``state`` in the others."""
    if segment.continues and not any(field.requires_grad for field in initial):
        # a learned initial state takes the other path: it gets a gradient of zero all the same
        return as_state(initial, _promoted(state, initial))
    return select_lanes(segment.document_start, initial, state)


def keep_lanes_without_tokens(segment: Segment, next_state: S, entering: S) -> S:
    """The state after a segment: lanes without a token keep the state that entered."""
    if segment.continues:
        return as_state(next_state, _promoted(next_state, entering))
    return select_lanes(segment.token_mask.any(1), next_state, entering)


def _promoted(state: State, other: State) -> list[Tensor]:
    """The fields of ``state``, with the dtypes that a choice of lanes between both would have."""
    return [a.to(torch.promote_types(a.dtype, b.dtype)) for a, b in zip(state, other, strict=True)]


def replace_memory(state: S, memory: S, *, unread: tuple[str, ...]) -> S:
    """``state`` with the memory of another state.

    Args:
        state: Gives the fields ``unread``.
        memory: Gives all other fields.
        unread: Names of fields that hold tokens which the model still has to read.
    """
    tokens = {name: getattr(state, name) for name in unread}
    return memory._replace(**tokens) if tokens else memory  # type: ignore[attr-defined]  # unread names fields
