"""A step that returns something else than it should is told so, in every way to a gradient and in either pass."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from models import Case, assert_same, irregular, memformer, outcome, plain_loop
from torch import Tensor, nn

from memformer_pl.contract import State
from memformer_pl.errors import UsageError
from memformer_pl.gradients.grouped import replay_in_groups
from memformer_pl.gradients.replay import replay_backward
from memformer_pl.gradients.rollout import GRADIENTS, add_gradient

EXACT = ["replay", "sparse_replay", "bptt", "checkpointed"]
REPLAYS = ["replay", "sparse_replay"]

pytestmark = pytest.mark.usefixtures("no_type_checks")


class Hidden(NamedTuple):
    h: Tensor
    c: Tensor


class Other(NamedTuple):
    h: Tensor
    c: Tensor


def segments(horizon: int = 3) -> list[Tensor]:
    return list(torch.randn(horizon, 3, 4))


def entering() -> Hidden:
    return Hidden(torch.zeros(3, 6), torch.zeros(3, 6))


def stepping(returned: Callable[[Tensor, Tensor], Any], *, at: int = 0) -> Callable[[Tensor, Hidden], Any]:
    """A step that goes wrong from its ``at``-th call on."""
    cell, calls = nn.LSTMCell(4, 6), []

    def step(x: Tensor, state: Hidden) -> Any:
        calls.append(x)
        h, c = cell(x, (state[0], state[1]))
        return returned(h, c) if len(calls) > at else (h.sum(), Hidden(h, c))

    return step


STATES: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "nested": (lambda h, c: ((h, c),), r"\(\(float32\[3, 6\], float32\[3, 6\]\)\)"),
    "None inside": (lambda h, c: Hidden(h, None), r"Hidden\(float32\[3, 6\], None\)"),
    "None": (lambda h, c: None, "None as"),
    "a tensor": (lambda h, c: h, r"float32\[3, 6\] as"),
    "a tensor of two rows": (lambda h, c: h[:2], r"float32\[2, 6\] as"),
    "a list": (lambda h, c: [h, c], r"list\(float32\[3, 6\], float32\[3, 6\]\)"),
    "a dictionary": (lambda h, c: {"h": h, "c": c}, "dict as"),
    "a field less": (lambda h, c: (h,), r"\(float32\[3, 6\]\)"),
    "a field more": (lambda h, c: (h, c, c), r"\(float32\[3, 6\], float32\[3, 6\], float32\[3, 6\]\)"),
    "nothing": (lambda h, c: (), r"\(\) as"),
    "numbers": (lambda h, c: Hidden(1.0, 2.0), r"Hidden\(float, float\)"),  # type: ignore[arg-type]
    "without its names": (lambda h, c: (h, c), r"returned \(float32"),
    "under other names": (lambda h, c: Other(h, c), r"returned Other\(float32"),
}
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "a number": (lambda h, c: 0.0, "returned float as the loss"),
    "None": (lambda h, c: None, "returned None as the loss"),
    "for each lane": (lambda h, c: h.sum(1), r"returned float32\[3\] as the loss"),
    "without lanes": (lambda h, c: h[:0, 0], r"returned float32\[0\] as the loss"),
    "an integer": (lambda h, c: (h > 0).sum(), r"returned int64\[\] as the loss"),
    "a truth value": (lambda h, c: (h > 0).any(), r"returned bool\[\] as the loss"),
    "complex": (lambda h, c: h.sum() * 1j, r"returned complex64\[\] as the loss"),
    "a tuple": (lambda h, c: (h.sum(), c.sum()), r"returned \(float32\[\], float32\[\]\) as the loss"),
}
PAIRS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "the loss alone": (lambda h, c: h.sum(), r"must return \(loss, next state\), it returned float32\[\]"),
    "nothing": (lambda h, c: None, r"must return \(loss, next state\), it returned None"),
    "three things": (lambda h, c: (h.sum(), h, c), r"must return \(loss, next state\), it returned \(float32"),
    "a dictionary": (lambda h, c: {"loss": h.sum()}, r"must return \(loss, next state\), it returned dict"),
    "swapped": (
        lambda h, c: (Hidden(h, c), h.sum()),
        r"returned Hidden\(float32\[3, 6\], float32\[3, 6\]\) as the loss",
    ),
}


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("mistake", STATES)
@pytest.mark.parametrize("name", GRADIENTS)
def test_another_state_is_refused_and_shown(name: str, mistake: str, horizon: int) -> None:
    returned, message = STATES[mistake]
    step = stepping(lambda h, c: (h.sum(), returned(h, c)))
    wanted = r"step must return the next state like the one that it was given, Hidden\(float32\[3, 6\], float32"
    with pytest.raises(TypeError, match=f"{wanted}.*{message}"):
        GRADIENTS[name](step, segments(horizon), entering())


@pytest.mark.parametrize("mistake", STATES)
@pytest.mark.parametrize("name", REPLAYS)
def test_another_state_of_advance_is_refused_and_shown(name: str, mistake: str) -> None:
    returned, message = STATES[mistake]
    step = stepping(lambda h, c: (h.sum(), Hidden(h, c)))
    with pytest.raises(TypeError, match=f"^advance must return the next state like.*{message}"):
        GRADIENTS[name](step, segments(), entering(), advance=stepping(returned))


@pytest.mark.parametrize("name", REPLAYS)
def test_an_advance_that_returns_the_loss_too_is_told_so(name: str) -> None:
    step = stepping(lambda h, c: (h.sum(), Hidden(h, c)))
    with pytest.raises(TypeError, match=r"^advance must return the next state.*returned \(float32\[\], Hidden\("):
        GRADIENTS[name](step, segments(), entering(), advance=step)


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("mistake", LOSSES)
@pytest.mark.parametrize("name", GRADIENTS)
def test_another_loss_is_refused_and_shown(name: str, mistake: str, horizon: int) -> None:
    returned, message = LOSSES[mistake]
    with pytest.raises(TypeError, match=f"the loss must be a tensor of one real floating-point number.*{message}"):
        GRADIENTS[name](stepping(lambda h, c: (returned(h, c), Hidden(h, c))), segments(horizon), entering())


@pytest.mark.parametrize("at", [0, 2, 3])
@pytest.mark.parametrize("mistake", PAIRS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_anything_but_a_loss_and_a_state_is_refused_in_any_call(name: str, mistake: str, at: int) -> None:
    returned, message = PAIRS[mistake]
    with pytest.raises(TypeError, match=message):
        GRADIENTS[name](stepping(returned, at=at), segments(4), entering())


@pytest.mark.parametrize("name", REPLAYS)
def test_an_advance_whose_state_is_not_that_of_the_step_is_refused(name: str) -> None:
    def advance(x: Tensor, state: Hidden) -> Hidden:
        return Hidden(state.h[: 2 if len(calls) == 2 else 3] + 1, state.c)

    calls: list[Tensor] = []

    def step(x: Tensor, state: Hidden) -> tuple[Tensor, Hidden]:
        return state.h.sum(), Hidden(state.h + 1, state.c)

    def counted(x: Tensor, state: Hidden) -> Hidden:
        calls.append(x)
        return advance(x, state)

    told = (
        r"step must return the state that advance returned.*state\.h = float32\[2, 6\] on cpu; it returned float32\[3"
    )
    with pytest.raises(TypeError, match=told):
        GRADIENTS[name](step, segments(3), entering(), advance=counted)


def encoding(
    encoded: Callable[[Tensor, Tensor], Any], next_state: Callable[[Tensor, Tensor], Any]
) -> Callable[..., Any]:
    return stepping(lambda h, c: (encoded(h, c), next_state(h, c)))


@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize(
    ("encode", "decoded", "message"),
    [
        (stepping(lambda h, c: h), torch.zeros(()), r"encode must return \(encoded, next state\), it returned float32"),
        (encoding(lambda h, c: h, Hidden), torch.zeros(()), r"encode must encode .* it returned float32\[3, 6\]"),
        (encoding(lambda h, c: (h, 1), Hidden), torch.zeros(()), r"encode must encode .* returned \(float32.*, int\)"),
        (encoding(Hidden, lambda h, c: (h,)), torch.zeros(()), "encode must return the next state like the one"),
        (encoding(Hidden, Hidden), torch.zeros(2), r"decode must return .* returned float32\[2\] as the loss"),
        (encoding(Hidden, Hidden), 0.0, "decode must return .* returned float as the loss"),
    ],
)
def test_results_of_encode_and_decode_are_checked_in_groups(
    encode: Any, decoded: Any, message: str, horizon: int
) -> None:
    with pytest.raises(TypeError, match=message):
        replay_in_groups(encode, lambda *_: decoded, segments(horizon), entering(), group=2)


@pytest.mark.parametrize(
    ("method", "returned", "message"),
    [
        ("step", lambda o, s: s, r"the output must be a SegmentOutput .* returned float64\[4, 3, 8\] as the output"),
        ("step", lambda o, s: o, r"step must return \(output, next state\), it returned SegmentOutput\(float64"),
        (
            "step",
            lambda o, s: (s, o),
            "the output must be a SegmentOutput whose token_losses and correct have the shape",
        ),
        ("step", lambda o, s: (o.token_losses.sum(), s), r"shape \[4, 5\]; it returned float64\[\] as the output"),
        (
            "step",
            lambda o, s: (o._replace(token_losses=o.token_losses.sum()), s),
            r"returned SegmentOutput\(float64\[\], bool\[4, 5\]",
        ),
        ("step", lambda o, s: (o, tuple(s)), "Memformer.step must return the next state like the one"),
        ("step", lambda o, s: (o, s[0]), "Memformer.step must return the next state like the one"),
        ("advance_step", lambda o, s: (o, s), "Memformer.advance_step must return the next state like the one"),
        ("advance_step", lambda o, s: None, "Memformer.advance_step must return the next state like the one"),
    ],
)
@pytest.mark.parametrize("name", GRADIENTS)
def test_a_model_is_told_what_its_own_method_should_return(
    name: str, method: str, returned: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = memformer()
    step = model.step
    monkeypatch.setattr(model, method, lambda segment, state: returned(*step(segment, state)))
    if method == "advance_step" and name not in REPLAYS:
        return  # they do without it
    with pytest.raises(TypeError, match=message):
        add_gradient(
            model, lambda output: output.token_losses.sum(), irregular(2), model.initial_state(4), gradient=name
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda s: iter(s), "got list_iterator"),
        (lambda s: (x for x in s), r"got generator: pass list\(segments\)"),
        (lambda s: set(s), "got set"),
        (lambda s: dict(enumerate(s)), "got dict"),
        (lambda s: s[0].sum(), "got Tensor"),
        (lambda s: None, "got NoneType"),
        (lambda s: 3, "got int"),
        (lambda s: torch.utils.data.DataLoader(s), "got DataLoader"),
    ],
)
@pytest.mark.parametrize("name", GRADIENTS)
def test_segments_that_cannot_be_indexed_are_refused(name: str, given: Any, message: str) -> None:
    step = stepping(lambda h, c: (h.sum(), Hidden(h, c)))
    with pytest.raises(TypeError, match=f"segments must be a list, or have a length and be indexed.*{message}"):
        GRADIENTS[name](step, given(segments()), entering())


class Pair(tuple):
    """Takes its fields one by one, as neither a plain nor a named tuple does."""

    def __new__(cls, h: Tensor, c: Tensor) -> "Pair":
        return super().__new__(cls, (h, c))


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_tuple_that_cannot_be_made_of_other_fields_is_refused(name: str) -> None:
    step = stepping(lambda h, c: (h.sum(), Pair(h, c)))
    with pytest.raises(TypeError, match=r"^state is a Pair, but a state is made of tensors.*register the class"):
        GRADIENTS[name](step, segments(), Pair(*entering()))


class Made:
    """Segments that are made on access, by index."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, t: int) -> Tensor:
        return torch.randn(3, 4, generator=torch.Generator().manual_seed(t)).double()


