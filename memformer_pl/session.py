"""Sessions: a trained model reads and writes text of any length, token by token, at constant memory and speed.

Whole segments go into the state without being predicted. What is left of the last one is read token by token, by keys
and values that are kept from token to token (a draft), and only once somebody asks what comes next.

B  lanes     T  tokens that are fed     L  tokens in a segment     V  vocabulary
"""

import os
from typing import Generic

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memformer_pl import saved_memory
from memformer_pl.recurrence import ABSENT, Draft, S, Segment, SegmentModel, State, like
from memformer_pl.sampling import Sampling
from memformer_pl.sizes import require_sizes


class Session(Generic[S]):
    """Texts that a model reads side by side, one in each lane. Two sessions share nothing but the model.

    Nothing here grows with what has been read. A model in training mode is refused, since dropout would fall. Weights
    must not change while a session lasts. Where feeding is interrupted, nothing of what was fed has been read.

    Args:
        model: In evaluation mode.
        lanes: How many texts.
    """

    def __init__(self, model: SegmentModel[S], *, lanes: int = 1) -> None:
        require_sizes(lanes=lanes)
        self.model, length = model, model.segment_length
        self._require_evaluation()
        with torch.inference_mode():
            self._state = model.initial_state(lanes)
        self._tokens_read = torch.zeros(lanes, dtype=torch.int64)
        self._recent = torch.full((lanes, length), ABSENT)
        self._unfinished = torch.zeros(lanes, dtype=torch.int64)
        # In which call of the model each lane began its segment, and read each of its tokens; ABSENT where it has not
        # yet. And how many lanes began at once there, and how many tokens were read: with these, the numbers of a
        # draft can be made once more to the last bit.
        self._calls = torch.full((lanes, 1 + length), ABSENT)
        self._sizes = torch.zeros_like(self._calls)
        self._call = 0
        self._logits: Tensor | None = None
        self._draft: Draft = ()

    @property
    def lanes(self) -> int:
        """How many texts are read side by side."""
        return len(self._recent)

    @property
    def tokens_read(self) -> Int[Tensor, " B"]:
        """How many tokens each lane has read, those that it has drawn included."""
        return self._tokens_read.clone()

    @property
    def recent(self) -> Int[Tensor, "B L"]:
        """The last tokens of each lane, at the right; ``ABSENT`` where there were not as many yet."""
        return self._recent.clone()

    def repeated(self, lanes: int) -> "Session[S]":
        """A session of so many lanes, each of which has read what the only lane of this one has.

        Raises:
            ValueError: This one has several lanes.
        """
        if self.lanes != 1:
            raise ValueError(f"only a session of one lane can be repeated, this one has {self.lanes}")
        session, rows = Session(self.model, lanes=lanes), torch.zeros(lanes, dtype=torch.int64)
        session._state = _take(self._state, rows)
        for name in ("_tokens_read", "_recent", "_unfinished"):
            setattr(session, name, getattr(self, name)[rows])
        return session

    @torch.inference_mode()
    def feed(self, tokens: Int[Tensor, "B T"], present: Bool[Tensor, "B T"] | None = None) -> None:
        """Read on.

        Args:
            tokens: What follows in each lane; any number of them, also none.
            present: Which of them exist, at the left; by default all.

        Raises:
            ValueError: Tokens are of another number of lanes or not of the vocabulary, or do not stand at the left; the
                session is as before.
        """
        self._require_evaluation()
        tokens, arrived = self._checked(tokens, present)
        both, length = torch.cat((self._recent, tokens), dim=1), self.model.segment_length
        unread = self._unfinished + arrived
        # of what each lane remembers and gets, what is not yet in its state, at the left
        first = length - self._unfinished[:, None]
        unread_BT = both.gather(1, (first + torch.arange(int(unread.max()))).clamp(max=both.shape[1] - 1))
        state, whole = self._state, unread // length
        for n in range(int(whole.max())):
            lanes = (whole > n).nonzero()[:, 0]
            state = self._advanced(state, unread_BT[lanes, n * length : (n + 1) * length], lanes)
        calls = self._calls.masked_fill(whole[:, None] > 0, ABSENT)
        recent = both.gather(1, arrived[:, None] + torch.arange(length))
        self._state, self._calls, self._recent = state, calls, recent
        self._unfinished, self._tokens_read = unread - whole * length, self._tokens_read + arrived

    @property
    def log_probs(self) -> Float[Tensor, "B V"]:
        """Logarithms of the chances of each lane's next token, in float32 at least."""
        self._require_evaluation()
        with torch.inference_mode():
            self._catch_up()
            assert self._logits is not None
            return self._logits.to(torch.promote_types(self._logits.dtype, torch.float32)).log_softmax(-1)

    def next(self, sampling: Sampling) -> Int[Tensor, " B"]:
        """Draw the next token of each lane, and read it."""
        tokens = sampling(self.log_probs, self._recent)
        self.feed(tokens[:, None])
        return tokens

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all that is remembered, as safetensors: the state, and the tokens of the segment that is not yet whole.

        A session that is opened from the file goes on as this one does, bit for bit on the same machine. A file is as
        large as the state and a segment's tokens, however long the text was.
        """
        own = {name: getattr(self, f"_{name}") for name in ("tokens_read", "recent", "unfinished", "calls", "sizes")}
        state = {f"state.{name}": tensor for name, tensor in _named(self._state).items()}
        saved_memory.write(path, {**own, **state}, self.model)

    @classmethod
    def load(cls, model: SegmentModel[S], path: str | os.PathLike[str]) -> "Session[S]":
        """Go on from a saved memory, on the model's device.

        Raises:
            ValueError: The file is damaged or foreign, or of another model; says what differs.
        """
        tensors = saved_memory.read(path, model)
        session = cls(model, lanes=len(tensors["recent"]))
        device = next(model.parameters()).device
        fields = (tensors[f"state.{name}"].to(device) for name in _named(session._state))
        session._state = like(session._state, fields)
        for name in ("tokens_read", "recent", "unfinished", "calls", "sizes"):
            setattr(session, f"_{name}", tensors[name])
        with torch.inference_mode():
            session._repeat_calls()
        return session

    def _require_evaluation(self) -> None:
        if self.model.training:
            raise ValueError("the model is in training mode, in which dropout would fall: call model.eval() first")

    def _checked(
        self, tokens: Int[Tensor, "B T"], present: Bool[Tensor, "B T"] | None
    ) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
        """Tokens on the CPU, 0 where there is none, and how many each lane gets."""
        if tokens.dim() != 2 or len(tokens) != self.lanes:
            raise ValueError(f"tokens must have the shape [{self.lanes}, T], got {list(tokens.shape)}")
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
        device = next(self.model.parameters()).device
        tokens, lanes = tokens.to(device), lanes.to(device)
        present, starts = torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(lanes, dtype=torch.bool)
        leaving = self.model.advance(Segment(tokens, present, starts), _take(state, lanes))
        if len(lanes) == self.lanes:
            return leaving
        pairs = zip(state, leaving, strict=True)
        return like(state, (whole.index_copy(0, lanes, part) for whole, part in pairs))

    def _catch_up(self) -> None:
        """Have the model look at everything that has been fed."""
        begun = self._calls[:, 0] != ABSENT
        drafted = (self._calls[:, 1:] != ABSENT).sum(1)
        piece = int((self._unfinished - drafted).max())
        if begun.all() and not piece:
            return
        calls, sizes = self._calls.clone(), self._sizes.clone()
        if not begun.all():
            lanes = (~begun).nonzero()[:, 0]
            calls[lanes, 0], sizes[lanes, 0] = self._call, len(lanes)
            self._begin(lanes)
        if piece:
            places = torch.arange(self.model.segment_length)
            now = (places >= drafted[:, None]) & (places < self._unfinished[:, None])
            calls[:, 1:][now], sizes[:, 1:][now] = self._call, piece
            self._extend(now, width=piece)
        self._calls, self._sizes, self._call = calls, sizes, self._call + 1

    def _repeat_calls(self) -> None:
        """Make the draft of a saved memory once more, by the same calls: of the same shapes in the same order."""
        for call in sorted(set(self._calls.flatten().tolist()) - {ABSENT}):
            began = self._calls == call
            lanes = began[:, 0].nonzero()[:, 0]
            if len(lanes):
                others = int(self._sizes[lanes[0], 0]) - len(lanes)
                self._begin(torch.cat((lanes, lanes[:1].expand(others))))
            if began[:, 1:].any():
                self._extend(began[:, 1:], width=int(self._sizes[:, 1:][began[:, 1:]].max()))
            self._call = call + 1

    def _begin(self, lanes: Int[Tensor, " b"]) -> None:
        """Begin a segment in some lanes."""
        all_of_them = len(set(lanes.tolist())) == self.lanes
        lanes = lanes.to(next(self.model.parameters()).device)
        logits, draft = self.model.begin(_take(self._state, lanes), len(lanes))
        if all_of_them:
            self._logits, self._draft = logits, draft
            return
        if self._logits is None:
            self._logits, *fields = (
                part if len(part) < len(lanes) else part.new_zeros(self.lanes, *part.shape[1:])
                for part in (logits, *draft)
            )
            self._draft = like(draft, fields)
        for field, part in zip((self._logits, *self._draft), (logits, *draft), strict=True):
            if len(field) == self.lanes:
                field[lanes] = part

    def _extend(self, now: Bool[Tensor, "B L"], *, width: int) -> None:
        """Read tokens of the segment that is not yet whole."""
        assert self._logits is not None
        count, length = now.sum(1), self.model.segment_length
        # the first token of the segment stands in the recent ones at ``length - unfinished``
        first = length - self._unfinished + now.int().argmax(1)
        tokens = self._recent.gather(1, (first[:, None] + torch.arange(width)).clamp(max=length - 1))
        present = torch.arange(width) < count[:, None]
        device = self._logits.device
        tokens, present = tokens.masked_fill(~present, 0).to(device), present.to(device)
        logits, self._draft = self.model.extend(tokens, present, self._draft)
        self._logits = torch.where(present.any(1, keepdim=True), logits, self._logits)


def _take(state: S, lanes: Int[Tensor, " b"]) -> S:
    return like(state, (field[lanes] for field in state))


def _named(state: State) -> dict[str, Tensor]:
    return dict(zip(getattr(state, "_fields", map(str, range(len(state)))), state, strict=True))
