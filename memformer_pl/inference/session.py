"""Sessions: a trained model reads and writes text of any length, token by token, at constant memory and speed.

Whole segments go into the state without being predicted. The model decodes the rest of the last one token by token, with
a cache of what it has computed, and only once somebody asks what comes next.

B  lanes     T  tokens that are fed     L  tokens in a segment     P  its start, and L tokens     V  vocabulary
"""

import os
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl.contract import ABSENT, DecodingCache, Segment, SegmentModel, State, as_state
from memformer_pl.contract.checks import in_words
from memformer_pl.errors import UsageError, require_sizes
from memformer_pl.inference import saved_session
from memformer_pl.inference.sampling import Sampling

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


class Progress(NamedTuple):
    """How far each lane has read.

    ``calls`` and the fields behind it say how a cache came about, so that loading can repeat it to the last bit.
    """

    tokens_read: Int[Tensor, " B"]
    """Tokens so far."""
    recent: Int[Tensor, "B L"]
    """The last of them, at the right; ``ABSENT`` where there were not as many yet."""
    unfinished: Int[Tensor, " B"]
    """How many of these are in the unfinished segment."""
    calls: Int[Tensor, "B P"]
    """Which call of the model started the segment in this lane, and which decoded each token; ``ABSENT`` if none yet."""
    sizes: Int[Tensor, "B P"]
    """How many lanes started at once in that call, and how many tokens were decoded."""
    beside: Int[Tensor, " B"]
    """The place of the lane among those that started at once."""


class Position(NamedTuple):
    """Where a session stands. It is replaced as a whole, so that an interruption leaves nothing half done."""

    state: State
    progress: Progress
    logits: Tensor | None
    """Of the next token, as far as the model has looked."""
    cache: DecodingCache


