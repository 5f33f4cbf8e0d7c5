"""Sessions: a trained model reads and writes text of any length, token by token, at constant memory and speed.

Whole segments go into the state without being predicted. What is left of the last one is read token by token, by keys
and values that are kept from token to token (a draft), and only once somebody asks what comes next.

B  lanes     T  tokens that are fed     L  tokens in a segment     P  its beginning, and L tokens     V  vocabulary
"""

import os
from typing import Generic, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl import saved_memory
from memformer_pl.recurrence import ABSENT, Draft, S, Segment, SegmentModel, State, like
from memformer_pl.sampling import Sampling
from memformer_pl.sizes import require_sizes


class Progress(NamedTuple):
    """How far each lane has read. It is replaced as a whole and never edited, so that an interruption tears nothing.

    ``calls`` and the fields behind it say how a draft came about, so that it can be made once more to the last bit.
    """

    read: Int[Tensor, " B"]
    """Tokens so far."""
    recent: Int[Tensor, "B L"]
    """The last of them, at the right; ``ABSENT`` where there were not as many yet."""
    unfinished: Int[Tensor, " B"]
    """How many of these are in the segment that is not yet whole."""
    calls: Int[Tensor, "B P"]
    """In which call of the model the lane began that segment, and read each of its tokens; ``ABSENT`` if not yet."""
    sizes: Int[Tensor, "B P"]
    """How many lanes began at once in that call, and how many tokens were read."""
    beside: Int[Tensor, " B"]
    """The place of the lane among those that began at once."""


