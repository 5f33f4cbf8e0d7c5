"""A segment or a state that does not keep the contract is refused before it gives other numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import LENGTH, MODELS, VOCAB, make_segment, memformer, transformer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memformer_pl.contract import Segment, SegmentModel, as_state
from memformer_pl.errors import UsageError
from memformer_pl.inference import Session

pytestmark = pytest.mark.usefixtures("no_type_checks")


def ways(model: SegmentModel) -> list[Callable[..., Any]]:
    """Every way into a model."""
    apart = type(model).encode_step is not SegmentModel.encode_step
    return [model, model.advance, *([model.advance_and_encode] if apart else [])]


def padded_left() -> Tensor:
    return torch.tensor([[True] * LENGTH, [False, False, True, True, True]])


def with_token(token: int, *, exists: bool = True) -> Segment:
    segment = make_segment([LENGTH, LENGTH if exists else LENGTH - 1])
    segment.tokens[1, -1] = token
    return segment


def replaced(**fields: Any) -> Segment:
    return make_segment([5, 3])._replace(**fields)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (
            lambda: replaced(token_mask=padded_left()),
            "segment.token_mask must be True at the left of each lane.*pad at the right",
        ),
        (
            lambda: replaced(token_mask=torch.tensor([[1, 0, 1, 0, 1]] * 2).bool()),
            "segment.token_mask must be True at the left",
        ),
        (lambda: with_token(-100), f"segment.tokens must be at least 0 and below vocab_size={VOCAB}, got -100"),
        (lambda: with_token(-1), f"below vocab_size={VOCAB}, got -1"),
        (lambda: with_token(VOCAB), f"below vocab_size={VOCAB}, got {VOCAB}"),
        (lambda: with_token(-100, exists=False), "got -100: put 0 where token_mask is False"),
        (lambda: replaced(tokens=torch.zeros(2)), r"segment.tokens must have the shape \[lanes, tokens\], got \[2\]"),
        (
            lambda: replaced(token_mask=torch.ones(2, 4).bool()),
            r"segment.token_mask must have the shape \[2, 5\], got",
        ),
        (
            lambda: replaced(document_start=torch.zeros(3).bool()),
            r"segment.document_start must have the shape \[2\], got \[3\]",
        ),
        (
            lambda: replaced(loss_mask=torch.ones(5).bool()),
            r"segment.loss_mask must have the shape \[2, 5\], got \[5\]",
        ),
        (lambda: replaced(token_mask=torch.ones(2, 5, device="meta").bool()), "on cpu and segment.token_mask on meta"),
        (lambda: replaced(seeds=torch.zeros(1, device="meta").long()), "on cpu and segment.seeds on meta: move them"),
        (lambda: replaced(seeds=torch.zeros(3).long()), r"make up its 2 lanes, in equal parts.*got the shape \[3\]"),
        (lambda: replaced(seeds=torch.zeros(0).long()), r"make up its 2 lanes, in equal parts.*got the shape \[0\]"),
        (lambda: replaced(seeds=torch.tensor(1)), r"such as a tensor of one seed; got the shape \[\]"),
        (lambda: Segment(*(f.to("meta") for f in replaced()[:3])), "the segment is on meta and the .* on cpu: move"),
    ],
)
def test_a_segment_of_values_shapes_or_devices_that_do_not_fit_is_refused(
    kind: str, segment: Callable[[], Segment], message: str
) -> None:
    model = MODELS[kind]()
    given = segment()
    if given.tokens.dim() == 1:
        given = given._replace(tokens=given.tokens.long())
    for way in ways(model):
        with pytest.raises(UsageError, match=message):
            way(given, model.initial_state(2))


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (
            replaced(tokens=torch.zeros(2, 5).int()),
            r"segment.tokens must be a tensor of torch.int64, got int32\[2, 5\]",
        ),
        (replaced(tokens=torch.zeros(2, 5)), r"segment.tokens must be a tensor of torch.int64, got float32\[2, 5\]"),
        (replaced(tokens=[[1, 2]]), r"segment.tokens must be a tensor of torch.int64, got list\(list\(int, int\)\)"),
        (
            replaced(token_mask=torch.ones(2, 5)),
            r"segment.token_mask must be a tensor of torch.bool, got float32\[2, 5\]",
        ),
        (replaced(token_mask=torch.ones(2, 5).long()), "segment.token_mask must be a tensor of torch.bool, got int64"),
        (replaced(token_mask=None), "segment.token_mask must be a tensor of torch.bool, got None"),
        (
            replaced(document_start=torch.zeros(2).long()),
            "segment.document_start must be a tensor of torch.bool, got int64",
        ),
        (replaced(loss_mask=torch.ones(2, 5)), "segment.loss_mask must be a tensor of torch.bool, got float32"),
        (replaced(seeds=torch.zeros(1)), r"segment.seeds must be a tensor of torch.int64, got float32\[1\]"),
        (replaced(seeds=[1]), r"segment.seeds must be a tensor of torch.int64, got list\(int\)"),
        (replaced(continues=torch.tensor(True)), r"segment.continues must be True or False, got bool\[\]"),
        (replaced(continues=None), "segment.continues must be True or False, got None"),
        (torch.zeros(2, 5).long(), r"a model reads a Segment, got int64\[2, 5\]"),
        (tuple(replaced()), r"a model reads a Segment, got \(int64\[2, 5\], bool"),
        (None, "a model reads a Segment, got None"),
    ],
)
@pytest.mark.parametrize("build", [memformer, transformer])
def test_anything_but_a_segment_is_refused(build: Callable[[], SegmentModel], segment: Any, message: str) -> None:
    model = build()
    for way in ways(model):
        with pytest.raises(TypeError, match=message):
            way(segment, model.initial_state(2))


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (
            lambda m: m.initial_state(3),
            UsageError,
            r"has 2 lanes, and field memory of the state \[3, 3, 8\]",
        ),
        (
            lambda m: m.initial_state(1),
            UsageError,
            r"has 2 lanes, and field memory of the state \[1, 3, 8\]",
        ),
        (
            lambda m: memformer(slots=1).initial_state(2),
            UsageError,
            r"have the shape \[2, 3, 8\], got \[2, 1, 8\]",
        ),
        (
            lambda m: memformer(slots=4).initial_state(2),
            UsageError,
            r"have the shape \[2, 3, 8\], got \[2, 4, 8\]",
        ),
        (
            lambda m: as_state(m.initial_state(2), (f.to("meta") for f in m.initial_state(2))),
            UsageError,
            "state on meta",
        ),
        (lambda m: (), TypeError, r"the state of a Memformer must be like MemformerState\(float64.*, got \(\)"),
        (lambda m: None, TypeError, "the state of a Memformer must be like .*, got None"),
        (lambda m: m.initial_state(2)[0], TypeError, r"must be like MemformerState.*, got float64\[2, 3, 8\]"),
        (lambda m: list(m.initial_state(2)), TypeError, r"must be like MemformerState.*, got list\("),
        (lambda m: m.initial_state(2)[:1], TypeError, r"must be like MemformerState.*, got \(float64\[2, 3, 8\]\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state: Callable[[SegmentModel], Any], error: Any, message: str) -> None:
    model = memformer()
    for way in ways(model):
        with pytest.raises(error, match=message):
            way(make_segment([5, 3]), state(model))


def test_an_initial_state_of_another_type_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = memformer()
    monkeypatch.setattr(model, "initial_state", lambda lanes: torch.zeros(lanes, 3))
    with pytest.raises(TypeError, match=r"Memformer.initial_state must return a flat tuple.*float32\[2, 3\]"):
        model(make_segment([5, 3]), ())


@pytest.mark.parametrize("lengths", [[0, 0], [5, 0], [1, 4]])
def test_ragged_and_empty_lanes_are_fine(lengths: list[int]) -> None:
    model = memformer()
    model(make_segment(lengths), tuple(model.initial_state(2)))


def test_values_are_not_looked_at_where_there_are_none() -> None:
    model, real = memformer().eval(), make_segment([5, 3])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        segment = Segment(*(mode.from_tensor(field) for field in real[:3]))
        output, _ = model(segment, model.initial_state(2))
    assert output.token_losses.shape == (2, LENGTH)


def test_a_compiled_model_is_one_graph_in_evaluation() -> None:
    model = transformer().eval()
    compiled = torch.compile(model.advance, backend="eager", fullgraph=True)
    assert compiled(make_segment([5, 3]), ()) == ()


@pytest.mark.parametrize(
    ("tokens", "token_mask", "message"),
    [
        (
            [[1, 2]],
            None,
            r"must be a tensor of whole numbers of the shape \[1, T\], got list.*torch.tensor\(tokens",
        ),
        ([1, 2], None, r"must be a tensor of whole numbers of the shape \[1, T\], got list\(int, int\)"),
        ("text", None, r"must be a tensor of whole numbers of the shape \[1, T\], got str"),
        (np.ones((1, 2), dtype=np.int64), None, r"tensor of whole numbers of the shape \[1, T\], got ndarray"),
        (torch.ones(1, 2).bool(), None, r"must be whole numbers of the shape \[1, T\], got \[1, 2\] of torch.bool"),
        (torch.ones(1, 2) * 1j, None, r"must be whole numbers of the shape \[1, T\], got \[1, 2\] of torch.complex64"),
        (torch.ones(1, 2), None, r"must be whole numbers of the shape \[1, T\], got \[1, 2\] of torch.float32"),
        (
            torch.ones(1, 2).long(),
            [[True, True]],
            "token_mask must be a tensor of torch.bool, got list",
        ),
        (torch.ones(1, 2).long(), torch.ones(1, 2).long(), "token_mask must be a tensor of torch.bool, got int64"),
    ],
)
def test_a_session_refuses_tokens_of_another_type_or_shape(tokens: Any, token_mask: Any, message: str) -> None:
    session = Session(memformer().eval())
    with pytest.raises(UsageError, match=message):
        session.feed(tokens, token_mask)
    assert session.tokens_read.tolist() == [0]


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.uint16, torch.int64])
def test_a_session_is_fed_whole_numbers_of_any_width(kind: torch.dtype) -> None:
    session = Session(memformer().eval())
    session.feed(torch.tensor([[1, 2, 3]], dtype=kind))
    assert session.tokens_read.tolist() == [3]
