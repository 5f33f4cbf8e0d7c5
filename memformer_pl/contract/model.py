"""The base class of every model: ``(segment, state) -> (output, next state)``."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic

from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl.contract import checks
from memformer_pl.contract.config import Configured
from memformer_pl.contract.reset import keep_lanes_without_tokens, replace_memory, reset_at_document_start
from memformer_pl.contract.segment import Segment, SegmentOutput
from memformer_pl.contract.state import S, State
from memformer_pl.errors import LARGEST_WIDTH, require_sizes

DecodingCache = tuple[Tensor, ...]
"""The cache of an unfinished segment between calls of ``decode``: a flat (named) tuple of tensors, lanes first. A
tensor that is the same for all lanes may have one lane. A cache belongs to one session."""


class SegmentModel(Configured, ABC, Generic[S]):
    """A model that reads documents segment by segment and carries a state.

    A new model implements :meth:`initial_state` and :meth:`step`, :meth:`advance_step` where the next state costs less
    than the whole step, and :meth:`prefill` and :meth:`decode` to be used in sessions. It keeps every argument of its
    constructor as an attribute of the same name. This base class resets lanes that start a document, and keeps the
    state of lanes without tokens.

    Args:
        vocab_size: Size of the vocabulary. Token numbers are below it.
        segment_length: The most tokens that a segment may hold.
    """

    unread: ClassVar[tuple[str, ...]] = ()
    """Names of the fields of the state that hold tokens still to be read. All other fields are memory."""

    def __init__(self, *, vocab_size: int, segment_length: int) -> None:
        super().__init__()
        require_sizes(most=LARGEST_WIDTH, vocab_size=vocab_size, segment_length=segment_length)
        self.vocab_size = vocab_size
        self.segment_length = segment_length

    @abstractmethod
    def initial_state(self, lanes: int) -> S:
        """The state before the first segment of a document, for ``lanes`` lanes; with a graph if it is learned."""

    @abstractmethod
    def step(self, segment: Segment, state: S) -> tuple[SegmentOutput, S]:
        """Compute the output and the next state, from a state that is already reset where a document starts."""

    def advance_step(self, segment: Segment, state: S) -> S:
        """The next state alone, equal to that of :meth:`step`. Override it if that costs less than the whole step.

        An override must draw the random numbers that :meth:`step` draws, and leave the random stream where
        :meth:`step` leaves it.
        """
        return self.step(segment, state)[1]

    def encode_step(self, segment: Segment, state: S) -> tuple[State, S]:
        """The first part of a step: the encoded segment for :meth:`decoder_step`, lanes first, and the next state.

        Implement it if a part of the step does not lead to the next state.
        """
        raise TypeError(f"{type(self).__name__} has no separate decoder")

    def decoder_step(self, segment: Segment, encoded: Any) -> SegmentOutput:
        """The second part of a step, for one segment or for several whose lanes are concatenated.

        Each segment must draw random numbers from a stream of its own; the auxiliary loss is a sum over segments.
        """
        raise TypeError(f"{type(self).__name__} has no separate decoder")

    def prefill(self, state: S, lanes: int) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Start a segment, in evaluation mode and without gradient: compute what precedes it, such as memory.

        Args:
            state: The state of ``lanes`` lanes.
            lanes: Number of lanes, since a state may be empty.

        Returns:
            The logits of the first token, and a cache without tokens.

        Raises:
            TypeError: The model does not implement it.
        """
        raise TypeError(f"{type(self).__name__} does not support sessions: it implements no prefill and decode")

    def decode(
        self, tokens: Int[Tensor, "B T"], token_mask: Bool[Tensor, "B T"], cache: DecodingCache
    ) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Continue a segment, with the logits of :meth:`forward`; each token is computed once.

        Args:
            tokens: The next tokens of each lane; any valid number where ``token_mask`` is False. Decode at most
                ``segment_length - 1`` tokens of a segment: :meth:`advance` reads a whole one into the state, and
                :meth:`prefill` starts the next.
            token_mask: Which of them exist, at the left. Lanes may have decoded different numbers of tokens.
            cache: From :meth:`prefill` or :meth:`decode`. It may be written in place, so use it only once.

        Returns:
            The logits of the next token, undefined in lanes without new tokens, and the cache with the tokens.
        """
        raise TypeError(f"{type(self).__name__} does not support sessions: it implements no prefill and decode")

    def with_memory(self, state: S, memory: S) -> S:
        """``state`` with the memory of another state; it keeps the tokens that are still to be read."""
        return replace_memory(state, memory, unread=self.unread)

    def reset_memory(self, state: S) -> S:
        """``state`` with the memory of a new document; it keeps the tokens that are still to be read."""
        return self.with_memory(state, self.initial_state(len(state[0]))) if state else state

    def forward(self, segment: Segment, state: S) -> tuple[SegmentOutput, S]:
        """Read one segment.

        Args:
            segment: At most ``segment_length`` tokens in each lane.
            state: Returned by the previous call, or by :meth:`initial_state`.

        Returns:
            The output, and the state for the next segment.

        Raises:
            UsageError: A token is outside the vocabulary or not at the left (checked on a CPU only), or lanes, shapes
                or devices do not fit.
            TypeError: The segment or the state has another type, or :meth:`step` returns other types than it should.
        """
        entering = self._enter(segment, state)
        by = f"{type(self).__name__}.step"
        output, next_state = checks.pair(self.step(segment, entering), by=by, first="output")
        checks.check_output(output, segment.tokens.shape, by=by)
        return output, self._leave(segment, next_state, entering, by="step")

    def advance(self, segment: Segment, state: S) -> S:
        """The next state that ``forward`` returns, without the output."""
        entering = self._enter(segment, state)
        return self._leave(segment, self.advance_step(segment, entering), entering, by="advance_step")

    def advance_and_encode(self, segment: Segment, state: S) -> tuple[State, S]:
        """The encoded segment for :meth:`decoder_step`, and the next state that ``forward`` returns."""
        entering = self._enter(segment, state)
        by = f"{type(self).__name__}.encode_step"
        encoded, next_state = checks.pair(self.encode_step(segment, entering), by=by, first="encoded")
        checks.check_encoded(encoded, by=by)
        return encoded, self._leave(segment, next_state, entering, by="encode_step")

    def _enter(self, segment: Segment, state: S) -> S:
        checks.check_segment(segment, vocab_size=self.vocab_size, segment_length=self.segment_length)
        initial = self.initial_state(len(segment.tokens))
        checks.check_entering(state, initial, segment.tokens, next(self.parameters(), None), model=type(self).__name__)
        return reset_at_document_start(segment, initial, state)

    def _leave(self, segment: Segment, next_state: S, entering: S, *, by: str) -> S:
        checks.check_next_state(next_state, entering, by=f"{type(self).__name__}.{by}")
        return keep_lanes_without_tokens(segment, next_state, entering)
