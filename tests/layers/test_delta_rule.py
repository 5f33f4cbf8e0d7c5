"""Chunks of a linear recurrence equal its loop over tokens, whatever their length and however strong the decay."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from memformer_pl.errors import UsageError
from memformer_pl.layers.delta_rule import Writes, read_and_write, require_chunk, write_only

close = torch.testing.assert_close
LANES, HEADS, LENGTH, KEY, VALUE = 2, 3, 7, 4, 5
INFINITE = float("inf")


class Kind(NamedTuple):
    corrects: bool
    decays: int
    """Decays of a head; 0 for none."""


KINDS = {
    "gated delta": Kind(True, 1),
    "delta": Kind(True, 0),
    "gla": Kind(False, KEY),
    "mamba2": Kind(False, 1),
    "delta with a decay for each entry": Kind(True, KEY),
}
DECAYING = {name: kind for name, kind in KINDS.items() if kind.decays}


class Case(NamedTuple):
    memory: Tensor
    queries: Tensor
    writes: Writes

    def fields(self) -> list[Tensor]:
        return [self.memory, self.queries, *self.writes]


def case(kind: Kind, *, length: int = LENGTH, strength: float = 1.0) -> Case:
    """Random numbers with gradients; ``strength`` of the decay."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(LANES, HEADS, *shape, dtype=torch.float64)

    queries, keys = (torch.nn.functional.normalize(normal(length, KEY), dim=-1) for _ in range(2))
    log_decay = -strength * normal(length, max(kind.decays, 1)).abs() * bool(kind.decays)
    writes = Writes(keys, normal(length, VALUE), normal(length, 1).sigmoid(), log_decay)
    made = Case(normal(KEY, VALUE), queries, writes)
    for field in made.fields():
        field.requires_grad_()
    return made


def loop(made: Case, *, corrects: bool) -> tuple[Tensor, Tensor]:
    """The recurrence as it is defined, token by token."""
    memory, read = made.memory, []
    for n in range(made.queries.shape[2]):
        key, value, strength, log_decay = (field[:, :, n] for field in made.writes)
        memory = log_decay.exp()[..., None] * memory
        held = (key[..., None] * memory).sum(2) if corrects else 0.0
        memory = memory + key[..., None] * (strength * (value - held))[:, :, None]
        read.append((made.queries[:, :, n, :, None] * memory).sum(2))
    return torch.stack(read, dim=2), memory


