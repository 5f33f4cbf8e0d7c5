"""The contract that every model of this package keeps, and its vocabulary. Knows none of its users.

A *document* is cut into *segments*. A batch row follows one document after another, segment by segment; such a row is
called a *lane*. A model carries a *state* from one segment of a lane to the next; Memformer's state is a *memory*: all
the *slots* of a lane. The *output* holds the loss of each token of a segment. The segments between two optimizer steps
are a *rollout*; their number is the *horizon*. *Retention* is the share of a slot that survives a write. Inference goes
token by token: *prefill* starts a segment, *decode* continues it, and a *KV cache* keeps what was computed in between.

A model is one function, ``(segment, state) -> (output, next state)``. It changes no attribute of the module, and
edits no argument in place except the cache in ``decode``.

Letters of the axes, in annotations, in ``einops`` strings and as suffixes of names:

    B  lanes            L  tokens in a segment     M  slots          D  width
    H  heads            K  width of a head         N  layers         V  vocabulary
    T  tokens of a piece of a segment
"""

from memformer_pl.contract.model import DecodingCache, SegmentModel
from memformer_pl.contract.segment import ABSENT, Segment, SegmentOutput, concat_segments
from memformer_pl.contract.state import (
    S,
    State,
    as_state,
    carries_gradient,
    concat_states,
    detach,
    grow_to,
    put_lanes,
    select_lanes,
    state_bytes,
    take_lanes,
)
from memformer_pl.contract.weight_loss import WeightLoss

__all__ = [
    "ABSENT",
    "DecodingCache",
    "S",
    "Segment",
    "SegmentModel",
    "SegmentOutput",
    "State",
    "WeightLoss",
    "as_state",
    "carries_gradient",
    "concat_segments",
    "concat_states",
    "detach",
    "grow_to",
    "put_lanes",
    "select_lanes",
    "state_bytes",
    "take_lanes",
]
