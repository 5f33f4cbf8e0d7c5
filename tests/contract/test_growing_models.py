"""A model whose state gains rows: what the contract does with them, everywhere."""

from typing import NamedTuple

import pytest
import torch
from models import (
    LANES,
    LENGTH,
    VOCAB,
    Case,
    assert_same,
    full,
    irregular,
    losses_of,
    make_segment,
    outcome,
    plain_loop,
    train_on,
)
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.contract import DecodingCache, Segment, SegmentModel, SegmentOutput, detach, select_lanes
from memformer_pl.errors import UsageError
from memformer_pl.gradients.rollout import GRADIENTS, add_gradient
from memformer_pl.inference import Session
from memformer_pl.training.distributed import gather_lanes
from memformer_pl.training.nonfinite import reset_nonfinite


class Rows(NamedTuple):
    rows: Tensor
    """``[B, S, D]``"""
    exists: Tensor
    """``[B, S]``"""
    length: Tensor
    """``[B]``, of the present document so far."""


class Remembering(SegmentModel[Rows]):
    """Predicts every token of a segment from the sum of the document's rows; adds a row for each token."""

    def __init__(self, *, vocab_size: int = VOCAB, segment_length: int = LENGTH, dim: int = 4) -> None:
        super().__init__(vocab_size=vocab_size, segment_length=segment_length)
        self.dim = dim
        self.growing = {"rows": 1, "exists": 1}
        self.table, self.head = nn.Embedding(vocab_size, dim), nn.Linear(dim, vocab_size)

    def initial_state(self, lanes: int) -> Rows:
        rows = self.table.weight.new_zeros(lanes, 0, self.dim)
        return Rows(rows, rows[..., 0].bool(), torch.zeros(lanes, dtype=torch.int64))

    @staticmethod
    def seen(state: Rows) -> Tensor:
        behind = state.exists.flip(1).cumsum(1).flip(1)
        return state.exists & (behind <= state.length[:, None])

    def step(self, segment: Segment, state: Rows) -> tuple[SegmentOutput, Rows]:
        read = (state.rows * self.seen(state)[..., None]).sum(1, keepdim=True)
        logits = self.head(torch.tanh(read)).expand(-1, segment.tokens.shape[1], -1)
        losses = F.cross_entropy(logits.mT, segment.tokens, reduction="none") * segment.target_mask
        right = (logits.argmax(-1) == segment.tokens) & segment.target_mask
        rows = self.table(segment.tokens) * segment.token_mask[..., None]
        next_state = Rows(
            torch.cat((state.rows, rows), 1),
            torch.cat((state.exists, segment.token_mask), 1),
            state.length + segment.token_mask.sum(1),
        )
        return SegmentOutput(losses, right, losses.new_zeros(())), next_state

    def compact(self, state: Rows) -> Rows:
        seen = self.seen(state)
        width = int(seen.sum(1).amax())
        order = seen.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        rows = state.rows.gather(1, order[..., None].expand(-1, -1, self.dim))
        exists = seen.gather(1, order)
        return Rows(rows * exists[..., None], exists, state.length)

    def prefill(self, state: Rows, lanes: int) -> tuple[Tensor, DecodingCache]:
        read = (state.rows * self.seen(state)[..., None]).sum(1)
        logits = self.head(torch.tanh(read))
        return logits, (logits,)

    def decode(self, tokens: Tensor, token_mask: Tensor, cache: DecodingCache) -> tuple[Tensor, DecodingCache]:
        return cache[0], cache


def remembering() -> Remembering:
    torch.manual_seed(1)
    return Remembering().double()


@pytest.mark.parametrize("name", ["replay", "sparse_replay", "checkpointed", "bptt"])
@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_the_gradient_is_that_of_a_plain_loop(name: str, horizon: int) -> None:
    def case() -> Case:
        model = remembering()
        state = model.initial_state(LANES)
        for segment in irregular(2):
            state = model.advance(segment, state)
        return train_on(model, irregular(horizon), state)

    def growing(step: object, segments: object, state: object, **options: object) -> object:
        return GRADIENTS[name](step, segments, state, **options, growing=Rows(1, 1, None))  # type: ignore[arg-type]

    assert_same(outcome(growing, case), outcome(plain_loop, case))  # type: ignore[arg-type]


def test_the_gradient_of_a_model_stores_its_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def replay(*args: object, growing: object, **options: object) -> object:
        given.append(growing)
        return original(*args, growing=growing, **options)

    original = GRADIENTS["replay"]
    monkeypatch.setitem(GRADIENTS, "replay", replay)
    model = remembering()
    add_gradient(model, lambda o: o.token_losses.sum(), full(3), model.initial_state(2), gradient="replay")
    assert given == [[1, 1, None]]


