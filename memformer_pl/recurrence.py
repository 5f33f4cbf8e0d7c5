"""The contract that every model of this package keeps, and its vocabulary.

A *document* is cut into *segments*. A batch row, called a *lane*, follows one document after another, segment by
segment. What a model carries from one segment of a lane to the next is its *state*; Memformer's is a *memory*: all
the *slots* of a lane. What it says about a segment is a *reading*. The segments between two optimizer steps are a
*window* or *rollout*; their number is the *horizon*. *Retention* is the share of a slot that survives a write.

A model is one function, ``(segment, state) -> (reading, next state)``. Everything goes in and comes out: no attribute
of the module changes, and no argument is edited in place.

Letters of the axes, in annotations, in ``einops`` strings and as suffixes of names:

    B  lanes            L  tokens in a segment     M  slots          D  width
    H  heads            K  width of a head         N  layers         V  vocabulary
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from memformer_pl.sizes import require_sizes

State = tuple[Tensor, ...]
"""A flat (named) tuple of tensors, lanes first in each. Integer and boolean fields carry no gradient."""

S = TypeVar("S", bound=State)


class Segment(NamedTuple):
    """A slice of one document for every lane: what is to be predicted."""

    tokens: Int[Tensor, "B L"]
    """Token numbers, ``int64``; any valid number where not present."""
    present: Bool[Tensor, "B L"]
    """Which tokens exist. They stand at the left; a lane without any has nothing to read and keeps its state."""
    starts: Bool[Tensor, " B"]
    """Which lanes start a document here, and so begin from the initial state."""


class Reading(NamedTuple):
    """What a model says about a segment."""

    losses: Float[Tensor, "B L"]
    """Nats that each token costs; 0 where not present."""
    correct: Bool[Tensor, "B L"]
    """Whether the likeliest token was the right one; False where not present."""
    auxiliary: Float[Tensor, ""]
    """What the model asks to add to the mean loss; 0 for most."""


def like(state: S, tensors: Iterable[Tensor]) -> S:
    """``tensors`` in the tuple type of ``state``."""
    return state._make(tensors) if hasattr(state, "_make") else type(state)(tensors)


def choose(lanes: Bool[Tensor, " B"], there: S, elsewhere: S) -> S:
    """The state that is ``there`` in the marked lanes and ``elsewhere`` in the others, with the gradient of each."""
    pairs = zip(there, elsewhere, strict=True)
    return like(there, (torch.where(lanes.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))


def detach(state: S) -> S:
    """The same values without a graph."""
    return like(state, (tensor.detach() for tensor in state))


def side_by_side(tuples: Sequence[S]) -> S:
    """The lanes of several tuples in one; of a field that is None, none."""
    fields = zip(*tuples, strict=True)
    return like(tuples[0], (torch.cat(field) if isinstance(field[0], Tensor) else field[0] for field in fields))


def state_bytes(state: State) -> int:
    """Bytes that one lane carries from segment to segment."""
    return sum(tensor[0].numel() * tensor.element_size() for tensor in state)


class SegmentModel(nn.Module, ABC, Generic[S]):
    """A model that reads documents segment by segment and carries a state.

    A new model implements :meth:`initial_state` and :meth:`read`, and :meth:`write` where the next state costs less
    than the whole step. It keeps every value of its constructor as an attribute of the same name. Lanes that start a
    document and lanes without tokens are dealt with here, once for all models.

    Args:
        vocab: Size of the vocabulary. Token numbers are below it.
        segment_length: The most tokens that a segment may hold.
    """

    unread: ClassVar[tuple[str, ...]] = ()
    """Fields of the state that are no memory, but tokens that are still to be read. All others belong together."""

    def __init__(self, *, vocab: int, segment_length: int) -> None:
        super().__init__()
        require_sizes(vocab=vocab, segment_length=segment_length)
        self.vocab = vocab
        self.segment_length = segment_length

    @abstractmethod
    def initial_state(self, lanes: int) -> S:
        """The state before the first segment of a document, for each of ``lanes``; with a graph where it is learned."""

    @abstractmethod
    def read(self, segment: Segment, state: S) -> tuple[Reading, S]:
        """Read a segment from a state that is already reset where a document starts."""

    def write(self, segment: Segment, state: S) -> S:
        """The next state alone, as :meth:`read` gives it. Overridden where it needs only a part of the step.

        An override draws the same random numbers as :meth:`read` and leaves the random stream where :meth:`read`
        leaves it.
        """
        return self.read(segment, state)[1]

    def encode(self, segment: Segment, state: S) -> tuple[State, S]:
        """The first part of a step: what :meth:`decode` needs, lanes first, and the next state.

        Implemented, with :meth:`decode`, where the step has a part that is not on the way to the next state. It draws
        from the default random streams.

        Raises:
            TypeError: The step has no such part.
        """
        raise TypeError(f"{type(self).__name__} has no decoder that could be run apart")

    def decode(self, segment: Segment, encoded: Any) -> Reading:
        """The other part of a step, or of the steps of several segments, their lanes side by side.

        It draws, each segment by itself, from random streams of its own. What it asks to add to the loss is a sum over
        the segments.
        """
        raise TypeError(f"{type(self).__name__} has no decoder that could be run apart")

    def with_memory(self, state: S, memory: S) -> S:
        """The state with the memory of another state; what is still to be read stays its own."""
        own = {name: getattr(state, name) for name in self.unread}
        return memory._replace(**own) if own else memory  # type: ignore[attr-defined]  # unread has names of fields

    def forget(self, state: S) -> S:
        """The state without its memory: as at the start of a document, what is still to be read aside."""
        return self.with_memory(state, self.initial_state(len(state[0]))) if state else state

    def config(self) -> dict[str, int | float | str | bool | None]:
        """What the constructor was called with, and the name of the class."""
        names = list(inspect.signature(type(self)).parameters)
        return {"class": type(self).__name__, **{name: getattr(self, name) for name in names}}

    def forward(self, segment: Segment, state: S) -> tuple[Reading, S]:
        """Read one segment.

        Args:
            segment: At most ``segment_length`` tokens for each lane.
            state: What the previous call returned, or :meth:`initial_state`.

        Returns:
            The reading, and the state for the next segment.
        """
        entering = self._enter(segment, state)
        reading, leaving = self.read(segment, entering)
        return reading, choose(segment.present.any(1), leaving, entering)

    def advance(self, segment: Segment, state: S) -> S:
        """The state that ``forward`` would return, computed by no more than what it depends on."""
        entering = self._enter(segment, state)
        return choose(segment.present.any(1), self.write(segment, entering), entering)

    def advance_and_encode(self, segment: Segment, state: S) -> tuple[State, S]:
        """What :meth:`decode` needs to read a segment as ``forward`` does, and the state that ``forward`` returns."""
        entering = self._enter(segment, state)
        encoded, leaving = self.encode(segment, entering)
        return encoded, choose(segment.present.any(1), leaving, entering)

    def _enter(self, segment: Segment, state: S) -> S:
        lanes, length = segment.tokens.shape
        if length > self.segment_length:
            raise ValueError(f"a segment holds {length} tokens, more than segment_length={self.segment_length}")
        return choose(segment.starts, self.initial_state(lanes), state)
