"""The base class of every model: ``(segment, state) -> (output, next state)``."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from memformer_pl.contract import checks
from memformer_pl.contract.config import Configured
from memformer_pl.contract.reset import keep_lanes_without_tokens, replace_memory, reset_at_document_start
from memformer_pl.contract.segment import Segment, SegmentOutput, concat_segments
from memformer_pl.contract.state import S, State, as_state, carries_gradient, concat_states
from memformer_pl.contract.weight_loss import WeightLoss
from memformer_pl.errors import LARGEST_WIDTH, UsageError, require_sizes

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

    growing: Mapping[str, int] = {}
    """Names of the fields of the state that only gain rows, such as a KV cache, with the axis of the rows; the initial
    state has none. A step returns the rows that it was given, and others behind them. Memory replay then stores them
    once. They are neither reset where a document starts nor kept in lanes without tokens: the other fields say which
    rows a lane sees. A row of zeros, in all growing fields, is one that no lane sees."""

    has_weight_losses = False
    """Whether parts of the model are a :class:`WeightLoss`. If so, this base class adds their losses to the auxiliary
    loss of each segment; a step leaves them out."""

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

        The random numbers of a segment must not depend on those beside it, nor come from the default stream: pass on
        what they are drawn from, such as a seed, in ``encoded``. The auxiliary loss is a sum over segments.
        """
        raise TypeError(f"{type(self).__name__} has no separate decoder")

    def regions(self) -> Sequence[nn.Module]:
        """Parts of a step that can be compiled one by one, each called as a module: blocks, and a writer of memory.

        Modules of one class share what is compiled. What such a module draws must be a function of its arguments.
        By default there are none.
        """
        return ()

    def rollout_step(self, segments: Sequence[Segment], state: S) -> tuple[SegmentOutput, S]:
        """The steps of several segments of the same shape at once: their output, lanes concatenated as by
        :func:`concat_segments`, and the state after the last.

        Implement it if no gradient crosses segments, and each layer needs of earlier segments only what entered the
        same layer there, as in Transformer-XL: then each layer runs once for all segments. What a layer leaves behind
        must not take further computing segment by segment, as compressed rows (Compressive Transformer) and refreshed
        ones (LaMemo) do.

        It stands for whole steps: the entering state is not reset yet, and lanes that start a document or have no token
        in one of the segments are its own task (``reset.py``). Random numbers are those of :meth:`step`, segment by
        segment; the auxiliary loss is a sum over segments.
        """
        raise TypeError(f"{type(self).__name__} reads one segment after another")

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

    def compact(self, state: S) -> S:
        """``state`` without rows of growing fields that no lane sees, with the same further losses to rounding.

        Called where no gradient will cross: between rollouts, and between the segments of an evaluation or a session.
        By default the same state.
        """
        return state

    def has_memory(self) -> bool:
        """Whether the state holds computed numbers, and not only tokens that are still to be read."""
        return bool(self.growing) or any(carries_gradient(field) and field.numel() for field in self.initial_state(1))

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
        return self._with_weight_losses(output), self._leave(segment, next_state, entering, by="step")

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

    def decode_encoded(self, segments: Sequence[Segment], encoded: Sequence[State]) -> SegmentOutput:
        """The outputs that ``forward`` returns, to rounding, as one whose lanes are concatenated.

        Args:
            segments: Of the same length.
            encoded: What :meth:`advance_and_encode` returns for each.
        """
        output = self.decoder_step(concat_segments(segments), concat_states(encoded))
        return self._with_weight_losses(output, segments=len(segments))

    def forward_rollout(self, segments: Sequence[Segment], state: S) -> tuple[SegmentOutput, S]:
        """The outputs that ``forward`` returns segment by segment, to rounding, as one whose lanes are concatenated,
        and the state after the last segment.

        Args:
            segments: At least one; all of the same shape.
            state: Enters the first.

        Raises:
            UsageError: Shapes differ, or a segment or the state is refused by :meth:`forward`.
            TypeError: The model does not implement :meth:`rollout_step`, or for the same reasons as :meth:`forward`.
        """
        shapes = [list(segment.tokens.shape) for segment in segments]
        if shapes != shapes[:1] * len(shapes):
            raise UsageError(f"segments that are read at once must have the same shape, got {shapes}")
        for segment in segments[1:]:
            self._check(segment)
        self._initial(segments[0], state)
        by = f"{type(self).__name__}.rollout_step"
        output, next_state = checks.pair(self.rollout_step(segments, state), by=by, first="output")
        checks.check_output(output, torch.Size((len(shapes) * shapes[0][0], shapes[0][1])), by=by)
        checks.check_next_state(next_state, state, by=by)
        return self._with_weight_losses(output, segments=len(segments)), next_state

    def _with_weight_losses(self, output: SegmentOutput, *, segments: int = 1) -> SegmentOutput:
        if not self.has_weight_losses:
            return output
        losses = (segments * part.weight_loss() for part in self.modules() if isinstance(part, WeightLoss))
        return output._replace(auxiliary_loss=sum(losses, start=output.auxiliary_loss))

    def _enter(self, segment: Segment, state: S) -> S:
        initial = self._initial(segment, state)
        state = as_state(initial, state) if self.growing else state
        return reset_at_document_start(segment, self._with_grown(initial, state), state)

    def _initial(self, segment: Segment, state: S) -> S:
        """The initial state, after checks of a segment and of the state that enters it."""
        self._check(segment)
        initial = self.initial_state(len(segment.tokens))
        name, parameter = type(self).__name__, next(self.parameters(), None)
        checks.check_entering(state, initial, segment.tokens, parameter, model=name, growing=self.growing)
        return initial

    def _check(self, segment: Segment) -> None:
        checks.check_segment(segment, vocab_size=self.vocab_size, segment_length=self.segment_length)

    def _leave(self, segment: Segment, next_state: S, entering: S, *, by: str) -> S:
        checks.check_next_state(next_state, entering, by=f"{type(self).__name__}.{by}")
        return keep_lanes_without_tokens(segment, next_state, self._with_grown(entering, next_state))

    def _with_grown(self, state: S, other: S) -> S:
        """``state`` with the growing fields of another."""
        grown = {name: getattr(other, name) for name in self.growing}
        return state._replace(**grown) if grown else state  # type: ignore[attr-defined]  # growing names fields