def test_lanes_that_start_or_rest_see_their_own_rows() -> None:
    """Each lane's losses are those of its documents, read alone."""
    model, segments = remembering(), irregular(5)
    losses = losses_of(model, segments)
    for lane in range(LANES):
        state = model.initial_state(1)
        for segment, expected in zip(segments, losses, strict=True):
            own = Segment(*(field[lane : lane + 1] for field in segment[:3]))
            if own.document_start.any():
                state = model.initial_state(1)
            output, state = model(own, state)
            torch.testing.assert_close(output.token_losses[0], expected[lane], rtol=0, atol=1e-12)


def test_compacting_changes_no_loss() -> None:
    """In lanes that all start a document now and then."""
    model, state, compacted = remembering(), *[remembering().initial_state(LANES - 1)] * 2
    for segment in (Segment(*(field[1:] for field in segment[:3])) for segment in irregular(7)):
        (a, state), (b, compacted) = model(segment, state), model(segment, compacted)
        torch.testing.assert_close(a.token_losses, b.token_losses, rtol=0, atol=1e-12)
        compacted = model.compact(compacted)
        assert compacted.rows.shape[1] == int(compacted.length.max())
    assert state.rows.shape[1] == 7 * LENGTH > compacted.rows.shape[1]


def test_other_lengths_of_growing_fields_are_accepted_and_other_shapes_are_not() -> None:
    model, segment = remembering(), make_segment([5, 5])
    state = model.initial_state(2)
    model(segment, state._replace(rows=torch.zeros(2, 3, 4).double(), exists=torch.zeros(2, 3).bool()))
    with pytest.raises(UsageError, match=r"field rows of the state of a Remembering must have the shape \[2, 0, 4\]"):
        model(segment, state._replace(rows=torch.zeros(2, 3, 5).double()))
    with pytest.raises(UsageError, match=r"field length of the state of a Remembering must have the shape \[2\]"):
        model(segment, state._replace(length=torch.zeros(2, 1).long()))


def test_lanes_of_states_that_have_grown_differently_can_be_chosen_between() -> None:
    model = remembering()
    short, long = model.initial_state(2), model.initial_state(2)
    for segment in full(3):
        long = model.advance(segment, long)
    mixed = select_lanes(torch.tensor([True, False]), short, long)
    assert mixed.rows.shape == long.rows.shape
    assert not mixed.rows[0].any()
    assert not mixed.exists[0].any()
    assert torch.equal(mixed.rows[1], long.rows[1])


def test_rows_that_are_not_finite_are_reset() -> None:
    model, state = remembering(), remembering().initial_state(2)
    state = detach(model.advance(full(1)[0], state))
    state.rows[0, 1] = float("nan")
    after, lanes = reset_nonfinite(model, state, model.initial_state(2), like=torch.zeros(2).bool())
    assert int(lanes) == 1
    assert all(bool(field.isfinite().all()) for field in after)
    output, _ = model(make_segment([5, 5]), after)
    expected, _ = model(make_segment([5, 5]), select_lanes(torch.tensor([True, False]), model.initial_state(2), state))
    assert torch.equal(output.token_losses, expected.token_losses)


def test_states_of_ranks_that_have_grown_differently_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = remembering()
    ranks = [model.initial_state(1), model.advance(make_segment([4]), model.initial_state(1))]
    as_lists = [[field.detach() for field in state] for state in ranks]
    monkeypatch.setattr("memformer_pl.training.distributed.gather", lambda value: as_lists)
    rows, exists, lengths = gather_lanes(ranks[0])
    assert rows.shape == (2, LENGTH, 4)
    assert exists.sum(1).tolist() == lengths.tolist() == [0, 4]


def test_a_model_that_grows_has_memory() -> None:
    assert remembering().has_memory()


def test_reset_memory_takes_the_rows_away() -> None:
    model = remembering()
    state = model.advance(full(1)[0], model.initial_state(2))
    assert model.reset_memory(state).rows.shape[1] == 0


def test_sessions_read_lanes_that_advance_at_different_times() -> None:
    model = remembering().eval()
    tokens = torch.randint(VOCAB, (2, 4 * LENGTH), generator=torch.Generator().manual_seed(5))
    both = Session(model, lanes=2)
    feeds = [(3, 7), (0, 9), (8, 0), (9, 4)]
    read = [0, 0]
    alone = [Session(model), Session(model)]
    for counts in feeds:
        width = max(counts)
        part, mask = torch.zeros(2, width, dtype=torch.int64), torch.arange(width) < torch.tensor(counts)[:, None]
        for lane, count in enumerate(counts):
            part[lane, :count] = tokens[lane, read[lane] : read[lane] + count]
            alone[lane].feed(part[lane : lane + 1, :count])
            read[lane] += count
        both.feed(part, mask)
        expected = torch.cat([session.log_probs for session in alone])
        torch.testing.assert_close(both.log_probs, expected, rtol=0, atol=1e-12)