class Session:
    """Texts that a model reads side by side, one in each lane. Two sessions share nothing but the model.

    Nothing here grows with what has been read. A model in training mode is refused, since dropout would fall. Weights
    must not change while a session lasts.

    Args:
        model: In evaluation mode.
        lanes: How many texts.
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
        """How many texts are read side by side."""
        return len(self._position.progress.tokens_read)

    @property
    def tokens_read(self) -> Int[Tensor, " B"]:
        """How many tokens each lane has read, those that it has drawn included."""
        return self._position.progress.tokens_read.clone()

    def repeated(self, lanes: int) -> "Session":
        """A session of so many lanes, each of which has read what the only lane of this one has.

        Raises:
            UsageError: This one has several lanes.
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
        """Read on. Where it is interrupted, nothing of ``tokens`` has been read.

        Args:
            tokens: What follows in each lane; any number of them, also none.
            present: Which of them exist, at the left; by default all.

        Raises:
            UsageError: Tokens are not a tensor of integers, of another number of lanes or not of the vocabulary, or do
                not stand at the left.
        """
        self._require_evaluation()
        (state, before, *_), length = self._position, self.model.segment_length
        tokens, arrived = self._checked(tokens, token_mask)
        both, unread = torch.cat((before.recent, tokens), dim=1), before.unfinished + arrived
        # what is not yet in the state, at the left
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
        """Logarithms of the chances of each lane's next token, in float32 at least."""
        self._require_evaluation()
        with torch.inference_mode():
            self._catch_up()
            logits = self._position.logits
            assert logits is not None
            return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def next(self, sampling: Sampling) -> Int[Tensor, " B"]:
        """Draw the next token of each lane, and read it.

        The last ``segment_length`` tokens of a lane, read or drawn, are those that a repetition penalty is for.
        """
        tokens = sampling(self.log_probs, self._position.progress.recent)
        self.feed(tokens[:, None])
        return tokens

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state and the tokens of the unfinished segment, as safetensors.

        A session that is loaded from the file goes on as this one does, on the same machine bit for bit. The file is as
        large as the state and a segment's tokens, however long the text was.
        """
        state = {name: _as_real(field) for name, field in _named(self._position.state).items()}
        saved_session.write(path, {**self._position.progress._asdict(), **state}, self.model)

    @classmethod
    def load(cls, model: SegmentModel, path: str | os.PathLike[str]) -> "Session":
        """Go on from a saved session, on the model's device.

        Raises:
            UsageError: The file is damaged or foreign, or of another model; says what differs.
        """
        tensors = saved_session.read(path, model)
        session = cls(model, lanes=len(tensors["tokens_read"]))
        state = session._position.state
        fields = (_like_saved(tensors[name].to(session._device), field) for name, field in _named(state).items())
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
            raise UsageError("the model is in training mode, in which dropout would fall: call model.eval() first")

    def _checked(
        self, tokens: Int[Tensor, "B T"], token_mask: Bool[Tensor, "B T"] | None
    ) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
        """Tokens on the CPU, 0 where there is none, and how many each lane gets."""
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
            raise UsageError("token_mask must be True at the left: a token stands behind a gap")
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
        token_mask, starts = torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(lanes, dtype=torch.bool)
        segment = Segment(tokens, token_mask, starts)
        if len(lanes) == self.lanes:
            all_next: State = self.model.advance(segment, state)
            return all_next
        next_state = self.model.advance(segment, _take(state, lanes))
        pairs = zip(state, next_state, strict=True)
        return as_state(state, (whole.index_copy(0, lanes, part) for whole, part in pairs))

    def _catch_up(self) -> None:
        """Have the model look at everything that has been fed."""
        progress = self._position.progress
        begins = progress.calls[:, 0] == ABSENT
        drafted = (progress.calls[:, 1:] != ABSENT).sum(1, keepdim=True)
        places = torch.arange(self.model.segment_length)
        reads = (places >= drafted) & (places < progress.unfinished[:, None])
        calling = torch.cat((begins[:, None], reads), dim=1)
        if not calling.any():
            return
        sizes = progress.sizes.clone()
        sizes[begins, 0], sizes[:, 1:][reads] = begins.sum(), reads.sum(1).max()
        progress = progress._replace(
            calls=progress.calls.masked_fill(calling, int(progress.calls.max()) + 1),
            sizes=sizes,
            beside=torch.where(begins, begins.cumsum(0) - 1, progress.beside),
        )
        self._position = self._called(self._position._replace(progress=progress), calling)

    def _repeat_calls(self) -> None:
        """Rebuild the cache of a saved session by the same calls, with the same shapes in the same order."""
        calls = self._position.progress.calls
        for call in sorted(set(calls.flatten().tolist()) - {ABSENT}):
            self._position = self._called(self._position, calls == call)

    def _called(self, at: Position, calling: Bool[Tensor, "B P"]) -> Position:
        """After one call of the model: some lanes start a segment, and some decode tokens of it."""
        begins, reads = calling[:, 0], calling[:, 1:]
        if begins.any():
            at = self._begun(at, begins.nonzero()[:, 0])
        return self._extended(at, reads) if reads.any() else at

    def _begun(self, at: Position, lanes: Int[Tensor, " b"]) -> Position:
        if len(lanes) == self.lanes:
            logits, cache = self.model.prefill(at.state, self.lanes)
            return at._replace(logits=logits, cache=cache)
        among, beside = int(at.progress.sizes[lanes[0], 0]), at.progress.beside[lanes]
        # where a lane stood that has begun again since, any other will do
        together = lanes[:1].repeat(among).index_copy(0, beside, lanes)
        begun = self.model.prefill(_take(at.state, together.to(self._device)), among)
        logits, cache = self.model.prefill(at.state, self.lanes) if at.logits is None else (at.logits, at.cache)
        lanes, beside = lanes.to(self._device), beside.to(self._device)
        for field, part in zip((logits, *cache), (begun[0], *begun[1]), strict=True):
            if len(field) == self.lanes:  # and not one for all
                field[lanes] = part[beside].to(field.dtype)
        return at._replace(logits=logits, cache=cache)

    def _extended(self, at: Position, reads: Bool[Tensor, "B L"]) -> Position:
        progress, length = at.progress, self.model.segment_length
        width = int(progress.sizes[:, 1:][reads].max())
        # the first token of the segment is the recent one at ``length - unfinished``
        first = length - progress.unfinished + reads.int().argmax(1)
        tokens = progress.recent.gather(1, (first[:, None] + torch.arange(width)).clamp(max=length - 1))
        token_mask = torch.arange(width) < reads.sum(1, keepdim=True)
        tokens, token_mask = tokens.masked_fill(~token_mask, 0).to(self._device), token_mask.to(self._device)
        logits, cache = self.model.decode(tokens, token_mask, at.cache)
        assert at.logits is not None
        return at._replace(logits=torch.where(token_mask.any(1, keepdim=True), logits, at.logits), cache=cache)


def _take(state: State, lanes: Int[Tensor, " b"]) -> State:
    return as_state(state, (field[lanes] for field in state))


def _named(state: State) -> dict[str, Tensor]:
    names = getattr(state, "_fields", map(str, range(len(state))))
    return {f"state.{name}": field for name, field in zip(names, state, strict=True)}


def _as_real(field: Tensor) -> Tensor:
    """A field as safetensors has it, which knows no complex numbers of double precision: real and imaginary parts."""
    return torch.view_as_real(field.resolve_conj()) if field.is_complex() else field


def _like_saved(saved: Tensor, field: Tensor) -> Tensor:
    return torch.view_as_complex(saved) if field.is_complex() else saved
