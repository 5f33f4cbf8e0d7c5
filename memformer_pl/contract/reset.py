"""Which lanes start from the initial state, and which keep theirs: the same for every model, inside every step.

A reset is arithmetic on the state, a function of the segment alone. So a resumed run resets where the first one did,
and the gradient reaches a learned initial state.
"""

from memformer_pl.contract.segment import Segment
from memformer_pl.contract.state import S, select_lanes


def reset_at_document_start(segment: Segment, initial: S, state: S) -> S:
    """The state that enters a segment: ``initial`` in the lanes that start a document here, ``state`` in the others."""
    return select_lanes(segment.document_start, initial, state)


def keep_where_nothing_was_read(segment: Segment, next_state: S, entering: S) -> S:
    """The state that leaves a segment: lanes without a token keep the one with which they entered."""
    return select_lanes(segment.token_mask.any(1), next_state, entering)


def replace_memory(state: S, memory: S, *, unread: tuple[str, ...]) -> S:
    """The state with the memory of another state.

    Args:
        state: Keeps its fields ``unread``.
        memory: All other fields come from here.
        unread: Fields that hold tokens which the model still has to read.
    """
    own = {name: getattr(state, name) for name in unread}
    return memory._replace(**own) if own else memory  # type: ignore[attr-defined]  # unread names fields
