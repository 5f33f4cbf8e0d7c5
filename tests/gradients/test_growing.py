"""Fields that only gain rows: stored once, with the gradient of a plain loop."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from models import Case, assert_same, outcome, plain_loop
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.contract import checks
from memformer_pl.errors import UsageError
from memformer_pl.gradients.growing import ASSERTED, Storage, require_grown
from memformer_pl.gradients.replay import replay_backward, sparse_replay_backward
from memformer_pl.gradients.rollout import GRADIENTS
from memformer_pl.gradients.structure import flatten

REPLAYS = {"replay": replay_backward, "sparse_replay": sparse_replay_backward}
EXACT = ["replay", "sparse_replay", "bptt", "checkpointed"]


class Cached(NamedTuple):
    keys: Tensor
    """``[B, S, D]``"""
    values: Tensor
    exists: Tensor
    """``[B, S]``"""
    h: Tensor


GROWING = Cached(keys=1, values=-2, exists=1, h=None)  # type: ignore[arg-type]


class Attention(nn.Module):
    """Attends to all cached tokens, with a recurrent field beside them."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.qkv, self.cell, self.dropout = nn.Linear(4, 12), nn.GRUCell(4, 4), nn.Dropout(dropout)

    def forward(self, x: Tensor, state: Cached) -> tuple[Tensor, Cached]:
        query, key, value = self.qkv(x + state.h[:, None]).chunk(3, -1)
        keys, values = torch.cat((state.keys, key), 1), torch.cat((state.values, value), 1)
        exists = torch.cat((state.exists, x[..., 0] > -1), 1)
        weights = torch.where(exists[:, None], query @ keys.mT, -1e9).softmax(-1)
        y = self.dropout(weights @ values)
        return y, Cached(keys, values, exists, self.cell(y.mean(1), state.h))


def attention(horizon: int, *, dropout: float = 0.2, entering: str = "empty") -> Case:
    module = Attention(dropout).double()

    def step(x: Tensor, state: Cached) -> tuple[Tensor, Cached]:
        y, next_state = module(x, state)
        return (y**2).sum() + y.sum(), next_state

    segments = [torch.randn(2, 3 + t % 2, 4).double() for t in range(horizon)]
    rows = torch.zeros(2, 0, 4, dtype=torch.float64)
    state = Cached(rows, rows, rows[..., 0].bool(), rows.new_zeros(2, 4))
    if entering != "empty":
        state = module(torch.randn(2, 5, 4).double(), state)[1]
    if entering == "without a graph":
        state = Cached(*(field.detach() for field in state))
    return Case(module, step, segments, state)


