"""Sessions: a trained model reads and writes text of any length, token by token, at constant memory and speed.

Whole segments go into the state and are not predicted. Only the unfinished segment is decoded, with a cache, and only
when the next token is asked for.

B  lanes     b  some of the lanes     T  tokens that are fed     L  tokens in a segment     P  start and L tokens
V  vocabulary
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from memformer_pl.contract import (
    ABSENT,
    DecodingCache,
    Segment,
    SegmentModel,
    SegmentOutput,
    State,
    as_state,
    concat_states,
    put_lanes,
    take_lanes,
)
from memformer_pl.contract.checks import checked_tokens
from memformer_pl.errors import UsageError, require_sizes
from memformer_pl.inference import saved_session
from memformer_pl.inference.sampling import Sampling
from memformer_pl.inference.saved_session import as_real, from_real, named


class Progress(NamedTuple):
    """How far each lane has read.

    ``calls``, ``sizes`` and ``row`` record how the cache was computed, so that loading can repeat it bit for bit.
    """

    tokens_read: Int[Tensor, " B"]
    """Number of tokens read."""
    recent: Int[Tensor, "B L"]
    """The last of them, at the right; ``ABSENT`` if there are fewer."""
    unfinished: Int[Tensor, " B"]
    """Number of tokens in the unfinished segment."""
    calls: Int[Tensor, "B P"]
    """Number of the model call that started the segment, and of the one that decoded each token; ``ABSENT`` if none."""
    sizes: Int[Tensor, "B P"]
    """Number of lanes that started in that call, and of tokens a lane that were decoded in it."""
    row: Int[Tensor, " B"]
    """Row of the lane in the call that started its segment."""


class Position(NamedTuple):
    """Everything that a session holds. It is replaced as a whole, so that an interruption leaves nothing half done."""

    state: State
    progress: Progress
    logits: Tensor | None
    """Of the next token after the decoded ones; None before the first call."""
    cache: DecodingCache


class Scores(NamedTuple):
    """What tokens cost that a session was given, on the CPU."""

    token_losses: Float64[Tensor, "B T"]
    """Nats of each token, given all that its lane had read before; 0 where there is none."""
    correct: Bool[Tensor, "B T"]
    """Whether the most likely token was the right one; False where there is none."""


class Session:
    """Texts that a model reads side by side, one in each lane. Sessions share nothing but the model.

    Memory does not grow with the length of the text, unless the model's state does (``SegmentModel.growing``). The
    weights must not change while a session lasts.

    Args:
        model: A model in evaluation mode.
        lanes: Number of texts.

    Raises:
        UsageError: The model is in training mode, or ``lanes`` is below 1.
    """

    def __init__(self, model: SegmentModel, *, lanes: int = 1) -> None:
        require_sizes(lanes=lanes)
        self.model = model
        self._require_evaluation()
        with torch.inference_mode():
            state = model.initial_state(lanes)
        none, calls = torch.zeros(lanes, dtype=torch.int64), torch.full((lanes, 1 + model.segment_length), ABSENT)
        self._position = Position(
            state, Progress(none, calls[:, 1:], none, calls, torch.zeros_like(calls), none), None, ()
        )

    @property
    def lanes(self) -> int:
        """Number of texts that are read side by side."""
        return len(self._position.progress.tokens_read)

    @property
    def tokens_read(self) -> Int[Tensor, " B"]:
        """Number of tokens that each lane has read, including those that it has drawn."""
        return self._position.progress.tokens_read.clone()

    def repeated(self, lanes: int) -> "Session":
        """A session of ``lanes`` lanes that have all read the text of this session's only lane.

        Raises:
            UsageError: This session has several lanes.
        """
        if self.lanes != 1:
            raise UsageError(f"only a session of one lane can be repeated, this one has {self.lanes}")
        return self.select([0] * lanes)

    def select(self, lanes: Sequence[int]) -> "Session":
        """A session whose lanes have read what these lanes of this one have; a lane may come several times or never.

        What was decoded of an unfinished segment is not copied: the new session decodes it when it is asked for the
        next token.

        Raises:
            UsageError: There is no such lane, or ``lanes`` is empty.
        """
        if outside := [lane for lane in lanes if not 0 <= lane < self.lanes]:
            raise UsageError(
                f"lanes must be at least 0 and below {self.lanes}, the lanes of this session: {outside[0]}"
            )
        rows = torch.tensor(lanes, dtype=torch.int64)
        state = take_lanes(self._position.state, rows.to(self._device))
        return self._continued(self.model, state, self._position.progress, rows)

    @classmethod
    def joined(cls, sessions: Sequence["Session"]) -> "Session":
        """A session with the lanes of several sessions of one model side by side, copied as by :meth:`select`."""
        model, positions = sessions[0].model, [session._position for session in sessions]
        state = concat_states([position.state for position in positions])
        progress = Progress(*(torch.cat(fields) for fields in zip(*(at.progress for at in positions), strict=True)))
        return cls._continued(model, state, progress, torch.arange(len(progress.tokens_read)))

    @classmethod
    def _continued(cls, model: SegmentModel, state: State, read: Progress, rows: Int[Tensor, " b"]) -> "Session":
        """A session of a state, whose lanes have read as much as these rows say; it has decoded nothing yet."""
        session = cls(model, lanes=len(rows))
        progress = session._position.progress._replace(
            tokens_read=read.tokens_read[rows], recent=read.recent[rows], unfinished=read.unfinished[rows]
        )
        session._position = session._position._replace(state=state, progress=progress)
        return session

    @torch.inference_mode()
    def feed(self, tokens: Int[Tensor, "B T"], token_mask: Bool[Tensor, "B T"] | None = None) -> None:
        """Read tokens. After an interruption, either all of ``tokens`` have been read or none.

        Args:
            tokens: The next tokens of each lane; any number, also 0.
            token_mask: Which of them exist, at the left; by default all.

        Raises:
            UsageError: ``tokens`` is not a tensor of integers, has another number of lanes, or holds a token outside
                the vocabulary, or ``token_mask`` is not True at the left.
        """
        self._require_evaluation()
        tokens, arrived = checked_tokens(tokens, token_mask, lanes=self.lanes, vocab_size=self.model.vocab_size)
        state, length = self._position.state, self.model.segment_length
        unread_BT, unread = self._unread(tokens, arrived)
        whole = unread // length
        for n in range(int(whole.max())):
            lanes = (whole > n).nonzero()[:, 0]
            state = self._advanced(state, unread_BT[lanes, n * length : (n + 1) * length], lanes)
        self._move(state, tokens, arrived)

    @torch.inference_mode()
    def score(self, tokens: Int[Tensor, "B T"], token_mask: Bool[Tensor, "B T"] | None = None) -> Scores:
        """Read tokens as :meth:`feed`, and return what each costs: the losses of the forward pass over the whole text.

        A segment passes the model once. Of an unfinished segment the tokens that were read before pass it again, as
        those that are read now will when it is continued.

        Args:
            tokens: The next tokens of each lane; any number, also 0.
            token_mask: Which of them exist, at the left; by default all.

        Raises:
            UsageError: As :meth:`feed`.
        """
        self._require_evaluation()
        tokens, arrived = checked_tokens(tokens, token_mask, lanes=self.lanes, vocab_size=self.model.vocab_size)
        state, length, before = self._position.state, self.model.segment_length, self._position.progress.unfinished
        unread_BT, unread = self._unread(tokens, arrived)
        losses_BT, correct_BT = torch.zeros(unread_BT.shape, dtype=torch.float64), torch.zeros_like(unread_BT).bool()
        unread = unread.masked_fill(arrived == 0, 0)
        for first in range(0, int(unread.max()), length):
            lanes = (unread > first).nonzero()[:, 0]
            output, state = self._scored(state, unread_BT[lanes, first : first + length], unread[lanes] - first, lanes)
            losses_BT[lanes, first : first + length] = output.token_losses.double().cpu()
            correct_BT[lanes, first : first + length] = output.correct.cpu()
        self._move(state, tokens, arrived)
        there = torch.arange(tokens.shape[1]) < arrived[:, None]
        places = (before[:, None] + torch.arange(tokens.shape[1])).masked_fill(~there, 0)
        if not there.any():
            return Scores(torch.zeros(tokens.shape, dtype=torch.float64), there)
        return Scores(losses_BT.gather(1, places).masked_fill(~there, 0.0), correct_BT.gather(1, places) & there)

    @property
    def log_probs(self) -> Float[Tensor, "B V"]:
        """Log-probabilities of each lane's next token, at least in float32."""
        self._require_evaluation()
        with torch.inference_mode():
            self._decode_fed_tokens()
            logits = self._position.logits
            assert logits is not None
            return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def next(self, sampling: Sampling | Sequence[Sampling]) -> Int[Tensor, " B"]:
        """Draw the next token of each lane, and read it.

        A repetition penalty applies to the last ``segment_length`` tokens of a lane, read or drawn.

        Args:
            sampling: One for all lanes, or one for each: then what a lane draws does not depend on the other lanes.
        """
        log_probs, recent = self.log_probs, self._position.progress.recent
        if isinstance(sampling, Sampling):
            tokens = sampling(log_probs, recent)
        else:
            lanes = zip(sampling, log_probs[:, None], recent[:, None], strict=True)
            tokens = torch.cat([draw(*of_lane) for draw, *of_lane in lanes])
        self.feed(tokens[:, None])
        return tokens

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state and the tokens of the unfinished segment, as safetensors.

        A session that is loaded from the file continues like this one, on the same machine bit for bit. The size of the
        file does not depend on the length of the text.

        Raises:
            UsageError: The file cannot be written.
        """
        state = {name: as_real(field) for name, field in named(self._position.state).items()}
        saved_session.write(path, {**self._position.progress._asdict(), **state}, self.model)

    @classmethod
    def load(cls, model: SegmentModel, path: str | os.PathLike[str]) -> "Session":
        """Continue a saved session, on the model's device.

        Raises:
            UsageError: The file is damaged or not a saved session, or it belongs to another model; the message lists
                the differences.
        """
        tensors = saved_session.read(path, model)
        session = cls(model, lanes=len(tensors["tokens_read"]))
        state = session._position.state
        fields = (from_real(tensors[name].to(session._device), field) for name, field in named(state).items())
        session._position = Position(
            as_state(state, fields), Progress(*(tensors[name] for name in Progress._fields)), None, ()
        )
        with torch.inference_mode():
            session._repeat_calls()
        return session

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _require_evaluation(self) -> None:
        if self.model.training:
            raise UsageError("the model is in training mode, which applies dropout: call model.eval() first")

    def _unread(
        self, tokens: Int[Tensor, "B T"], arrived: Int[Tensor, " B"]
    ) -> tuple[Int[Tensor, "B U"], Int[Tensor, " B"]]:
        """The tokens that are not in the state yet, at the left, and their number: the unfinished segment and new ones.

        Args:
            tokens: New tokens.
            arrived: Number of new tokens of each lane.
        """
        before, length = self._position.progress, self.model.segment_length
        both, unread = torch.cat((before.recent, tokens), dim=1), before.unfinished + arrived
        first = length - before.unfinished[:, None]
        return both.gather(1, (first + torch.arange(int(unread.max()))).clamp(max=both.shape[1] - 1)), unread

    def _move(self, state: State, tokens: Int[Tensor, "B T"], arrived: Int[Tensor, " B"]) -> None:
        """Take the state after the whole segments of the unfinished segment and new tokens."""
        before, length = self._position.progress, self.model.segment_length
        unread = before.unfinished + arrived
        whole = unread // length
        progress = before._replace(
            tokens_read=before.tokens_read + arrived,
            recent=torch.cat((before.recent, tokens), dim=1).gather(1, arrived[:, None] + torch.arange(length)),
            unfinished=unread - whole * length,
            calls=before.calls.masked_fill(whole[:, None] > 0, ABSENT),
        )
        self._position = self._position._replace(state=state, progress=progress)

    def _advanced(self, state: State, tokens: Int[Tensor, "b L"], lanes: Int[Tensor, " b"]) -> State:
        """The state after a whole segment in some lanes."""
        segment = self._segment(tokens, torch.full_like(lanes, tokens.shape[1]))
        after: State = self.model.advance(segment, self._of(state, lanes))
        return self._with(state, lanes, after)

    def _scored(
        self, state: State, tokens: Int[Tensor, "b L"], sizes: Int[Tensor, " b"], lanes: Int[Tensor, " b"]
    ) -> tuple[SegmentOutput, State]:
        """The output for a segment of some lanes, and the state after it in those where it is whole."""
        segment = self._segment(tokens, sizes)
        output, after = self.model(segment, self._of(state, lanes))
        whole = (sizes >= self.model.segment_length).nonzero()[:, 0]
        return output, self._with(state, lanes[whole], take_lanes(after, whole.to(self._device)))

    def _segment(self, tokens: Int[Tensor, "b L"], sizes: Int[Tensor, " b"]) -> Segment:
        """The first ``sizes`` tokens as a segment on the model's device."""
        token_mask = torch.arange(tokens.shape[1]) < sizes[:, None]
        no_start = torch.zeros(len(tokens), dtype=torch.bool)
        return Segment(tokens.masked_fill(~token_mask, 0), token_mask, no_start).to(self._device)

    def _of(self, state: State, lanes: Int[Tensor, " b"]) -> State:
        return state if len(lanes) == self.lanes else take_lanes(state, lanes.to(self._device))

    def _with(self, state: State, lanes: Int[Tensor, " b"], after: State) -> State:
        """The state with another one in some lanes, without rows that no lane sees."""
        if not len(lanes):
            return state
        if len(lanes) < self.lanes:
            places = lanes.to(self._device)
            after = as_state(state, (put_lanes(a, places, b) for a, b in zip(state, after, strict=True)))
        compacted: State = self.model.compact(after)
        return compacted

    def _decode_fed_tokens(self) -> None:
        """Start segments and decode tokens, so that the cache holds everything that was fed."""
        progress = self._position.progress
        starts = progress.calls[:, 0] == ABSENT
        decoded = (progress.calls[:, 1:] != ABSENT).sum(1, keepdim=True)
        index = torch.arange(self.model.segment_length)
        decodes = (index >= decoded) & (index < progress.unfinished[:, None])
        in_call = torch.cat((starts[:, None], decodes), dim=1)
        if not in_call.any():
            return
        sizes = progress.sizes.clone()
        sizes[starts, 0], sizes[:, 1:][decodes] = starts.sum(), decodes.sum(1).max()
        progress = progress._replace(
            calls=progress.calls.masked_fill(in_call, int(progress.calls.max()) + 1),
            sizes=sizes,
            row=torch.where(starts, starts.cumsum(0) - 1, progress.row),
        )
        self._position = self._call(self._position._replace(progress=progress), in_call)

    def _repeat_calls(self) -> None:
        """Rebuild the cache of a saved session by the same calls, in the same order and with the same shapes."""
        calls = self._position.progress.calls
        for call in sorted(set(calls.flatten().tolist()) - {ABSENT}):
            self._position = self._call(self._position, calls == call)

    def _call(self, at: Position, in_call: Bool[Tensor, "B P"]) -> Position:
        """The position after one call of the model: some lanes start a segment, and some decode tokens."""
        starts, decodes = in_call[:, 0], in_call[:, 1:]
        if starts.any():
            at = self._prefill(at, starts.nonzero()[:, 0])
        return self._decode(at, decodes) if decodes.any() else at

    def _prefill(self, at: Position, lanes: Int[Tensor, " b"]) -> Position:
        """The position after some lanes have started a segment."""
        if len(lanes) == self.lanes:
            logits, cache = self.model.prefill(at.state, self.lanes)
            return at._replace(logits=logits, cache=cache)
        count, rows = int(at.progress.sizes[lanes[0], 0]), at.progress.row[lanes]
        # when a call is repeated, rows of lanes that have started again since are filled with any lane
        batch = lanes[:1].repeat(count).index_copy(0, rows, lanes)
        started = self.model.prefill(take_lanes(at.state, batch.to(self._device)), count)
        logits, cache = self.model.prefill(at.state, self.lanes) if at.logits is None else (at.logits, at.cache)
        lanes, rows = lanes.to(self._device), rows.to(self._device)
        logits, *fields = (
            # a tensor of one lane is the same for all
            put_lanes(field, lanes, part[rows]) if len(field) == self.lanes else field
            for field, part in zip((logits, *cache), (started[0], *started[1]), strict=True)
        )
        return at._replace(logits=logits, cache=as_state(cache, fields))

    def _decode(self, at: Position, decodes: Bool[Tensor, "B L"]) -> Position:
        """The position after some lanes have decoded tokens of their unfinished segment."""
        progress, length = at.progress, self.model.segment_length
        width = int(progress.sizes[:, 1:][decodes].max())
        # the unfinished segment begins at ``length - unfinished`` of the recent tokens
        first = length - progress.unfinished + decodes.int().argmax(1)
        tokens = progress.recent.gather(1, (first[:, None] + torch.arange(width)).clamp(max=length - 1))
        token_mask = torch.arange(width) < decodes.sum(1, keepdim=True)
        tokens, token_mask = tokens.masked_fill(~token_mask, 0).to(self._device), token_mask.to(self._device)
        logits, cache = self.model.decode(tokens, token_mask, at.cache)
        assert at.logits is not None
        return at._replace(logits=torch.where(token_mask.any(1, keepdim=True), logits, at.logits), cache=cache)