@pytest.mark.parametrize("kind", [tuple, torch.stack, Made, lambda s: torch.stack(s).numpy()])
@pytest.mark.parametrize("name", EXACT)
def test_anything_with_a_length_and_indices_can_be_the_segments(
    name: str, kind: Callable[..., Sequence[Tensor]]
) -> None:
    def build(of: Callable[..., Any]) -> Case:
        module, made = nn.Linear(4, 4).double(), [Made()[t] for t in range(5)]

        def step(x: Any, state: State) -> tuple[Tensor, State]:
            h = torch.tanh(module(torch.as_tensor(x)) + state[0])
            return h.square().sum(), (h,)

        return Case(module, step, of() if of is Made else of(made), (torch.zeros(3, 4).double(),))

    assert_same(outcome(GRADIENTS[name], lambda: build(kind)), outcome(plain_loop, lambda: build(list)))


@pytest.mark.parametrize("name", GRADIENTS)
def test_switched_off_gradients_are_refused(name: str) -> None:
    step = stepping(lambda h, c: (h.sum(), Hidden(h, c)))
    for off in (torch.no_grad(), torch.inference_mode()):
        with off, pytest.raises(UsageError, match=r"gradients are switched off here.*torch.no_grad\(\)"):
            GRADIENTS[name](step, segments(), entering())


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_losses_of_one_number_constants_and_a_pair_in_a_list_are_fine(name: str, shape: tuple[int, ...]) -> None:
    def build() -> Case:
        module = nn.Linear(4, 4).double()

        def step(numbered: tuple[int, Tensor], state: State) -> Any:
            t, x = numbered
            h = torch.tanh(module(x) + state[0])
            return [h.sum().view(shape) if t == 2 else torch.ones(shape), (h,)]

        return Case(module, step, list(enumerate(torch.randn(4, 3, 4).double())), (torch.zeros(3, 4).double(),))

    got, expected = outcome(GRADIENTS[name], build), outcome(plain_loop, build)
    assert got.loss.shape == ()
    assert_same(got, expected._replace(loss=expected.loss.view(())))