class Session(Generic[S]):
    """Texts that a model reads side by side, one in each lane. Two sessions share nothing but the model.

    Nothing here grows with what has been read. A model in training mode is refused, since dropout would fall. Weights
    must not change while a session lasts.

    Args:
        model: In evaluation mode.
        lanes: How many texts.
    """

    def __init__(self, model: SegmentModel[S], *, lanes: int = 1) -> None:
        require_sizes(lanes=lanes)
        self.model = model
        self._require_evaluation()
        with torch.inference_mode():
            state = model.initial_state(lanes)
        none, calls = torch.zeros(lanes, dtype=torch.int64), torch.full((lanes, 1 + model.segment_length), ABSENT)
        self._at: tuple[S, Progress] = state, Progress(none, calls[:, 1:], none, calls, torch.zeros_like(calls), none)
        self._logits: Tensor | None = None
        self._draft: Draft = ()
        self._call = 0

    @property
    def lanes(self) -> int:
        """How many texts are read side by side."""
        return len(self._at[1].read)

    @property
    def tokens_read(self) -> Int[Tensor, " B"]:
        """How many tokens each lane has read, those that it has drawn included."""
        return self._at[1].read.clone()

    def repeated(self, lanes: int) -> "Session[S]":
        """A session of so many lanes, each of which has read what the only lane of this one has.

        Raises:
            ValueError: This one has several lanes.
        """
        if self.lanes != 1:
            raise ValueError(f"only a session of one lane can be repeated, this one has {self.lanes}")
        session, rows = Session(self.model, lanes=lanes), torch.zeros(lanes, dtype=torch.int64)
        (state, so_far), fresh = self._at, session._at[1]
        read, recent, unfinished = so_far.read[rows], so_far.recent[rows], so_far.unfinished[rows]
        session._at = _take(state, rows), fresh._replace(read=read, recent=recent, unfinished=unfinished)
        return session

    @torch.inference_mode()
    def feed(self, tokens: Int[Tensor, "B T"], present: Bool[Tensor, "B T"] | None = None) -> None:
        """Read on. Where it is interrupted, nothing of ``tokens`` has been read.

        Args:
            tokens: What follows in each lane; any number of them, also none.
            present: Which of them exist, at the left; by default all.

        Raises:
            ValueError: Tokens are of another number of lanes or not of the vocabulary, or do not stand at the left.
        """
        self._require_evaluation()
        (state, before), length = self._at, self.model.segment_length
        tokens, arrived = self._checked(tokens, present)
        both, unread = torch.cat((before.recent, tokens), dim=1), before.unfinished + arrived
        # what is not yet in the state, at the left
        first = length - before.unfinished[:, None]
        unread_BT = both.gather(1, (first + torch.arange(int(unread.max()))).clamp(max=both.shape[1] - 1))
        whole = unread // length
        for n in range(int(whole.max())):
            lanes = (whole > n).nonzero()[:, 0]
            state = self._advanced(state, unread_BT[lanes, n * length : (n + 1) * length], lanes)
        progress = before._replace(
            read=before.read + arrived,
            recent=both.gather(1, arrived[:, None] + torch.arange(length)),
            unfinished=unread - whole * length,
            calls=before.calls.masked_fill(whole[:, None] > 0, ABSENT),
        )
        self._at = state, progress

    @property
    def log_probs(self) -> Float[Tensor, "B V"]:
        """Logarithms of the chances of each lane's next token, in float32 at least."""
        self._require_evaluation()
        with torch.inference_mode():
            self._catch_up()
            assert self._logits is not None
            return self._logits.to(torch.promote_types(self._logits.dtype, torch.float32)).log_softmax(-1)

    def next(self, sampling: Sampling) -> Int[Tensor, " B"]:
        """Draw the next token of each lane, and read it.

        The last ``segment_length`` tokens of a lane, read or drawn, are those that a repetition penalty is for.
        """
        tokens = sampling(self.log_probs, self._at[1].recent)
        self.feed(tokens[:, None])
        return tokens

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that is remembered, as safetensors: the state, and the tokens of the segment that is not yet whole.

        A session that is opened from the file goes on as this one does, on the same machine bit for bit. A file is as
        large as the state and a segment's tokens, however long the text was.
        """
        state, progress = self._at
        saved_memory.write(path, {**progress._asdict(), **_named(state)}, self.model)

    @classmethod
    def load(cls, model: SegmentModel[S], path: str | os.PathLike[str]) -> "Session[S]":
        """Go on from a saved memory, on the model's device.

        Raises:
            ValueError: The file is damaged or foreign, or of another model; says what differs.
        """
        tensors = saved_memory.read(path, model)
        session = cls(model, lanes=len(tensors["read"]))
        state = session._at[0]
        fields = (tensors[name].to(session._device) for name in _named(state))
        session._at = like(state, fields), Progress(*(tensors[name] for name in Progress._fields))
        with torch.inference_mode():
            session._repeat_calls()
        return session

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _require_evaluation(self) -> None:
        if self.model.training:
            raise ValueError("the model is in training mode, in which dropout would fall: call model.eval() first")

    def _checked(
        self, tokens: Int[Tensor, "B T"], present: Bool[Tensor, "B T"] | None
    ) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
        """Tokens on the CPU, 0 where there is none, and how many each lane gets."""
        if tokens.dim() != 2 or len(tokens) != self.lanes or tokens.is_floating_point():
            got = f"got {list(tokens.shape)} of {tokens.dtype}"
            raise ValueError(f"tokens must be whole numbers of the shape [{self.lanes}, T], {got}")
        present = torch.ones_like(tokens, dtype=torch.bool) if present is None else present
        if present.shape != tokens.shape:
            raise ValueError(f"present must have the shape of tokens, {list(tokens.shape)}, got {list(present.shape)}")
        tokens, present = tokens.to("cpu", torch.int64), present.cpu()
        if (present[:, 1:] & ~present[:, :-1]).any():
            raise ValueError("present must be at the left: a token stands behind a place without one")
        tokens = tokens.masked_fill(~present, 0)
        outside = tokens[(tokens < 0) | (tokens >= self.model.vocab)]
        if len(outside):
            raise ValueError(f"tokens must be at least 0 and below vocab={self.model.vocab}, got {int(outside[0])}")
        return tokens, present.sum(1)

    def _advanced(self, state: S, tokens: Int[Tensor, "b L"], lanes: Int[Tensor, " b"]) -> S:
        """The state after a whole segment in some lanes."""
        tokens, lanes = tokens.to(self._device), lanes.to(self._device)
        present, starts = torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(lanes, dtype=torch.bool)
        leaving = self.model.advance(Segment(tokens, present, starts), _take(state, lanes))
        if len(lanes) == self.lanes:
            return leaving
        pairs = zip(state, leaving, strict=True)
        return like(state, (whole.index_copy(0, lanes, part) for whole, part in pairs))

    def _catch_up(self) -> None:
        """Have the model look at everything that has been fed."""
        state, progress = self._at
        begins = progress.calls[:, 0] == ABSENT
        drafted = (progress.calls[:, 1:] != ABSENT).sum(1, keepdim=True)
        places = torch.arange(self.model.segment_length)
        reads = (places >= drafted) & (places < progress.unfinished[:, None])
        calling = torch.cat((begins[:, None], reads), dim=1)
        if not calling.any():
            return
        sizes = progress.sizes.clone()
        sizes[begins, 0], sizes[:, 1:][reads] = begins.sum(), reads.sum(1).max()
        beside = torch.where(begins, begins.cumsum(0) - 1, progress.beside)
        called = progress._replace(sizes=sizes, beside=beside)
        try:
            self._do(calling, called)
        except BaseException:  # the draft may be torn: begin again
            self._at = state, progress._replace(calls=torch.full_like(progress.calls, ABSENT))
            raise
        self._at = state, called._replace(calls=progress.calls.masked_fill(calling, self._call))
        self._call += 1

    def _repeat_calls(self) -> None:
        """Make the draft of a saved memory once more, by the same calls: of the same shapes in the same order."""
        progress = self._at[1]
        for call in sorted(set(progress.calls.flatten().tolist()) - {ABSENT}):
            self._do(progress.calls == call, progress)
            self._call = call + 1

    def _do(self, calling: Bool[Tensor, "B P"], progress: Progress) -> None:
        """One call of the model: some lanes begin a segment, and some read tokens of it."""
        begins, reads = calling[:, 0], calling[:, 1:]
        if begins.any():
            self._begin(begins.nonzero()[:, 0], progress)
        if reads.any():
            self._extend(reads, progress)

    def _begin(self, lanes: Int[Tensor, " b"], progress: Progress) -> None:
        state, (among, beside) = self._at[0], (int(progress.sizes[lanes[0], 0]), progress.beside[lanes])
        if self._logits is None and len(lanes) < self.lanes:  # room for all
            self._logits, self._draft = self.model.begin(state, self.lanes)
        # where a lane stood that has begun again since, any other will do
        together = lanes[:1].repeat(among).index_copy(0, beside, lanes)
        logits, draft = self.model.begin(_take(state, together.to(self._device)), among)
        if len(lanes) == self.lanes:
            self._logits, self._draft = logits, draft
            return
        assert self._logits is not None
        lanes, beside = lanes.to(self._device), beside.to(self._device)
        for field, part in zip((self._logits, *self._draft), (logits, *draft), strict=True):
            if len(field) == self.lanes:
                field[lanes] = part[beside]

    def _extend(self, reads: Bool[Tensor, "B L"], progress: Progress) -> None:
        assert self._logits is not None
        width, length = int(progress.sizes[:, 1:][reads].max()), self.model.segment_length
        # the first token of the segment is the recent one at ``length - unfinished``
        first = length - progress.unfinished + reads.int().argmax(1)
        tokens = progress.recent.gather(1, (first[:, None] + torch.arange(width)).clamp(max=length - 1))
        present = torch.arange(width) < reads.sum(1, keepdim=True)
        tokens, present = tokens.masked_fill(~present, 0).to(self._device), present.to(self._device)
        logits, self._draft = self.model.extend(tokens, present, self._draft)
        self._logits = torch.where(present.any(1, keepdim=True), logits, self._logits)


def _take(state: S, lanes: Int[Tensor, " b"]) -> S:
    return like(state, (field[lanes] for field in state))


def _named(state: State) -> dict[str, Tensor]:
    names = getattr(state, "_fields", map(str, range(len(state))))
    return {f"state.{name}": field for name, field in zip(names, state, strict=True)}
