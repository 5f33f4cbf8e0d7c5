"""The base class of every model: ``(segment, state) -> (output, next state)``."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic

from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl.contract import checks
from memformer_pl.contract.config import Configured
from memformer_pl.contract.reset import keep_where_nothing_was_read, replace_memory, reset_at_document_start
from memformer_pl.contract.segment import Segment, SegmentOutput
from memformer_pl.contract.state import S, State
from memformer_pl.errors import LARGEST_WIDTH, require_sizes

DecodingCache = tuple[Tensor, ...]
"""What a model keeps of an unfinished segment between calls of ``decode``: a flat (named) tuple of tensors, lanes first
in each; a tensor that is the same for all lanes may have one lane. It belongs to one session."""


class SegmentModel(Configured, ABC, Generic[S]):
    """A model that reads documents segment by segment and carries a state.

    A new model implements :meth:`initial_state` and :meth:`step`, :meth:`advance_step` where the next state costs less
    than the whole step, and :meth:`prefill` and :meth:`decode` to be used in sessions. It keeps every value of its
    constructor as an attribute of the same name. This class handles lanes that start a document and lanes without
    tokens, once for all models.

    Args:
        vocab_size: Size of the vocabulary. Token numbers are below it.
        segment_length: The most tokens that a segment may hold.
    """

    unread: ClassVar[tuple[str, ...]] = ()
    """Fields of the state that hold tokens which the model still has to read. All other fields are its memory."""

    def __init__(self, *, vocab_size: int, segment_length: int) -> None:
        super().__init__()
        require_sizes(most=LARGEST_WIDTH, vocab_size=vocab_size, segment_length=segment_length)
        self.vocab_size = vocab_size
        self.segment_length = segment_length

    @abstractmethod
    def initial_state(self, lanes: int) -> S:
        """The state before the first segment of a document, for each of ``lanes``; with a graph where it is learned."""

    @abstractmethod
    def step(self, segment: Segment, state: S) -> tuple[SegmentOutput, S]:
        """Read a segment from a state that is already reset where a document starts."""

    def advance_step(self, segment: Segment, state: S) -> S:
        """The next state alone, as :meth:`step` gives it. Override it where that takes only a part of the step.

        An override draws the same random numbers as :meth:`step` and leaves the random stream where :meth:`step`
        leaves it.
        """
        return self.step(segment, state)[1]

    def encode_step(self, segment: Segment, state: S) -> tuple[State, S]:
        """The first part of a step: what :meth:`decoder_step` needs, lanes first, and the next state.

        Implement it where the step has a part that the next state does not depend on.
        """
        raise TypeError(f"{type(self).__name__} has no separate decoder")

    def decoder_step(self, segment: Segment, encoded: Any) -> SegmentOutput:
        """The other part, for one segment or for several whose lanes are concatenated.

        Each segment draws random numbers from its own stream, and the auxiliary loss is a sum over segments.
        """
        raise TypeError(f"{type(self).__name__} has no separate decoder")

    def prefill(self, state: S, lanes: int) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Start a segment, in evaluation mode and without gradient: read what stands in front of it, such as memory.

        Args:
            state: The state of each of ``lanes``.
            lanes: How many; a state may be empty.

        Returns:
            The logits of the first token, and a cache that holds no token yet.

        Raises:
            TypeError: The model does not implement it.
        """
        raise TypeError(f"{type(self).__name__} cannot be read token by token: it implements no prefill and decode")

    def decode(
        self, tokens: Int[Tensor, "B T"], token_mask: Bool[Tensor, "B T"], cache: DecodingCache
    ) -> tuple[Float[Tensor, "B V"], DecodingCache]:
        """Continue a segment, with the logits that :meth:`forward` has; each token is computed once.

        Args:
            tokens: The next tokens of each lane; any valid number where ``token_mask`` is False. Decode at most
                ``segment_length - 1`` tokens of a segment: a whole one goes into the state by :meth:`advance`, and the
                next one starts with :meth:`prefill`.
            token_mask: Which of them exist; they stand at the left. Lanes may be at different places in their segments.
            cache: From :meth:`prefill` or from here. The room behind its tokens may be written in place, so decode with
                a cache only once.

        Returns:
            The logits of the next token, without meaning in lanes that got none, and the cache with the tokens.
        """
        raise TypeError(f"{type(self).__name__} cannot be read token by token: it implements no prefill and decode")

    def with_memory(self, state: S, memory: S) -> S:
        """The state with the memory of another state; it keeps its own tokens that are still to be read."""
        return replace_memory(state, memory, unread=self.unread)

    def reset_memory(self, state: S) -> S:
        """The state with its memory as at the start of a document; it keeps the tokens that are still to be read."""
        return self.with_memory(state, self.initial_state(len(state[0]))) if state else state

    def forward(self, segment: Segment, state: S) -> tuple[SegmentOutput, S]:
        """Read one segment.

        Args:
            segment: At most ``segment_length`` tokens for each lane.
            state: What the previous call returned, or :meth:`initial_state`.

        Returns:
            The output, and the state for the next segment.

        Raises:
            UsageError: Tokens are not at the left or not of the vocabulary (checked on a CPU only), or lanes, shapes or
                devices do not fit.
            TypeError: The segment or the state has another type, or :meth:`step` returns something else than it should.
        """
        entering = self._enter(segment, state)
        by = f"{type(self).__name__}.step"
        output, next_state = checks.pair(self.step(segment, entering), by=by, first="output")
        checks.check_output(output, segment.tokens.shape, by=by)
        return output, self._leave(segment, next_state, entering, by="step")

    def advance(self, segment: Segment, state: S) -> S:
        """The state that ``forward`` would return, computed from no more than it depends on."""
        entering = self._enter(segment, state)
        return self._leave(segment, self.advance_step(segment, entering), entering, by="advance_step")

    def advance_and_encode(self, segment: Segment, state: S) -> tuple[State, S]:
        """What :meth:`decoder_step` needs to predict a segment, and the state that ``forward`` returns."""
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
        return keep_where_nothing_was_read(segment, next_state, entering)