@pytest.mark.parametrize("name", EXACT)
def test_losses_of_several_precisions_are_summed_in_the_highest(name: str) -> None:
    def step(t: int, state: State) -> tuple[Tensor, State]:
        return torch.tensor(1 + 2.0**-40, dtype=torch.float64 if t == 0 else torch.float32), state

    loss, _ = GRADIENTS[name](step, range(3), (torch.zeros(2),))
    assert (loss.dtype, float(loss)) == (torch.float64, 3 + 2.0**-40)


def test_a_plain_tuple_may_get_names() -> None:
    step = stepping(lambda h, c: (h.sum(), Hidden(h, c)))
    _, state = replay_backward(step, segments(), tuple(entering()))
    assert isinstance(state, Hidden)


def test_a_cache_may_grow() -> None:
    weight = nn.Parameter(torch.randn(4))

    def step(x: Tensor, state: State) -> tuple[Tensor, State]:
        cache = torch.cat((state[0], (x * weight)[:, None]), dim=1)
        return cache.square().sum(), (cache,)

    rollout = segments(5)
    replayed, state = replay_backward(step, rollout, (torch.zeros(3, 0, 4),))
    assert state[0].shape == (3, 5, 4)
    found, weight.grad = weight.grad, None
    assert found is not None
    expected, _ = plain_loop(step, rollout, (torch.zeros(3, 0, 4),))
    torch.testing.assert_close(found, weight.grad)
    torch.testing.assert_close(replayed.double(), expected)
