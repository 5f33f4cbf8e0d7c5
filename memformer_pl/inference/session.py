"""Sessions: a trained model reads and writes text of any length, token by token, at constant memory and speed.

Whole segments go into the state and are not predicted. Only the unfinished segment is decoded, with a cache, and only
when the next token is asked for.

B  lanes     b  some of the lanes     T  tokens that are fed     L  tokens in a segment     P  start and L tokens
V  vocabulary
"""

import os
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl.contract import ABSENT, DecodingCache, Segment, SegmentModel, State, as_state, grow_to
from memformer_pl.contract.checks import in_words
from memformer_pl.errors import UsageError, require_sizes
from memformer_pl.inference import saved_session
from memformer_pl.inference.sampling import Sampling

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


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
        session, rows = Session(self.model, lanes=lanes), torch.zeros(lanes, dtype=torch.int64)
        so_far, fresh = self._position.progress, session._position.progress
        progress = fresh._replace(
            tokens_read=so_far.tokens_read[rows], recent=so_far.recent[rows], unfinished=so_far.unfinished[rows]
        )
        session._position = session._position._replace(
            state=_take(self._position.state, rows.to(self._device)), progress=progress
        )
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
        (state, before, *_), length = self._position, self.model.segment_length
        tokens, arrived = self._checked(tokens, token_mask)
        both, unread = torch.cat((before.recent, tokens), dim=1), before.unfinished + arrived
        # tokens that are not in the state yet, at the left
        first = length - before.unfinished[:, None]
        unread_BT = both.gather(1, (first + torch.arange(int(unread.max()))).clamp(max=both.shape[1] - 1))
        whole = unread // length
        for n in range(int(whole.max())):
            lanes = (whole > n).nonzero()[:, 0]
            state = self._advanced(state, unread_BT[lanes, n * length : (n + 1) * length], lanes)
        progress = before._replace(
            tokens_read=before.tokens_read + arrived,
            recent=both.gather(1, arrived[:, None] + torch.arange(length)),
            unfinished=unread - whole * length,
            calls=before.calls.masked_fill(whole[:, None] > 0, ABSENT),
        )
        self._position = self._position._replace(state=state, progress=progress)

    @property
    def log_probs(self) -> Float[Tensor, "B V"]:
        """Log-probabilities of each lane's next token, at least in float32."""
        self._require_evaluation()
        with torch.inference_mode():
            self._decode_fed_tokens()
            logits = self._position.logits
            assert logits is not None
            return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def next(self, sampling: Sampling) -> Int[Tensor, " B"]:
        """Draw the next token of each lane, and read it.

        A repetition penalty applies to the last ``segment_length`` tokens of a lane, read or drawn.
        """
        tokens = sampling(self.log_probs, self._position.progress.recent)
        self.feed(tokens[:, None])
        return tokens

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state and the tokens of the unfinished segment, as safetensors.

        A session that is loaded from the file continues like this one, on the same machine bit for bit. The size of the
        file does not depend on the length of the text.

        Raises:
            UsageError: The file cannot be written.
        """
        state = {name: _as_real(field) for name, field in _named(self._position.state).items()}
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
        fields = (_from_real(tensors[name].to(session._device), field) for name, field in _named(state).items())
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

    def _checked(
        self, tokens: Int[Tensor, "B T"], token_mask: Bool[Tensor, "B T"] | None
    ) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
        """Tokens on the CPU, 0 where there is none, and the number of tokens of each lane."""
        if not isinstance(tokens, Tensor):
            got = f"got {in_words(tokens)}: feed(torch.tensor(tokens))"
            raise UsageError(f"tokens must be a tensor of whole numbers of the shape [{self.lanes}, T], {got}")
        if tokens.dim() != 2 or len(tokens) != self.lanes or tokens.dtype not in INTEGERS:
            got = f"got {list(tokens.shape)} of {tokens.dtype}"
            raise UsageError(f"tokens must be whole numbers of the shape [{self.lanes}, T], {got}")
        token_mask = torch.ones_like(tokens, dtype=torch.bool) if token_mask is None else token_mask
        if not isinstance(token_mask, Tensor) or token_mask.dtype != torch.bool:
            raise UsageError(f"token_mask must be a tensor of torch.bool, got {in_words(token_mask)}")
        if token_mask.shape != tokens.shape:
            raise UsageError(
                f"token_mask must have the shape of tokens, {list(tokens.shape)}, got {list(token_mask.shape)}"
            )
        tokens, token_mask = tokens.to("cpu", torch.int64), token_mask.cpu()
        if (token_mask[:, 1:] & ~token_mask[:, :-1]).any():
            raise UsageError("token_mask must be True at the left, but a token follows a gap")
        tokens = tokens.masked_fill(~token_mask, 0)
        outside = tokens[(tokens < 0) | (tokens >= self.model.vocab_size)]
        if len(outside):
            raise UsageError(
                f"tokens must be at least 0 and below vocab_size={self.model.vocab_size}, got {int(outside[0])}"
            )
        return tokens, token_mask.sum(1)

    def _advanced(self, state: State, tokens: Int[Tensor, "b L"], lanes: Int[Tensor, " b"]) -> State:
        """The state after a whole segment in some lanes."""
        tokens, lanes = tokens.to(self._device), lanes.to(self._device)
        token_mask, no_start = torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(lanes, dtype=torch.bool)
        segment = Segment(tokens, token_mask, no_start)
        if len(lanes) == self.lanes:
            next_state: State = self.model.advance(segment, state)
        else:
            parts = self.model.advance(segment, _take(state, lanes))
            pairs = zip(state, parts, strict=True)
            next_state = as_state(state, (_put(whole, lanes, part) for whole, part in pairs))
        compacted: State = self.model.compact(next_state)
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
        started = self.model.prefill(_take(at.state, batch.to(self._device)), count)
        logits, cache = self.model.prefill(at.state, self.lanes) if at.logits is None else (at.logits, at.cache)
        lanes, rows = lanes.to(self._device), rows.to(self._device)
        logits, *fields = (
            # a tensor of one lane is the same for all
            _put(field, lanes, part[rows]) if len(field) == self.lanes else field
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


def _take(state: State, lanes: Int[Tensor, " b"]) -> State:
    return as_state(state, (field[lanes] for field in state))


def _put(whole: Tensor, lanes: Int[Tensor, " b"], part: Tensor) -> Tensor:
    """``whole`` with other values in some lanes; rows of zeros fill up whichever has fewer rows."""
    rows = [max(sizes) for sizes in zip(whole.shape[1:], part.shape[1:], strict=True)]
    return grow_to(rows, whole).index_copy(0, lanes, grow_to(rows, part).to(whole.dtype))


def _named(state: State) -> dict[str, Tensor]:
    names = getattr(state, "_fields", map(str, range(len(state))))
    return {f"state.{name}": field for name, field in zip(names, state, strict=True)}


def _as_real(field: Tensor) -> Tensor:
    """Real and imaginary parts of a complex field, since safetensors does not support complex128."""
    return torch.view_as_real(field.resolve_conj()) if field.is_complex() else field


def _from_real(saved: Tensor, field: Tensor) -> Tensor:
    """The inverse of :func:`_as_real`, for a field like ``field``."""
    return torch.view_as_complex(saved) if field.is_complex() else saved