@pytest.mark.parametrize("entering", ["empty", "with a graph", "without a graph"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("horizon", [1, 2, 3, 7])
@pytest.mark.parametrize("name", EXACT)
def test_growing_fields_get_the_gradient_of_a_plain_loop(
    name: str, horizon: int, dropout: float, entering: str
) -> None:
    build = partial(attention, horizon, dropout=dropout, entering=entering)
    assert_same(outcome(partial(GRADIENTS[name], growing=GROWING), build), outcome(plain_loop, build))


def packed(horizon: int, *, growing: bool = True) -> Case:
    """Rows that are views of one tensor, complex numbers, rows that nothing reads, and a field that stops growing."""
    linear = nn.Linear(4, 8).double()

    def step(x: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        a, b = linear(x).chunk(2, -1)
        z = torch.complex(a, b)
        rows = state["pair"]
        pair = [torch.cat((rows[0], a), 1), torch.cat((rows[1], b), 1)] if rows else [a, b]
        waves = torch.cat((state["waves"], z[:, :2]), 1) if state["waves"].shape[1] < 5 else state["waves"]
        unread = torch.cat((state["unread"], b), 1)
        loss = (pair[0] * pair[1].tanh()).sum() + (waves * waves.flip(1)).real.sum() + waves.abs().sum()
        return loss, {"pair": pair, "waves": waves, "unread": unread}

    none = torch.zeros(2, 0, 4, dtype=torch.float64)
    state = {"pair": None, "waves": none.to(torch.complex128), "unread": none}
    return Case(linear, step, list(torch.randn(horizon, 2, 3, 4).double()), state)  # type: ignore[arg-type]


def flat(state: dict[str, Any]) -> tuple[Tensor, ...]:
    return (*state["pair"], state["waves"], state["unread"])


def loop(step: Any, segments: Any, state: Any, **_: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    total = torch.zeros((), dtype=torch.float64)
    for x in segments:
        loss, state = step(x, state)
        total = total + loss
    total.backward()
    return total.detach(), tuple(tensor.detach() for tensor in flat(state))


@pytest.mark.parametrize(
    "growing",
    [1, {"pair": 1, "waves": 1, "unread": -2}, {"pair": [1, None], "waves": None, "unread": 1}],
)
@pytest.mark.parametrize("horizon", [1, 2, 6])
@pytest.mark.parametrize("name", REPLAYS)
def test_growing_fields_of_other_kinds(name: str, horizon: int, growing: Any) -> None:
    def flattened(*args: Any, **options: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, last = REPLAYS[name](*args, **options, growing=growing)
        return loss, flat(last)

    assert_same(outcome(flattened, partial(packed, horizon)), outcome(loop, partial(packed, horizon)))


def held_bytes(state: Any, growing: Any, states: int) -> int:
    """Bytes of all storages that stored states keep alive, each once."""
    stored = Storage(growing)
    for _ in range(states):
        flat_state = flatten(state, what="state")
        stored.push(flat_state)
        state = [torch.cat((field, torch.ones(2, 3, 4)), 1) for field in flat_state.build()]
    del state, flat_state
    gc.collect()
    kept = [tensor for each in stored._states for tensor in each.tensors().values()] + list(stored._last.values())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())


def test_64_states_take_the_memory_of_the_last_one() -> None:
    empty = [torch.zeros(2, 0, 4), torch.zeros(2, 0, 4)]
    last = 2 * 2 * 63 * 3 * 4 * 4
    assert held_bytes(empty, 1, 64) == last
    assert held_bytes(empty, None, 64) == 32 * last


@pytest.mark.parametrize(("name", "growing", "most"), [("replay", 1, 2), ("replay", None, 16), ("sparse_replay", 1, 4)])
def test_no_more_than_two_caches_are_in_memory_at_once(name: str, growing: int | None, most: int) -> None:
    """While a segment is read: that which holds the rows of all, and that which the segment returns. Sparse replay has
    two more for the states that it computes again."""
    in_memory: set[int] = set()
    counts = []

    class Noted(torch.autograd.Function):
        """A copy whose memory is noted until it is freed; counts in both directions."""

        @staticmethod
        def forward(ctx: Any, rows: Tensor) -> Tensor:
            kept, number = rows.clone(), len(counts)
            in_memory.add(number)
            weakref.finalize(kept.untyped_storage(), in_memory.discard, number)
            counts.append(len(in_memory))
            return kept

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            counts.append(len(in_memory))
            return grad

    linear = nn.Linear(4, 4)

    def step(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        rows = Noted.apply(torch.cat((state, linear(x)), 1))
        return rows.square().sum(), rows

    gc.disable()
    try:
        REPLAYS[name](step, list(torch.randn(16, 2, 3, 4)), torch.zeros(2, 0, 4), growing=growing)
    finally:
        gc.enable()
    assert max(counts) == most


BROKEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "an old row changes": lambda old, new: torch.cat((old * 1.5, new), 1),
    "the first old row moves": lambda old, new: torch.cat((old.roll(1, 1), new), 1),
    "new rows come first": lambda old, new: torch.cat((new, old), 1),
}
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rows are dropped": lambda old, new: torch.cat((old[:, 2:], new), 1)[:, -2:],
    "another axis grows": lambda old, new: F.pad(torch.cat((old, new), 1), (0, old.shape[1])),
}


@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("mistake", [*BROKEN, *SHAPES])
@pytest.mark.parametrize("name", REPLAYS)
def test_a_field_that_does_more_than_grow_is_refused(name: str, mistake: str, horizon: int) -> None:
    linear = nn.Linear(4, 4)
    change = (BROKEN | SHAPES)[mistake]

    def step(x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = change(state["rows"], linear(x))
        return rows.square().sum(), {"rows": rows}

    how = "with other" if mistake in BROKEN else "without the"
    told = rf"growing says that state\['rows'\] only gains rows along axis 1, but step was given .*, {how} old rows:"
    with pytest.raises(TypeError, match=told):
        REPLAYS[name](step, list(torch.randn(horizon, 2, 3, 4)), {"rows": torch.randn(2, 3, 4)}, growing=1)


def test_where_the_host_would_wait_the_device_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "has_values", lambda tensor: False)
    before, after = (flatten(torch.full((2, 3), value), what="state") for value in (1.0, 2.0))
    require_grown(before, before._replace(leaves={(): torch.ones(1, 3)}), {(): 0}, by="step")
    with pytest.raises(RuntimeError, match="growing says that state only gains rows") as error:
        require_grown(after, before, {(): 0}, by="step" * 100)
    assert len(str(error.value)) <= ASSERTED


@pytest.mark.parametrize("name", REPLAYS)
def test_an_advance_that_does_more_than_grow_is_refused(name: str) -> None:
    def step(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return state.sum() * x.sum(), torch.cat((state, x), 1)

    with pytest.raises(TypeError, match=r"growing says that state only .* but advance was given"):
        REPLAYS[name](
            step, list(torch.randn(3, 2, 3, 4)), torch.zeros(2, 1, 4), growing=1, advance=lambda x, s: step(x, s + 1)[1]
        )


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.complex128, torch.bool, torch.int8]
)
def test_rows_are_compared_bit_by_bit(dtype: torch.dtype) -> None:
    rows = torch.tensor([[1.0], [float("nan")], [0.0]]).to(dtype)
    before, same = flatten(rows[:2], what="state"), flatten(rows.clone(), what="state")
    require_grown(same, before, {(): 0}, by="step")
    other = rows.clone()
    other[0] = 0
    with pytest.raises(TypeError, match="with other old rows"):
        require_grown(flatten(other, what="state"), before, {(): 0}, by="step")


@pytest.mark.parametrize(
    ("growing", "message"),
    [
        (3, r"names axis 3 of state\['rows'\], which has the shape \[2, 3, 4\]"),
        ({"rows": -4, "n": None}, r"names axis -4 of state\['rows'\]"),
        ({"rows": "1", "n": None}, r"must be an axis or None for state\['rows'\], got '1'"),
        (
            {"row": 1},
            r"must have the structure .*: state has the parts \['rows'\], \['n'\], got \{'row': 1\}",
        ),
        ((1, None, None), r"must have the structure of the state"),
        (1, r"names axis 1 of state\['n'\], which has the shape \[\]"),
    ],
)
def test_an_argument_growing_that_does_not_fit_is_refused(growing: Any, message: str) -> None:
    state = {"rows": torch.zeros(2, 3, 4), "n": torch.tensor(0)}
    with pytest.raises(UsageError, match=message):
        replay_backward(lambda x, s: (x.sum(), s), [torch.zeros(1)], state, growing=growing)
