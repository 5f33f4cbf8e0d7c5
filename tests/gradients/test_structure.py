"""A state may have any structure; a step that does not keep it, or edits what it was given, is told which field."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from models import Case, assert_same, outcome, plain_loop
from torch import Tensor, nn

from memformer_pl.gradients.replay import replay_backward, sparse_replay_backward
from memformer_pl.gradients.rollout import GRADIENTS
from memformer_pl.gradients.structure import flatten

EXACT = ["replay", "sparse_replay", "bptt", "checkpointed"]
REPLAYS = ["replay", "sparse_replay"]


class Named(NamedTuple):
    h: Any
    c: Any


@dataclass
class Plain:
    h: Any
    c: Any = None


@dataclass(frozen=True)
class Frozen:
    h: Any
    c: Any


class Registered:
    def __init__(self, h: Any, c: Any) -> None:
        self.h, self.c = h, c


torch.utils._pytree.register_pytree_node(
    Registered, lambda state: ([state.h, state.c], None), lambda parts, _: Registered(*parts)
)

# for each structure: how to build it from two values, and how to read them
STRUCTURES: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], tuple[Any, Any]]]] = {
    "tuple": (lambda h, c: (h, c), tuple),
    "named tuple": (Named, tuple),
    "list": (lambda h, c: [h, c], tuple),
    "dictionary": (lambda h, c: {"h": h, "c": c}, lambda s: (s["h"], s["c"])),
    "ordered dictionary": (lambda h, c: OrderedDict(h=h, c=c), lambda s: (s["h"], s["c"])),
    "dictionary with a default": (lambda h, c: defaultdict(list, {1: h, "1": c}), lambda s: (s[1], s["1"])),
    "dataclass": (Plain, lambda s: (s.h, s.c)),
    "frozen dataclass": (Frozen, lambda s: (s.h, s.c)),
    "registered": (Registered, lambda s: (s.h, s.c)),
    "nested": (
        lambda h, c: Plain({"a": [h, (None, 3, "x")]}, Named((), c)),
        lambda s: (s.h["a"][0], s.c.c),
    ),
    "a layer's state": (lambda h, c: [(h, c)], lambda s: s[0]),
}


def lstm(structure: str, horizon: int, *, dropout: float = 0.2) -> Case:
    build, read = STRUCTURES[structure]
    module = nn.ModuleList([nn.LSTMCell(4, 6), nn.Dropout(dropout)]).double()

    def step(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, c = module[0](x, read(state))
        return (module[1](h) ** 2).sum(), build(module[1](h), c)

    zero = torch.zeros(3, 6, dtype=torch.float64)
    return Case(module, step, list(torch.randn(horizon, 3, 4).double()), build(zero, zero + 1))


@pytest.mark.parametrize("horizon", [1, 2, 5])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", EXACT)
def test_any_structure_gets_the_gradient_of_a_plain_loop(name: str, structure: str, horizon: int) -> None:
    """The states are compared as tuples: a plain loop needs no structure."""
    read = STRUCTURES[structure][1]

    def with_tuple(gradient: Any, step: Any, segments: Any, state: Any, **options: Any) -> Any:
        loss, last = gradient(step, segments, state, **options)
        assert type(last) is type(state)
        return loss, read(last)

    expected = outcome(plain_loop, partial(lstm, "tuple", horizon))
    assert_same(outcome(partial(with_tuple, GRADIENTS[name]), partial(lstm, structure, horizon)), expected)


@pytest.mark.parametrize("name", EXACT)
def test_none_may_become_anything_and_numbers_are_carried(name: str) -> None:
    cell = nn.LSTMCell(4, 6).double()
    seen = []

    def step(x: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        seen.append(state["count"])
        h, c = cell(x, state["lstm"])
        return (h * state["count"]).sum(), {"count": state["count"] + 1, "lstm": (h, c)}

    segments = list(torch.randn(4, 3, 4).double())
    loss, state = GRADIENTS[name](step, segments, {"count": 0, "lstm": None})
    assert state["count"] == 4
    assert set(seen) == {0, 1, 2, 3}
    found = [parameter.grad.clone() for parameter in cell.parameters()]
    cell.zero_grad()
    carried, total = None, torch.zeros((), dtype=torch.float64)
    for count, x in enumerate(segments):
        carried = cell(x, carried)
        total = total + (carried[0] * count).sum()
    total.backward()
    torch.testing.assert_close(loss, total.detach())
    for ours, parameter in zip(found, cell.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", GRADIENTS)
def test_containers_belong_to_the_step_and_the_callers_stay_as_they_were(name: str) -> None:
    """As the cache of transformers, which a decoder appends to in place."""
    linear = nn.Linear(4, 4)

    def step(x: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        state["rows"].append(linear(x))
        state["h"] = torch.stack(state["rows"]).sum(0)
        state["rows"] = state["rows"][-1:]
        return state["h"].sum(), state

    entering = {"rows": [torch.zeros(2, 4)], "h": torch.zeros(2, 4)}
    GRADIENTS[name](step, list(torch.randn(3, 2, 4)), entering)
    assert len(entering["rows"]) == 1
    assert not entering["h"].any()


def returning(next_state: Callable[[dict[str, Tensor]], Any]) -> Callable[..., Any]:
    def step(x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Any]:
        return (x * state["h"]).sum(), next_state({"h": state["h"] + x, "n": state["n"] + 1})

    return step


OTHERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a number for a tensor": (lambda s: s | {"h": 1.0}, r"state\['h'\] was of type Tensor and is of type float"),
    "None for a tensor": (lambda s: s | {"h": None}, r"state\['h'\] was of type Tensor and is of type NoneType"),
    "a tuple for a tensor": (lambda s: s | {"h": (s["h"],)}, r"state\['h'\] was of type Tensor and is of type tuple"),
    "a key more": (lambda s: s | {"c": s["h"]}, "state had 2 parts and has 3"),
    "another key": (lambda s: {"h": s["h"], "m": s["n"]}, "or their names differ"),
    "a list": (lambda s: [s["h"], s["n"]], "state was a dict and is a list"),
    "another dtype": (
        lambda s: s | {"h": s["h"].bfloat16()},
        r"state\['h'\] was float32 and is bfloat16: return it with \.to\(torch\.float32\)",
    ),
    "whole numbers": (lambda s: s | {"h": s["h"].long()}, r"state\['h'\] was float32 and is int64"),
    "another device": (
        lambda s: s | {"n": s["n"].to("meta")},
        r"state\['n'\] was on cpu and is on meta: return it with \.to\('cpu'\)",
    ),
    "an object": (lambda s: s | {"h": {3}}, r"the next state of step\['h'\] is a set, but a state is made of tensors"),
}


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("mistake", OTHERS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_another_structure_dtype_or_device_is_refused_with_its_field(name: str, mistake: str, horizon: int) -> None:
    next_state, message = OTHERS[mistake]
    entering = {"h": torch.zeros(2, 3), "n": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(TypeError, match=message):
        GRADIENTS[name](returning(next_state), list(torch.randn(horizon, 2, 3)), entering)


def add_in_place(state: dict[str, Any]) -> None:
    state["h"].add_(1)


def count_in_place(state: dict[str, Any]) -> None:
    state["more"][0][0] += 1


def write_into_a_view(state: dict[str, Any]) -> None:
    state["h"].t()[0] = 1


EDITS = {"h": add_in_place, r"more'\]\[0": count_in_place, "h' ": write_into_a_view}


@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("field", EDITS)
@pytest.mark.parametrize("name", [*REPLAYS, "bptt", "truncated"])
def test_a_step_that_edits_its_state_in_place_is_told_which_field(name: str, field: str, horizon: int) -> None:
    linear = nn.Linear(3, 3)

    def step(x: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        EDITS[field](state)
        h = linear(x) + state["h"]
        return h.sum(), {"h": h, "more": [state["more"][0].clone()]}

    entering = {"h": torch.zeros(2, 3), "more": [torch.zeros(2, dtype=torch.int64)]}
    with pytest.raises(TypeError, match=rf"step edited state\['{field.strip(chr(39) + ' ')}'?\]? in place.*clone"):
        GRADIENTS[name](step, list(torch.randn(horizon, 2, 3)), entering)


@pytest.mark.parametrize("name", REPLAYS)
def test_an_advance_that_edits_its_state_in_place_is_told_so(name: str) -> None:
    def step(x: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        return (x * state[0]).sum(), (state[0] + x,)

    def advance(x: Tensor, state: tuple[Tensor]) -> tuple[Tensor]:
        return (state[0].add_(x),)

    with pytest.raises(TypeError, match=r"advance edited state\[0\] in place"):
        GRADIENTS[name](step, list(torch.randn(3, 2, 3)), (torch.zeros(2, 3),), advance=advance)


def test_an_edit_of_a_state_with_a_graph_is_refused_by_torch_in_the_only_segment() -> None:
    def step(x: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        return (x * state[0].add_(1)).sum(), (state[0],)

    with pytest.raises(RuntimeError, match="leaf Variable that requires grad is being used in an in-place operation"):
        replay_backward(step, [torch.randn(2, 3)], (torch.zeros(2, 3, requires_grad=True) * 1,))


@pytest.mark.parametrize("state", [{1, 2}, nn.Linear(1, 1), object()])
@pytest.mark.parametrize("gradient", [replay_backward, sparse_replay_backward])
def test_what_is_no_state_is_refused(gradient: Any, state: Any) -> None:
    with pytest.raises(TypeError, match=f"^state is a {type(state).__name__}, but a state is made of tensors"):
        gradient(returning(lambda s: s), [torch.randn(2, 3)], state)


def test_leaves_are_named_as_in_python() -> None:
    state = Plain({"a": [torch.zeros(1), (None, 3)]}, Named(1.0, True))
    flat = flatten(state, what="state")
    labels = ["state.h['a'][0]", "state.h['a'][1][0]", "state.h['a'][1][1]", "state.c.h", "state.c.c"]
    assert [flat.label(path) for path in flat.leaves] == labels
    rebuilt = flat.build()
    assert rebuilt == state
    assert rebuilt.h is not state.h


class Counting(nn.Module):
    """Counts its calls in an attribute, and writes what it saw into another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls, self.seen = nn.Linear(3, 3), 0, torch.zeros(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.add_(x.detach())
        return self.linear(x)


@pytest.mark.parametrize("name", ["replay", "sparse_replay", "checkpointed"])
def test_a_module_that_changes_in_its_forward_pass_is_warned_of_once(name: str) -> None:
    module = Counting()

    def step(x: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        h = module(x) + state[0]
        return h.sum(), (h,)

    rollout = list(torch.randn(3, 2, 3)), (torch.zeros(2, 3),)
    told = r"the step changes Counting\.calls, Counting\.seen, and it runs twice for each segment: carry such values in"
    with pytest.warns(UserWarning, match=told):
        GRADIENTS[name](step, *rollout)
    GRADIENTS[name](step, *rollout)


@pytest.mark.parametrize("name", ["bptt", "truncated"])
def test_what_runs_once_is_not_warned_of(name: str) -> None:
    module = Counting()
    GRADIENTS[name](lambda x, s: (module(x).sum(), s), list(torch.randn(3, 2, 3)), ())
    assert module.calls == 3
