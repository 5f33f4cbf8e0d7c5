"""The contract that every model keeps: no leak, independent lanes, explicit states, gradients that replay."""

import io
import subprocess
import sys
from collections.abc import Callable
from itertools import product

import pytest
import torch
from models import (
    LANES,
    LENGTH,
    MODELS,
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

from memformer_pl.contract import Segment, SegmentModel, State, as_state, detach, select_lanes, state_bytes
from memformer_pl.gradients.replay import replay_backward

Build = Callable[..., SegmentModel]


@pytest.fixture(params=MODELS)
def build(request: pytest.FixtureRequest) -> Build:
    return MODELS[request.param]


@pytest.fixture
def model(build: Build) -> SegmentModel:
    return build()


def equal(a: State, b: State) -> bool:
    return type(a) is type(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def carried(model: SegmentModel) -> State:
    """A state in the middle of documents, another in each lane."""
    state = model.initial_state(LANES)
    for segment in irregular(3):
        _, state = model(segment, state)
    return state


def lanes_of(state: State, lanes: slice) -> State:
    return as_state(state, (field[lanes] for field in state))


def same_lanes(model: SegmentModel, a: State, b: State, lanes: slice) -> bool:
    """Whether some lanes of two states are equal, apart from rows that they do not see."""
    return all(
        equal(*(model.compact(lanes_of(state, slice(n, n + 1))) for state in (a, b))) for n in range(LANES)[lanes]
    )


@pytest.mark.parametrize("entering", ["initial", "carried with a graph", "carried without"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_replay_equals_a_plain_loop(build: Build, horizon: int, dropout: float, entering: str) -> None:
    def case() -> Case:
        model = build(dropout=dropout)
        state = model.initial_state(LANES) if entering == "initial" else carried(model)
        return train_on(model, irregular(horizon), detach(state) if entering == "carried without" else state)

    assert_same(outcome(replay_backward, case), outcome(plain_loop, case))


@pytest.mark.parametrize("t", range(3))
def test_a_token_changes_no_loss_before_it_and_every_loss_behind_it_in_its_segment(model: SegmentModel, t: int) -> None:
    segments = full(3)
    before = losses_of(model, segments)
    for n in range(LENGTH):
        tokens = segments[t].tokens.clone()
        tokens[:, n] = (tokens[:, n] + 1) % VOCAB
        changed = losses_of(model, [*segments[:t], segments[t]._replace(tokens=tokens), *segments[t + 1 :]])
        assert all(torch.equal(a, b) for a, b in zip(changed[:t], before[:t], strict=True))
        assert (changed[t] == before[t]).tolist() == [[position < n for position in range(LENGTH)]] * 2


def test_the_probabilities_of_all_tokens_at_a_place_sum_to_one(model: SegmentModel) -> None:
    # they would not if a prediction saw its own answer; each lane has another token there
    segments = [segment._replace(tokens=segment.tokens[:1].expand(VOCAB, -1)) for segment in full(2, lanes=VOCAB)]
    for t, n in product(range(2), range(LENGTH)):
        tokens = segments[t].tokens.clone()
        tokens[:, n] = torch.arange(VOCAB)
        losses = losses_of(model, [*segments[:t], segments[t]._replace(tokens=tokens)])[t]
        torch.testing.assert_close((-losses[:, n]).exp().sum(), torch.ones(()).double(), rtol=1e-12, atol=0)


def test_lanes_do_not_see_each_other(model: SegmentModel) -> None:
    segments = irregular(5)
    others = [s._replace(tokens=torch.cat((s.tokens[:1], (s.tokens[1:] + 1) % VOCAB))) for s in segments]
    for a, b in zip(losses_of(model, segments), losses_of(model, others), strict=True):
        assert torch.equal(a[0], b[0])
        assert not torch.equal(a[1:], b[1:])


def test_a_lane_that_starts_a_document_equals_a_fresh_one(model: SegmentModel) -> None:
    segment = make_segment([5, 3, 5, 4], document_start=[1, 0, 1, 0])
    (output, state), (fresh, fresh_state) = model(segment, carried(model)), model(segment, model.initial_state(LANES))
    assert torch.equal(output.token_losses[::2], fresh.token_losses[::2])
    assert (output.token_losses[1::2, 0] == fresh.token_losses[1::2, 0]).all() == (not state)
    assert same_lanes(model, state, fresh_state, slice(0, None, 2))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_lane_without_tokens_keeps_its_state_bit_for_bit(build: Build, dropout: float) -> None:
    model = build(dropout=dropout)
    state = carried(model)
    _, next_state = model(make_segment([5, 0, 2, 0]), state)
    assert same_lanes(model, next_state, state, slice(1, None, 2))
    assert same_lanes(model, next_state, state, slice(0, None, 2)) == (not state)


def test_a_lane_that_starts_a_document_without_tokens_is_reset(model: SegmentModel) -> None:
    _, next_state = model(make_segment([5, 0, 2, 0], document_start=[0, 1, 0, 1]), carried(model))
    assert same_lanes(model, next_state, model.initial_state(LANES), slice(1, None, 2))


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_ragged_lane_is_read_as_a_shorter_segment_alone(model: SegmentModel, length: int) -> None:
    ragged, behind, state = make_segment([5, length, 5, 5], seed=1), make_segment([5, 5, 5, 5], seed=2), carried(model)
    alone = Segment(ragged.tokens[1:2, :length], ragged.token_mask[1:2, :length], ragged.document_start[1:2])
    together = losses_of(model, [ragged, behind], state)
    lane = losses_of(model, [alone, Segment(*(field[1:2] for field in behind[:3]))], lanes_of(state, slice(1, 2)))
    torch.testing.assert_close(together[0][1, :length], lane[0][0], rtol=1e-10, atol=0)
    torch.testing.assert_close(together[1][1], lane[1][0], rtol=1e-10, atol=0)


def test_numbers_where_no_token_exists_do_not_matter(model: SegmentModel) -> None:
    segments = irregular(5)
    others = [segment._replace(tokens=segment.tokens.where(segment.token_mask, 0)) for segment in segments]
    assert all(torch.equal(a, b) for a, b in zip(losses_of(model, segments), losses_of(model, others), strict=True))


def test_absent_tokens_cost_nothing_and_are_not_correct(model: SegmentModel) -> None:
    state = model.initial_state(LANES)
    for segment in irregular(5):
        output, state = model(segment, state)
        assert torch.equal(output.token_losses > 0, segment.token_mask)
        assert not (output.correct & ~segment.token_mask).any()


def test_tokens_outside_the_loss_mask_cost_nothing_are_not_correct_and_are_read_all_the_same(
    model: SegmentModel,
) -> None:
    state = masked_state = model.initial_state(LANES)
    for t, segment in enumerate(irregular(5)):
        loss_mask = torch.rand(segment.tokens.shape, generator=torch.Generator().manual_seed(t)) < 0.5
        output, state = model(segment, state)
        masked, masked_state = model(segment._replace(loss_mask=loss_mask), masked_state)
        assert torch.equal(masked.token_losses, output.token_losses.where(loss_mask, 0.0))
        assert torch.equal(masked.correct, output.correct & loss_mask)
        assert equal(masked_state, state)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_advance_is_forward_without_the_output_bit_for_bit(build: Build, dropout: float, training: bool) -> None:
    model = build(dropout=dropout).train(training)
    states, streams = [], []
    for step in (lambda *args: model(*args)[1], model.advance):
        torch.manual_seed(0)
        state = model.initial_state(LANES)
        for segment in irregular(5):
            state = step(segment, state)
        states.append(state)
        streams.append(torch.get_rng_state())
    assert equal(*states)
    assert torch.equal(*streams)


def test_dropout_is_drawn_in_training_alone(build: Build) -> None:
    model, segments = build(dropout=0.2), irregular(2)
    assert not torch.equal(losses_of(model, segments)[0], losses_of(model, segments)[0])
    model.eval()
    before = torch.get_rng_state()
    assert torch.equal(losses_of(model, segments)[0], losses_of(build(), segments)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_edits_no_argument_and_nothing_of_the_model(model: SegmentModel) -> None:
    segment, state = make_segment([5, 0, 2, 0], document_start=[0, 1, 1, 0]), detach(carried(model))
    tensors = [*segment[:3], *state, *model.state_dict().values()]
    before, attributes = [tensor.clone() for tensor in tensors], dict(vars(model))
    first = model(segment, state)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert vars(model) == attributes
    assert equal(model(segment, state)[1], first[1])


def test_a_state_keeps_its_type_and_its_shapes_with_the_lanes_first(model: SegmentModel) -> None:
    initial, later = model.initial_state(LANES), carried(model)
    assert type(initial) is type(later)
    assert all(len(field) == LANES for field in initial)
    assert [field.dtype for field in initial] == [field.dtype for field in later]
    for name, a, b in zip(getattr(initial, "_fields", range(len(initial))), initial, later, strict=True):
        sizes = zip(a.shape, b.shape, strict=True)
        assert all(x == y for axis, (x, y) in enumerate(sizes) if axis != model.growing.get(name))
    if not model.growing:
        assert state_bytes(model.initial_state(1)) == state_bytes(later)


def test_lanes_can_be_chosen_between_two_states(model: SegmentModel) -> None:
    first, second = model.initial_state(LANES), carried(model)
    chosen = select_lanes(torch.tensor([True, False, True, False]), first, second)
    assert same_lanes(model, chosen, first, slice(0, None, 2))
    assert same_lanes(model, chosen, second, slice(1, None, 2))


def test_a_model_reads_on_from_a_state_whose_memory_was_reset(model: SegmentModel) -> None:
    reset = model.reset_memory(carried(model))
    assert [(a.shape, a.dtype) for a in reset] == [(b.shape, b.dtype) for b in model.initial_state(LANES)]
    assert equal(model.reset_memory(reset), reset)
    assert equal(model.with_memory(reset, carried(model)), carried(model))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_gradient_from_three_segments(build: Build, precision: torch.dtype) -> None:
    model = build(dropout=0.1).float()
    case = train_on(model, full(3), model.initial_state(2))
    with torch.autocast("cpu", precision, enabled=precision is not torch.float32):
        replay_backward(case.step, case.segments, case.state, advance=case.advance)
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.numel()}
    assert [name for name, grad in trained.items() if grad is None or not grad.any() or not grad.isfinite().all()] == []


def test_bfloat16_throughout_is_read_and_learned_from(build: Build) -> None:
    model = build().bfloat16()
    initial = model.initial_state(LANES)
    loss, state = replay_backward(*train_on(model, irregular(5), initial)[1:4], advance=model.advance)
    assert [field.dtype for field in state] == [field.dtype for field in initial]
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_a_state_dict_brings_a_model_back(build: Build) -> None:
    model, other, file = build(), build(), io.BytesIO()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    segments = full(3)
    assert not torch.equal(losses_of(model, segments)[2], losses_of(other, segments)[2])
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert all(torch.equal(a, b) for a, b in zip(losses_of(model, segments), losses_of(other, segments), strict=True))


def test_its_config_builds_an_equal_model(build: Build) -> None:
    model = build(dropout=0.2, segment_length=7)
    config = model.config()
    assert config.pop("class") == f"memformer_pl.models.{type(model).__name__}"
    other = type(model)(**config).double()
    assert other.config() == model.config()
    other.load_state_dict(model.state_dict())
    segments = full(3)
    pair = losses_of(model.eval(), segments), losses_of(other.eval(), segments)
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


def test_a_segment_that_is_too_long_is_refused(build: Build) -> None:
    model = build(segment_length=4)
    for step in (model, model.advance):
        with pytest.raises(ValueError, match="a segment holds 5 tokens, more than segment_length=4"):
            step(make_segment([5]), model.initial_state(1))


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 0), ("segment_length", 0), ("vocab_size", -3)])
def test_sizes_below_one_are_refused(build: Build, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        build(**{name: value})


def test_the_contract_knows_none_of_its_users() -> None:
    package = SegmentModel.__module__.partition(".")[0]
    code = (
        f"import sys, {SegmentModel.__module__}; print(*(name for name in sys.modules if name.startswith('{package}')))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name.split(".")[1] for name in loaded if "." in name} <= {"contract", "errors"}
