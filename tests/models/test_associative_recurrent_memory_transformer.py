"""ARMT and its parallel RMT: a matrix by hand, the whole model by its equations, what it is without memory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from models import (
    LANES,
    LENGTH,
    VOCAB,
    associative_recurrent_memory,
    full,
    irregular,
    losses_of,
    make_segment,
    outcome,
    plain_loop,
    shown,
    train_on,
    transformer,
    untouched,
)
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.contract import Segment, detach, state_bytes
from memformer_pl.errors import UsageError
from memformer_pl.gradients.rollout import GRADIENTS
from memformer_pl.layers import Positions
from memformer_pl.layers.associative_matrix import Matrix, MatrixReader, MatrixWriter, dpfp, recall
from memformer_pl.models import AssociativeRecurrentMemoryTransformer
from memformer_pl.training.flops import count_flops

close = torch.testing.assert_close
SIZES, MEMORY, KEY = {"dim": 8, "layers": 2}, 3, 4
PARALLEL = partial(associative_recurrent_memory, carried="tokens")
BUILDS = {"matrix": associative_recurrent_memory, "tokens": PARALLEL}
Build = Callable[..., AssociativeRecurrentMemoryTransformer]


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest) -> Build:
    return BUILDS[request.param]


def nothing(*, width: int = 2) -> Matrix:
    return Matrix(torch.zeros(1, 6 * width, width).double(), torch.zeros(1, 6 * width).double())


def writer(*, width: int = 2, correction: bool = True) -> MatrixWriter:
    """A writer whose strength is a half, and whose values are ten times its keys."""
    layer = MatrixWriter(dim=width, key_width=width, correction=correction).double()
    with torch.no_grad():
        layer.to_key.weight.copy_(torch.eye(width))
        layer.to_strength.weight.zero_()
        layer.to_strength.bias.zero_()
    return layer


def written(layer: MatrixWriter, matrix: Matrix, *pairs: tuple[list[float], float]) -> Matrix:
    """The matrix after a segment whose memory tokens write numbers under keys, both in all channels of a value."""
    keys = torch.tensor([key for key, _ in pairs]).double()
    values = torch.tensor([[value] * keys.shape[1] for _, value in pairs]).double()
    layer.to_value.register_forward_hook(lambda linear, args, out: values[None])
    return layer(keys[None], matrix)


def read(matrix: Matrix, *queries: list[float]) -> Tensor:
    """What a matrix returns, in one channel."""
    return recall(dpfp(torch.tensor(queries).double()[None]), matrix)[0][0, :, 0]


def test_features_by_hand() -> None:
    found = dpfp(torch.tensor([1.0, 2.0]))
    close(found, torch.tensor([0.0, 2, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]))
    assert found.square().sum() == 8
    mixed = dpfp(torch.tensor([3.0, -5.0]))  # parts 3, 0, 0, 5
    close(mixed, torch.tensor([15.0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 15]))


def test_a_key_written_at_half_strength_returns_half_its_value() -> None:
    matrix = written(writer(), nothing(), ([1, 2], 3.0))
    close(read(matrix, [1, 2]), torch.tensor([1.5]).double(), rtol=1e-5, atol=0)
    close(matrix.keys, dpfp(torch.tensor([[1.0, 2.0]])).double())


@pytest.mark.parametrize(("correction", "returned"), [(True, 4.25), (False, 2.125)])
def test_a_key_written_again_moves_half_way_to_its_value_unless_its_keys_are_counted_twice(
    correction: bool, returned: float
) -> None:
    """1.5 + (7 - 1.5) / 2 = 4.25; without the correction the sum of the keys has doubled (the paper's figure 4a)."""
    layer = writer(correction=correction)
    first = written(layer, nothing(), ([1, 2], 3.0))
    again = written(layer, first, ([1, 2], 7.0))
    close(read(again, [1, 2]), torch.tensor([returned]).double(), rtol=1e-5, atol=0)
    close(again.keys, first.keys if correction else 2 * first.keys, rtol=1e-5, atol=1e-5)


def test_half_of_a_key_that_is_held_is_counted_by_hand() -> None:
    """Keys (1, 2, 0) and (1, 2, 1) have the products {ab: 2} and {ab: 2, bc: 2, ac: 1}: of a square of 9, 4 are held,
    so gamma is 5 / 9."""
    layer = writer(width=3)
    first = written(layer, nothing(width=3), ([1, 2, 0], 3.0))
    second = written(layer, first, ([1, 2, 1], 3.0))
    added = dpfp(torch.tensor([[1.0, 2.0, 1.0]]).double()) * 5 / 9
    close(second.keys, first.keys + added, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_key_that_is_written_and_not_counted_is_returned_a_hundred_thousandfold() -> None:
    """A fault of the equations. The key (1, 1, 1/10) has the products {ab: 1, bc: 1/10, ac: 1/10}; ab is held ten times
    over, so gamma is 0 and the others are not counted. A query that meets bc alone is divided by 1e-5."""
    layer = writer(width=3)
    first = written(layer, nothing(width=3), ([10, 1, 0], 3.0))
    second = written(layer, first, ([1, 1, 0.1], 7.5))
    assert torch.equal(second.keys, first.keys)
    change = 0.5 * (7.5 - 1.5)
    close(read(second, [0, 1, 1]), torch.tensor([0.1 * change / 1e-5]).double(), rtol=1e-5, atol=0)


def test_memory_tokens_of_a_segment_do_not_correct_each_other() -> None:
    twice = written(writer(), nothing(), ([1, 2], 3.0), ([1, 2], 7.0))
    first, second = (written(writer(), nothing(), ([1, 2], value)) for value in (3.0, 7.0))
    close(twice.values, first.values + second.values)
    close(twice.keys, first.keys + second.keys)


def test_an_empty_matrix_returns_exactly_nothing_and_corrects_nothing() -> None:
    layer, reader = writer(), MatrixReader(dim=2, key_width=2).double()
    x = torch.randn(1, 5, 2).double()
    assert torch.equal(reader(x, nothing()), x)
    gammas = shown(layer.gamma)
    written(layer, nothing(), ([1, 2], 3.0), ([-4, 2], 1.0))
    assert torch.equal(gammas[0], torch.ones(1, 2, 1).double())


def test_no_gradient_flows_through_gamma() -> None:
    layer = writer(width=3)
    first = written(layer, nothing(width=3), ([1, 2, 0], 3.0))
    token = torch.tensor([[[1.0, 2.0, 1.0]]]).double().requires_grad_()
    held = first._replace(keys=first.keys.detach().requires_grad_())
    gammas, after = shown(layer.gamma), layer(token, held)
    weights = torch.randn(18).double()
    got = torch.autograd.grad((after.keys * weights).sum(), (token, held.keys))
    constant = gammas[0] * dpfp(token)
    (expected,) = torch.autograd.grad((constant.sum(1) * weights).sum(), token)
    close(got[0], expected)
    close(got[1], weights[None])


@torch.no_grad()
def run_alone(model: AssociativeRecurrentMemoryTransformer, tokens: Tensor, carried: list[Any]) -> Tensor:
    """The losses of a segment of one lane by the equations of the paper; edits what each layer carries in ``carried``.

    The matrices are those of the paper, ``A [D, F]`` and ``z [F]``; all positions pass all layers.
    """
    length = len(tokens)
    x = torch.cat((model.embedding(tokens[None]), model.memory[None]), dim=1)
    parallel = model.carried == "tokens"
    first = -1 - MEMORY if parallel else -1
    if parallel:
        x = torch.cat((torch.zeros(1, MEMORY, 8).double(), x), dim=1)
    at = Positions(rotation=model.rotary.span(first, length + MEMORY), causal=True)
    for n, block in enumerate(model.blocks):
        if parallel:
            x = torch.cat((carried[n][None], x[:, MEMORY:]), dim=1)
            x = block(x, at)
            carried[n] = x[0, -MEMORY:]
            continue
        matrix, z = carried[n]
        queries = dpfp(block.reader.to_query(x))[0]
        returned = [x[0, p] + matrix @ queries[p] / (z @ queries[p] + 1e-5) for p in range(len(queries))]
        x = block(torch.stack(returned)[None], at)
        new_matrix, new_z = matrix, z
        for token in x[0, -MEMORY:]:
            key = dpfp(block.writer.to_key(token))
            held = matrix @ key / (z @ key + 1e-5)
            strength = 1 / (1 + torch.exp(-block.writer.to_strength(token)))
            gamma = min(max(1 - float(z @ key) / (float(key @ key) + 1e-5), 0.0), 1.0) if model.correction else 1.0
            new_matrix = new_matrix + torch.outer(strength * (block.writer.to_value(token) - held), key)
            new_z = new_z + gamma * key
        carried[n] = new_matrix, new_z
    predicting = x[0, MEMORY:] if parallel else x[0]
    return F.cross_entropy(model.embedding.logits(predicting[:length]), tokens, reduction="none")


@pytest.mark.parametrize("correction", [True, False])
def test_four_segments_by_the_equations_in_every_lane_whatever_its_length(build: Build, correction: bool) -> None:
    model, lengths = build(correction=correction), ((5, 4, 1), (5, 2, 3), (2, 5, 5), (5, 5, 1))
    state = model.initial_state(3)
    empty = (torch.zeros(8, 6 * KEY).double(), torch.zeros(6 * KEY).double())
    carried: list[list[Any]] = [
        [empty] * 2 if model.initial is None else list(model.initial.unbind(0)) for _ in range(3)
    ]
    for t, row in enumerate(lengths):
        segment = make_segment(row, document_start=[t == 0] * 3, seed=t)
        output, state = model(segment, state)
        for lane, length in enumerate(row):
            expected = run_alone(model, segment.tokens[lane, :length], carried[lane])
            close(output.token_losses[lane, :length], expected, rtol=1e-9, atol=1e-9)
            for n, layer in enumerate(carried[lane]):
                if model.carried == "tokens":
                    close(state.memory[lane, n], layer)
                else:
                    close(state.memory[lane, n], layer[0].T, rtol=1e-9, atol=1e-9)
                    close(state.keys[lane, n], layer[1], rtol=1e-9, atol=1e-9)


def test_a_lane_that_is_reset_before_each_segment_is_a_transformer_of_the_same_weights() -> None:
    model, plain = associative_recurrent_memory(), transformer()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert missing == []
    assert {name for name in unexpected if "reader" not in name and "writer" not in name} == {"memory"}
    state, segments = model.initial_state(LANES), irregular(5)
    remembered = losses_of(model, segments)
    for segment, other, expected in zip(segments, remembered, losses_of(plain, segments), strict=True):
        output, state = model(segment, model.reset_memory(state))
        close(output.token_losses, expected, rtol=1e-12, atol=0)
        if segment is not segments[0]:
            assert not torch.allclose(other, expected)


def test_an_untrained_model_reads_nothing_from_memory() -> None:
    sizes: dict[str, Any] = {"heads": 2, "segment_length": LENGTH, "dropout": 0.0}
    model = AssociativeRecurrentMemoryTransformer(vocab_size=VOCAB, **SIZES, **sizes)
    before = losses_of(model, full(3))
    with torch.no_grad():
        model.memory.normal_()
    assert all(torch.equal(a, b) for a, b in zip(before, losses_of(model, full(3)), strict=True))


def test_no_token_sees_the_memory_tokens_behind_its_own_segment(build: Build) -> None:
    model = build()
    before = losses_of(model, full(3))
    with torch.no_grad():
        model.memory.normal_()
    after = losses_of(model, full(3))
    assert torch.equal(before[0], after[0])
    assert (before[1] != after[1]).all()


@pytest.mark.parametrize("token", [0, LENGTH - 1])
def test_every_token_is_known_for_as_long_as_memory_is_carried(build: Build, token: int) -> None:
    assert untouched(build(), changed=0, token=token) == [False] * 5
    assert untouched(build(), changed=2, token=token) == [True, True, False, False, False]


@pytest.mark.parametrize("gradient", sorted(GRADIENTS))
def test_every_gradient_but_truncated_gives_the_same(gradient: str, build: Build) -> None:
    def case() -> Any:
        model = build(dropout=0.2)
        return train_on(model, irregular(7), model.initial_state(LANES))

    got, expected = outcome(GRADIENTS[gradient], case), outcome(plain_loop, case)
    different = []
    for name, grad in expected.grads.items():
        if grad is not None and grad.numel():
            mine = got.grads[name]  # none where only later segments ask for it
            if mine is None or (mine - grad).abs().max() > 1e-12 * grad.abs().max():
                different.append(name)
    assert bool(different) == (gradient == "truncated")


def test_the_gradient_reaches_every_layer_of_the_state_through_three_segments(build: Build) -> None:
    model = build()
    state = detach(model.advance(full(1)[0], model.initial_state(2)))
    carried = state = state._replace(memory=state.memory.requires_grad_())
    for segment in full(4)[1:]:
        output, state = model(segment, state)
    (reached,) = torch.autograd.grad(output.token_losses.sum(), carried.memory)
    assert reached.flatten(2).any(2).all()


def test_the_last_layer_makes_only_what_is_written_and_what_predicts(build: Build) -> None:
    model, rows = build(), []
    model.blocks[-1].ffn.register_forward_hook(lambda ffn, args, out: rows.append(args[0].shape[1]))
    segment, state = full(1)[0], model.initial_state(2)
    model.advance(segment, state)
    assert rows == [MEMORY]
    model(segment, state)
    assert rows == [MEMORY, MEMORY, LENGTH]


def test_a_lane_carries_a_matrix_and_the_sums_of_its_keys_for_each_layer() -> None:
    state = associative_recurrent_memory(layers=3).initial_state(2)
    assert state_bytes(state) == 3 * 6 * KEY * (8 + 1) * 8
    assert state_bytes(PARALLEL(layers=3).initial_state(2)) == 3 * MEMORY * 8 * 8


def test_a_matrix_is_in_single_precision_where_the_weights_are_in_half() -> None:
    model = associative_recurrent_memory().bfloat16()
    _, state = model(full(1, lanes=1)[0], model.initial_state(1))
    assert {field.dtype for field in state} == {torch.float32}
    assert PARALLEL().bfloat16().initial_state(1).memory.dtype == torch.bfloat16


def test_probes_show_what_is_read_and_how_memory_tokens_write() -> None:
    model, (first, second) = associative_recurrent_memory(), full(2)
    block = model.blocks[1]
    _, state = model(first, model.initial_state(2))
    reads, strengths, gammas = (
        shown(probe) for probe in (block.reader.read, block.writer.strength, block.writer.gamma)
    )
    _, after = model(second, state)
    assert reads[0].shape == (2, 1 + LENGTH + MEMORY, 8)
    assert strengths[0].shape == gammas[0].shape == (2, MEMORY, 1)
    assert ((strengths[0] > 0) & (strengths[0] < 1)).all()
    assert ((gammas[0] >= 0) & (gammas[0] <= 1)).all()
    assert (gammas[0] < 1).any()
    assert (after.keys >= state.keys).all()


@pytest.mark.parametrize(
    "sizes", [{}, {"correction": False}, {"carried": "tokens"}, {"layers": 1}, {"layers": 1, "carried": "tokens"}]
)
def test_its_operations_are_those_of_the_formula(sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments" / "benchmarks")
    from flops import formula

    model = associative_recurrent_memory(**sizes)
    assert count_flops(model, lanes=3) == formula(model, lanes=3)
    assert count_flops(model, lanes=3, advance=True) < count_flops(model, lanes=3)


def test_a_document_that_starts_in_mid_rollout_is_read_as_alone(build: Build) -> None:
    model, (first, second) = build(), full(2)
    started = second._replace(document_start=torch.tensor([True, False]))
    fresh: Segment = second._replace(document_start=torch.tensor([True, True]))
    mixed, alone, carried = (losses_of(model, each)[-1] for each in ([first, started], [fresh], [first, second]))
    close(mixed[0], alone[0], rtol=1e-12, atol=0)
    close(mixed[1], carried[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"heads": 3}, "heads must divide dim, got heads=3 and dim=8"),
        ({"memory_tokens": 0}, "memory_tokens must be at least 1, got 0"),
        ({"key_width": 0}, "key_width must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_a_bad_option_is_refused_with_its_name_and_value(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        associative_recurrent_memory(**bad)


def test_another_kind_of_memory_is_refused_with_those_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its check of types would come first
    with pytest.raises(UsageError, match="carried must be one of matrix, tokens, got 'slots'"):
        associative_recurrent_memory(carried="slots")