def gradients(made: Case, results: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Gradients of all that enters, from both results."""
    weights = torch.Generator().manual_seed(1)
    total = sum((each * torch.rand(each.shape, generator=weights).to(each.dtype)).sum() for each in results)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, made.fields(), materialize_grads=True))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7, 64])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_chunks_equal_the_loop_over_tokens_with_all_their_gradients(kind: Kind, chunk: int) -> None:
    made = case(kind)
    got = read_and_write(*made, corrects=kind.corrects, chunk=chunk)
    expected = loop(made, corrects=kind.corrects)
    close(got, expected, rtol=1e-12, atol=1e-12)
    close(gradients(made, got), gradients(made, expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_two_calls_equal_one(kind: Kind) -> None:
    made = case(kind)
    first, second = (Writes(*(field[:, :, part] for field in made.writes)) for part in (slice(4), slice(4, None)))
    read, memory = read_and_write(made.memory, made.queries[:, :, :4], first, corrects=kind.corrects, chunk=3)
    more, memory = read_and_write(memory, made.queries[:, :, 4:], second, corrects=kind.corrects, chunk=3)
    close((torch.cat((read, more), dim=2), memory), loop(made, corrects=kind.corrects), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_writing_alone_is_the_same_bit_for_bit(kind: Kind) -> None:
    made = case(kind)
    _, memory = read_and_write(*made, corrects=kind.corrects, chunk=3)
    assert torch.equal(write_only(made.memory, made.writes, corrects=kind.corrects, chunk=3), memory)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_absent_tokens_leave_memory_as_the_last_one_that_exists_left_it(kind: Kind) -> None:
    made, lengths = case(kind), torch.tensor([2, 0])
    masked = made.writes.masked(torch.arange(LENGTH) < lengths[:, None])
    read, memory = read_and_write(made.memory, made.queries, masked, corrects=kind.corrects, chunk=3)
    expected, after_two = loop(
        Case(made.memory, made.queries[:, :, :2], Writes(*(field[:, :, :2] for field in made.writes))),
        corrects=kind.corrects,
    )
    close((read[0, :, :2], memory[0]), (expected[0], after_two[0]), rtol=1e-12, atol=1e-12)
    assert torch.equal(memory[1], made.memory[1])


def by_hand(*tokens: tuple[list[float], float, float, list[float]], corrects: bool, chunk: int = 2) -> list[float]:
    """Memory, with values of width 1, after tokens with a key, a value, a strength and a decay each."""
    keys, values, strengths, decays = (torch.tensor(field, dtype=torch.float64) for field in zip(*tokens, strict=True))
    writes = Writes(keys, values[:, None], strengths[:, None], decays.log())
    memory = torch.zeros(1, 1, keys.shape[1], 1, dtype=torch.float64)
    writes = Writes(*(field[None, None] for field in writes))
    read, memory = read_and_write(memory, writes.keys, writes, corrects=corrects, chunk=chunk)
    close(read[0, 0, -1, 0], keys[-1] @ memory[0, 0, :, 0])  # the last token reads what it has written too
    rows: list[float] = memory[0, 0, :, 0].tolist()
    return rows


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_three_tokens_by_hand(chunk: int) -> None:
    first, second, third = ([1.0, 0.0], 4.0, 0.5, [1.0]), ([0.0, 1.0], 8.0, 1.0, [0.5]), ([1.0, 0.0], 0.0, 1.0, [1.0])
    # half of 4, half of which is left; the whole 8
    assert by_hand(first, second, corrects=True, chunk=chunk) == [1.0, 8.0]
    # a write of full strength replaces what is under its key, and nothing else
    assert by_hand(first, second, third, corrects=True, chunk=chunk) == [0.0, 8.0]
    # without correction, writing nothing under a key leaves what is there
    assert by_hand(first, second, third, corrects=False, chunk=chunk) == [1.0, 8.0]


def test_the_decay_comes_before_the_error() -> None:
    # 4, halved to 2, is moved by half of what is missing to 6; with the error first it would be 2 + (6 - 4) / 2 = 3
    assert by_hand(([1.0, 0.0], 4.0, 1.0, [1.0]), ([1.0, 0.0], 6.0, 0.5, [0.5]), corrects=True) == [4.0, 0.0]


def test_each_entry_of_a_key_may_decay_on_its_own() -> None:
    tokens = ([0.5, 1.0], 4.0, 1.0, [1.0, 1.0]), ([1.0, 0.0], 8.0, 2.0, [0.5, 0.25])
    assert by_hand(*tokens, corrects=False) == [0.5 * 2 + 16, 0.25 * 4]


@pytest.mark.parametrize("kind", DECAYING.values(), ids=DECAYING)
@pytest.mark.parametrize("chunk", [3, 64])
def test_decay_beyond_the_range_of_numbers_costs_no_digits(kind: Kind, chunk: int) -> None:
    """Products of such decays are 0, and differences of their logarithms would be off by one in a thousand."""
    made = case(kind, length=60)
    with torch.no_grad():
        made.writes.log_decay[:, :, ::5] *= 1e4
    assert made.writes.log_decay.sum(2).max() < -1e4  # exp(-104) is 0 in single precision, exp(-746) in double
    rounded = [field.detach().float().requires_grad_() for field in made.fields()]
    single = Case(*rounded[:2], Writes(*rounded[2:]))
    got, expected = (
        read_and_write(*single, corrects=kind.corrects, chunk=chunk),
        loop(made, corrects=kind.corrects),
    )
    close([each.double() for each in got], list(expected), rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(single, got), gradients(made, expected), strict=True):
        close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", DECAYING.values(), ids=DECAYING)
def test_where_nothing_is_kept_each_token_reads_its_own_write(kind: Kind) -> None:
    made = case(kind)
    nothing = torch.full_like(made.writes.log_decay, -INFINITE).requires_grad_()
    made = made._replace(writes=made.writes._replace(log_decay=nothing))
    read, memory = got = read_and_write(*made, corrects=kind.corrects, chunk=3)
    keys, values, strength, _ = made.writes
    match = (made.queries * keys).sum(-1, keepdim=True)
    close(read, match * strength * values, rtol=1e-12, atol=1e-12)
    close(memory, keys[:, :, -1, :, None] * (strength * values)[:, :, -1, None], rtol=1e-12, atol=1e-12)
    assert all(gradient.isfinite().all() for gradient in gradients(made, got))


def test_autocast_changes_nothing() -> None:
    made = case(KINDS["gated delta"])
    memory, queries, *writes = (field.detach().float() for field in made.fields())
    plain = read_and_write(memory, queries, Writes(*writes), corrects=True, chunk=3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = read_and_write(memory, queries, Writes(*writes), corrects=True, chunk=3)
        alone = write_only(memory, Writes(*writes), corrects=True, chunk=3)
    assert all(torch.equal(a, b) and a.dtype is torch.float32 for a, b in zip(plain, mixed, strict=True))
    assert torch.equal(alone, plain[1])


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (0, "chunk must be at least 1, got 0"),
        (17, "chunk must be at most segment_length=16, got 17: lower it, or set null"),
    ],
)
def test_a_chunk_that_no_segment_fills_is_refused(chunk: int, message: str) -> None:
    for fits in (None, 1, 16):
        require_chunk(fits, segment_length=16)
    with pytest.raises(UsageError, match=message):
        require_chunk(chunk, segment_length=16)
