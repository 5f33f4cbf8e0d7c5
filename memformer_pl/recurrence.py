"""The contract that every model of this package keeps, and its vocabulary.

A *document* is cut into *segments*. A batch row, called a *lane*, follows one document after another, segment by
segment. What a model carries from one segment of a lane to the next is its *state*; Memformer's is a *memory*: all
the *slots* of a lane. What it says about a segment is a *reading*. The segments between two optimizer steps are a
*window* or *rollout*; their number is the *horizon*. *Retention* is the share of a slot that survives a write.
A trained model is used in a *session*, which reads and writes token by token; what is kept of a segment that is not
yet whole is a *draft*.

A model is one function, ``(segment, state) -> (reading, next state)``. Everything goes in and comes out: no attribute
of the module changes, and no argument is edited in place, a draft excepted.

Letters of the axes, in annotations, in ``einops`` strings and as suffixes of names:

    B  lanes            L  tokens in a segment     M  slots          D  width
    H  heads            K  width of a head         N  layers         V  vocabulary
    T  tokens of a piece of a segment
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl import contract_checks as checks
from memformer_pl.configured import Configured
from memformer_pl.sizes import LARGEST_WIDTH, require_sizes

if TYPE_CHECKING:
    from memformer_pl.session import Session

ABSENT = -1
"""Stands where there is no token."""

State = tuple[Tensor, ...]
"""A flat (named) tuple of tensors, lanes first in each. Integer and boolean fields carry no gradient."""

S = TypeVar("S", bound=State)
Model = TypeVar("Model", bound="SegmentModel")

Draft = tuple[Tensor, ...]
"""What a model keeps of a segment that is not yet whole: a flat (named) tuple of tensors, lanes first in each; a tensor
that is the same for all lanes may have one lane. It belongs to one session."""


class Segment(NamedTuple):
    """A slice of one document for every lane: what is to be predicted."""

    tokens: Int[Tensor, "B L"]
    """Token numbers, ``int64``; any valid number where not present."""
    present: Bool[Tensor, "B L"]
    """Which tokens exist. They stand at the left; a lane without any has nothing to read and keeps its state."""
    starts: Bool[Tensor, " B"]
    """Which lanes start a document here, and so begin from the initial state."""
    asked: Bool[Tensor, "B L"] | None = None
    """Which tokens are to be predicted, by default all. The others are given: they are read, and cost nothing."""

    @property
    def counted(self) -> Bool[Tensor, "B L"]:
        """Which tokens a reading is about: those that exist and are asked for."""
        return self.present if self.asked is None else self.present & self.asked


class Reading(NamedTuple):
    """What a model says about a segment."""

    losses: Float[Tensor, "B L"]
    """Nats that each token costs; 0 where none is asked for."""
    correct: Bool[Tensor, "B L"]
    """Whether the likeliest token was the right one; False where none is asked for."""
    auxiliary: Float[Tensor, ""]
    """What the model asks to add to the mean loss; 0 for most."""


def carries_gradient(field: Tensor) -> bool:
    """Whether a field is of real or complex numbers, through which a gradient can flow."""
    return field.is_floating_point() or field.is_complex()


def has_memory(state: State) -> bool:
    """Whether a state holds numbers that a model has computed, not only tokens that are still to be read."""
    return any(carries_gradient(field) and field.numel() for field in state)


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


def side_by_side(states: Sequence[S]) -> S:
    """The lanes of several states in one."""
    return like(states[0], (torch.cat(fields) for fields in zip(*states, strict=True)))


def segments_side_by_side(segments: Sequence[Segment]) -> Segment:
    """The lanes of several segments of the same length in one."""
    tokens, present, starts = (torch.cat(fields) for fields in zip(*(segment[:3] for segment in segments), strict=True))
    if all(segment.asked is None for segment in segments):
        return Segment(tokens, present, starts)
    return Segment(tokens, present, starts, torch.cat([segment.counted for segment in segments]))


def state_bytes(state: State) -> int:
    """Bytes that one lane carries from segment to segment."""
    return sum(tensor[0].numel() * tensor.element_size() for tensor in state)


class SegmentModel(Configured, ABC, Generic[S]):
    """A model that reads documents segment by segment and carries a state.

    A new model implements :meth:`initial_state` and :meth:`read`, :meth:`write` where the next state costs less than
    the whole step, and :meth:`begin` and :meth:`extend` to be used in sessions. It keeps every value of its constructor
    as an attribute of the same name. Lanes that start a document and lanes without tokens are dealt with here, once for
    all models.

    Args:
        vocab: Size of the vocabulary. Token numbers are below it.
        segment_length: The most tokens that a segment may hold.
    """

    unread: ClassVar[tuple[str, ...]] = ()
    """Fields of the state that are no memory, but tokens that are still to be read. All others belong together."""

    def __init__(self, *, vocab: int, segment_length: int) -> None:
        super().__init__()
        require_sizes(most=LARGEST_WIDTH, vocab=vocab, segment_length=segment_length)
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
        """The first part of a step: what :meth:`decode` needs, lanes first, and the next state. Implemented where the
        step has a part that is not on the way to the next state."""
        raise TypeError(f"{type(self).__name__} has no decoder that could be run apart")

    def decode(self, segment: Segment, encoded: Any) -> Reading:
        """The other part, of one segment or of several, their lanes side by side: each draws random numbers from a
        stream of its own, and what they ask to add to the loss is a sum."""
        raise TypeError(f"{type(self).__name__} has no decoder that could be run apart")

    def begin(self, state: S, lanes: int) -> tuple[Float[Tensor, "B V"], Draft]:
        """Begin to read a segment token by token, in evaluation mode and without gradient.

        Whatever stands in front of the segment, such as memory, is looked at here, once for all of its tokens.

        Args:
            state: Of each of ``lanes``.
            lanes: How many; a state may be empty.

        Returns:
            The logits of the first token, and a draft that holds no token yet.

        Raises:
            TypeError: The model has no such way to read.
        """
        raise TypeError(f"{type(self).__name__} cannot be read token by token: it implements no begin and extend")

    def extend(
        self, tokens: Int[Tensor, "B T"], present: Bool[Tensor, "B T"], draft: Draft
    ) -> tuple[Float[Tensor, "B V"], Draft]:
        """Read on in a segment: by the logits that :meth:`forward` has, with each token computed once.

        Args:
            tokens: What follows in each lane; any valid number where not present. At most ``segment_length - 1`` of a
                segment are read so: a whole one goes into the state by :meth:`advance`, and the next one begins.
            present: Which of them exist; they stand at the left. Lanes may be at different places in their segments.
            draft: From :meth:`begin` or from here. What it holds of its tokens stays; the room behind them may be
                written in place, so a draft is extended only once.

        Returns:
            The logits of the next token, without meaning in lanes where none is present, and the draft with the tokens.
        """
        raise TypeError(f"{type(self).__name__} cannot be read token by token: it implements no begin and extend")

    def open(self, path: str | os.PathLike[str] | None = None, *, lanes: int = 1) -> "Session":
        """A session: read and write text of any length, token by token.

        Args:
            path: A memory that :meth:`Session.save` has written, to go on from. By default a document starts.
            lanes: Texts that are read side by side; a saved memory has its own number of them.

        Raises:
            UsageError: The model is in training mode, or the file holds no memory of this model; says what differs.
        """
        from memformer_pl.session import Session

        return Session(self, lanes=lanes) if path is None else Session.load(self, path)

    def with_memory(self, state: S, memory: S) -> S:
        """The state with the memory of another state; what is still to be read stays its own."""
        own = {name: getattr(state, name) for name in self.unread}
        return memory._replace(**own) if own else memory  # type: ignore[attr-defined]  # unread has names of fields

    def forget(self, state: S) -> S:
        """The state without its memory: as at the start of a document, what is still to be read aside."""
        return self.with_memory(state, self.initial_state(len(state[0]))) if state else state

    def save_pretrained(self, folder: str | Path, *, tokenizer: str | None = None) -> None:
        """Write weights and configuration into a folder, see ``handover.py``.

        Args:
            folder: Is made.
            tokenizer: What ``Tokenizer.written`` gives for the tokenizer that the model was trained with.
        """
        from memformer_pl.handover import HandOver  # the hub takes a third of a second to import

        HandOver(self, tokenizer=tokenizer).save_pretrained(folder)

    @classmethod
    def from_pretrained(cls: type[Model], folder: str | Path) -> Model:
        """The model that :meth:`save_pretrained` wrote, in evaluation mode: of this class, or of one below it.

        Args:
            folder: On disk, or the name of a repository of the Hugging Face hub.

        Raises:
            UsageError: It cannot be had, is damaged, or holds another class.
        """
        from memformer_pl.handover import open_folder

        opened = open_folder(folder, kind=cls).module
        assert isinstance(opened, cls)
        return opened

    def forward(self, segment: Segment, state: S) -> tuple[Reading, S]:
        """Read one segment.

        Args:
            segment: At most ``segment_length`` tokens for each lane.
            state: What the previous call returned, or :meth:`initial_state`.

        Returns:
            The reading, and the state for the next segment.

        Raises:
            UsageError: Tokens are not at the left or not of the vocabulary (both are looked at on a CPU alone), or
                lanes, shapes or devices do not fit.
            TypeError: The segment or the state is of another kind, or :meth:`read` returns something else than it
                should.
        """
        entering = self._enter(segment, state)
        by = f"{type(self).__name__}.read"
        reading, leaving = checks.pair(self.read(segment, entering), by=by, first="reading")
        checks.check_reading(reading, Reading, segment.tokens.shape, by=by)
        return reading, self._leave(segment, leaving, entering, by="read")

    def advance(self, segment: Segment, state: S) -> S:
        """The state that ``forward`` would return, computed by no more than what it depends on."""
        entering = self._enter(segment, state)
        return self._leave(segment, self.write(segment, entering), entering, by="write")

    def advance_and_encode(self, segment: Segment, state: S) -> tuple[State, S]:
        """What :meth:`decode` needs to read a segment as ``forward`` does, and the state that ``forward`` returns."""
        entering = self._enter(segment, state)
        by = f"{type(self).__name__}.encode"
        encoded, leaving = checks.pair(self.encode(segment, entering), by=by, first="encoded")
        checks.check_encoded(encoded, by=by)
        return encoded, self._leave(segment, leaving, entering, by="encode")

    def _enter(self, segment: Segment, state: S) -> S:
        checks.check_segment(segment, Segment, vocab=self.vocab, segment_length=self.segment_length)
        initial = self.initial_state(len(segment.tokens))
        checks.check_entering(state, initial, segment.tokens, next(self.parameters(), None), model=type(self).__name__)
        return choose(segment.starts, initial, state)

    def _leave(self, segment: Segment, leaving: S, entering: S, *, by: str) -> S:
        checks.check_next_state(leaving, entering, by=f"{type(self).__name__}.{by}")
        return choose(segment.present.any(1), leaving, entering)
