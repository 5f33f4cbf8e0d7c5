"""Stable Hadamard Memory: cases by hand, which rows are taken, what it is without calibration."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    LANES,
    LENGTH,
    assert_same,
    full,
    irregular,
    losses_of,
    make_segment,
    outcome,
    plain_loop,
    shown,
    split_mix,
    stable_hadamard_memory,
    train_on,
    untouched,
    whole_document,
)
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.contract import ABSENT, Segment, state_bytes
from memformer_pl.errors import UsageError
from memformer_pl.gradients.rollout import GRADIENTS
from memformer_pl.layers.hadamard_memory import (
    Calibration,
    HadamardMemory,
    Written,
    outer,
    positive,
    scheduled_rows,
)
from memformer_pl.models import StableHadamardMemory
from memformer_pl.training.flops import count_flops

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
rounded = partial(torch.testing.assert_close, rtol=0, atol=5e-5)
LAYERS, HEADS, WIDTH, DIM, ROWS = 2, 2, 4, 8, 5


def test_two_tokens_by_hand() -> None:
    theta, content = torch.tensor([[1.0, -1], [0, 2]]), torch.tensor([[0.5, 0], [1, 1]])
    keys, values = torch.eye(2), torch.tensor([[2.0, 4], [1, 1]])
    factors, updates = 1 + torch.tanh(outer(theta, content)), 0.5 * outer(values, keys)
    rounded(factors[0], torch.tensor([[1.4621, 1], [0.5379, 1]]))
    rounded(factors[1], torch.tensor([[1.0, 1], [1.9640, 1.9640]]))
    layer = HadamardMemory(dim=2, heads=1, rows=1, centred=False)
    torch.nn.init.eye_(layer.to_out.weight)
    queries = torch.tensor([[0.5, 0.5]]).expand(2, 2)
    per_head = (queries[None, :, None], factors[None, :, None], updates[None, :, None])
    read, memory = layer(torch.zeros(1, 1, 2, 2), Written(*per_head))
    rounded(memory[0, 0], torch.tensor([[1, 0.5], [3.9281, 0.5]]))
    rounded(read[0, 1], torch.tensor([0.75, 2.2140]))
    one = layer.write(torch.zeros(1, 1, 2, 2), Written(*(part[:, :1] for part in per_head)))
    rounded(one[0, 0], torch.tensor([[1.0, 0], [2, 0]]))


def test_keys_are_the_positive_entries_as_shares() -> None:
    torch.testing.assert_close(positive(torch.tensor([-1.0, 2, 2])), torch.tensor([0, 0.5, 0.5]), rtol=1e-5, atol=0)
    assert not positive(torch.tensor([-1.0, -2])).any()


def test_the_mean_of_the_rows_is_taken_from_each() -> None:
    x, rows = torch.ones(1, 2, 2), torch.tensor([[0, 1]])
    for centred, table in ((True, [[-1.0, -1], [1, 1]]), (False, [[1.0, -1], [3, 1]])):
        layer = Calibration(dim=2, heads=1, rows=2, centred=centred)
        torch.nn.init.eye_(layer.to_content.weight)
        with torch.no_grad():
            layer.table.copy_(torch.tensor([[1.0, -1], [3, 1]])[:, None])
        expected = 1 + torch.tanh(outer(torch.tensor(table), torch.ones(2, 2)))
        torch.testing.assert_close(layer(x, rows)[0, :, 0], expected)


def layer_by_hand(layer: HadamardMemory, x_LD: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
    """The outputs of a layer, and memory after the last token, by the equations."""
    memory, outputs = [torch.zeros(WIDTH, WIDTH).double()] * HEADS, []
    for x, row in zip(x_LD, rows, strict=True):
        queries, keys, values = (layer.to_query_key_value.weight @ x).view(3, HEADS, WIDTH)
        eta, read = (layer.to_strength.weight @ x).sigmoid(), []
        for h in range(HEADS):
            theta = layer.calibrate.table[row, h] - layer.calibrate.table[:, h].mean(0)
            content = (layer.calibrate.to_content.weight @ x).view(HEADS, WIDTH)[h]
            key, query = (F.relu(y[h]) / (1e-5 + F.relu(y[h]).sum()) for y in (keys, queries))
            factors = 1 + torch.tanh(theta[:, None] * content)
            memory[h] = factors * memory[h] + eta[h] * values[h][:, None] * key
            read.append(memory[h] @ query)
        outputs.append(layer.to_out.weight @ torch.cat(read))
    return torch.stack(outputs), torch.stack(memory)


def test_five_tokens_and_their_gradients_by_the_equations() -> None:
    model = stable_hadamard_memory().eval()
    segment = make_segment([5], document_start=[1])
    x, memories = model.embedding(segment.tokens[:, :4])[0], []
    for number, block in enumerate(model.blocks):
        rows = [split_mix(number, place) % ROWS for place in range(5)]
        read, memory = layer_by_hand(block.memory, block.memory_norm(x), rows)
        memories.append(memory)
        x = x + read
        x = x + block.ffn(block.ffn_norm(x)[None])[0]
    expected = F.cross_entropy(model.embedding.logits(x), segment.tokens[0], reduction="none")
    output, state = model(segment, model.initial_state(1))
    close(output.token_losses[0], expected)
    close(state.memory[0], torch.stack(memories))
    assert state.steps.tolist() == [[5, 5]]
    assert state.last.tolist() == [segment.tokens[0, 4]]
    parameters = list(model.parameters())
    close(torch.autograd.grad(output.token_losses.sum(), parameters), torch.autograd.grad(expected.sum(), parameters))


def test_a_cell_depends_on_itself_alone_by_its_factor() -> None:
    layer = stable_hadamard_memory().blocks[0].memory
    written = layer.project(torch.randn(1, 1, DIM).double(), torch.tensor([[3]]), torch.ones(1, 1).bool())
    memory = torch.randn(1, HEADS, WIDTH, WIDTH).double()
    jacobian = torch.autograd.functional.jacobian(lambda m: layer.write(m, written), memory).flatten(4).flatten(0, 3)
    close(jacobian, torch.diag(written.calibrations.flatten()))


def test_without_content_it_is_linear_attention() -> None:
    model, plain = stable_hadamard_memory(), stable_hadamard_memory(calibration=False)
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for block in model.blocks:
            block.memory.calibrate.to_content.weight.zero_()
    close(torch.cat(losses_of(model, irregular(5))), torch.cat(losses_of(plain, irregular(5))))
    layer = plain.blocks[0].memory
    x = torch.randn(1, LENGTH, DIM).double()
    written = layer.project(x, None, torch.ones(1, LENGTH).bool())
    _, memory = layer(torch.zeros(1, HEADS, WIDTH, WIDTH).double(), written)
    close(memory, written.updates.sum(1))


@pytest.mark.parametrize("calibration", [True, False])
def test_an_absent_token_leaves_memory_bit_for_bit(calibration: bool) -> None:
    layer = stable_hadamard_memory(calibration=calibration).blocks[0].memory
    memory = torch.randn(2, HEADS, WIDTH, WIDTH).double()
    x, rows = torch.randn(2, LENGTH, DIM).double(), torch.zeros(2, LENGTH).long() if calibration else None
    there = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    after = layer.write(memory, layer.project(x, rows, there))
    assert torch.equal(after[1], memory[1])
    shorter = layer.project(x[:, :2], None if rows is None else rows[:, :2], there[:, :2])
    assert torch.equal(after[0], layer.write(memory, shorter)[0])


@pytest.mark.parametrize("cuts", [(12,), (5, 5, 2), (1,) * 12])
def test_scheduled_rows_do_not_depend_on_how_a_document_is_cut(cuts: tuple[int, ...]) -> None:
    steps, rows = torch.zeros(1).long(), []
    for length in cuts:
        rows.append(scheduled_rows(steps, torch.ones(1, length).bool(), layer=1, rows=ROWS))
        steps = steps + length
    expected = [split_mix(1, place) % ROWS for place in range(12)]
    assert torch.cat(rows, dim=1)[0].tolist() == expected


def test_scheduled_rows_take_all_rows_equally_often_and_differ_between_layers() -> None:
    there, none = torch.ones(1, 12800).bool(), torch.zeros(1).long()
    first, second = (scheduled_rows(none, there, layer=layer, rows=128)[0] for layer in (0, 1))
    for rows in (first, second):
        count = rows.bincount(minlength=128)
        assert abs(float(count.double().std()) - 10) < 3
    assert float((first == second).double().mean()) < 0.05


def test_rows_are_drawn_in_training_by_the_seeds_of_a_segment_and_in_evaluation_not() -> None:
    model, segment = stable_hadamard_memory(draw=True), full(1, lanes=LANES)[0]
    state = model.initial_state(LANES)
    drawn = [model.entering(segment, state, torch.tensor([seed]))[2] for seed in (3, 3, 4)]
    assert drawn[0].shape == (LANES, LAYERS, LENGTH)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    for still in (model.eval(), stable_hadamard_memory(), stable_hadamard_memory(draw=True, rows=1, centred=False)):
        assert still.seeds(segment) is None
        rows = still.entering(segment, state, torch.tensor([3]))[2]
        for n in range(LAYERS):
            scheduled = scheduled_rows(state.steps[:, n], segment.token_mask, layer=n, rows=still.rows)
            assert torch.equal(rows[:, n], scheduled)
    assert len(stable_hadamard_memory(calibration=False).entering(segment, state, None)) == 2


def test_drawn_rows_are_all_rows_equally_often() -> None:
    model = stable_hadamard_memory(rows=128, draw=True, segment_length=1000)
    segment = Segment(torch.zeros(8, 1000).long(), torch.ones(8, 1000).bool(), torch.ones(8).bool())
    rows = model.entering(segment, model.initial_state(8), torch.tensor([1]))[2]
    count = rows.flatten().bincount(minlength=128).double()  # of 16,000: 125 of each, with a deviation of 11
    assert rows.min() == 0
    assert float((count - 125).abs().max()) < 50
    assert abs(float(count.std()) - 11.1) < 3


def test_a_document_in_segments_is_one_pass() -> None:
    segments, build = full(4), stable_hadamard_memory
    (together,) = losses_of(build(segment_length=4 * LENGTH), [whole_document(segments)])
    close(torch.cat(losses_of(build(), segments), dim=1), together)


def test_a_lane_carries_a_matrix_a_head_a_count_a_layer_and_a_token() -> None:
    state = stable_hadamard_memory(layers=3).initial_state(2)
    assert state_bytes(state) == 3 * HEADS * WIDTH * WIDTH * 8 + 3 * 8 + 8
    assert not state.memory.any()
    assert state.last.tolist() == [ABSENT] * 2


def test_memory_is_in_single_precision_where_the_weights_are_in_half() -> None:
    model = stable_hadamard_memory().bfloat16()
    output, state = model(full(1)[0], model.initial_state(2))
    assert state.memory.dtype == torch.float32
    assert output.token_losses.isfinite().all()


@pytest.mark.parametrize("gradient", sorted(GRADIENTS))
@pytest.mark.parametrize("sizes", [{"draw": True}, {}, {"calibration": False}])
def test_every_gradient_but_truncated_gives_the_same(gradient: str, sizes: dict[str, Any]) -> None:
    def case() -> Any:
        model = stable_hadamard_memory(dropout=0.2, **sizes)
        return train_on(model, irregular(7), model.initial_state(LANES))

    got, expected = outcome(GRADIENTS[gradient], case), outcome(plain_loop, case)
    if gradient == "truncated":
        assert torch.equal(got.loss, expected.loss)
        assert not torch.allclose(
            got.grads["blocks.0.memory.to_strength.weight"], expected.grads["blocks.0.memory.to_strength.weight"]
        )
    else:
        assert_same(got, expected)


def test_a_token_is_known_for_as_long_as_the_state_is_carried() -> None:
    assert untouched(stable_hadamard_memory(), changed=0) == [False] * 5
    assert untouched(stable_hadamard_memory(), changed=2, token=LENGTH - 1) == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_before_training_products_of_two_thousand_factors_stay_in_range() -> None:
    """The logarithm of the largest of all cells, which float32 ends at 88; the mean of the table is what grows."""
    torch.manual_seed(0)
    x = F.layer_norm(torch.randn(2048, 128), (128,))
    growth = {}
    for centred in (True, False):
        layer = HadamardMemory(dim=128, heads=8, rows=128, centred=centred)
        rows = torch.randint(128, (1, 2048))
        factors = layer.calibrate(x[None], rows)
        growth[centred] = float(factors[0].log().sum(0).max().detach())
    assert growth[True] < 10
    assert growth[True] < growth[False] < 60


@pytest.mark.slow
def test_eight_thousand_tokens_have_finite_gradients() -> None:
    torch.manual_seed(0)
    model = StableHadamardMemory(vocab_size=256, dim=64, heads=4, layers=2, segment_length=64, dropout=0.0)
    segments = []
    for number in range(8192 // 64):
        tokens = torch.randint(256, (1, 64))
        start = torch.tensor([number == 0])
        segments.append(Segment(tokens, torch.ones_like(tokens).bool(), start, seeds=torch.randint(1 << 62, (1,))))
    _, state = GRADIENTS["replay"](
        lambda segment, state: (lambda output, after: (output.token_losses.mean(), after))(*model(segment, state)),
        segments,
        model.initial_state(1),
    )
    assert state.memory.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_probes_show_factors_and_strengths() -> None:
    model, ragged = stable_hadamard_memory(), make_segment([5, 2])
    layer = model.blocks[1].memory
    factors, strength = shown(layer.calibration), shown(layer.strength)
    model.advance(ragged, model.initial_state(2))
    assert factors[0].shape == (2, LENGTH, HEADS, WIDTH, WIDTH)
    assert ((factors[0] > 0) & (factors[0] < 2)).all()
    assert (factors[0][1, 2:] == 1).all()
    assert strength[0].shape == (2, LENGTH, HEADS)


@pytest.mark.parametrize("calibration", [True, False])
def test_its_operations_are_those_of_the_formula(calibration: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments" / "benchmarks")
    from flops import formula

    model = stable_hadamard_memory(calibration=calibration)
    assert count_flops(model, lanes=3) == formula(model, lanes=3)
    assert count_flops(model, lanes=3, advance=True) < count_flops(model, lanes=3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"heads": 3}, "heads must divide dim, got heads=3 and dim=8"),
        ({"heads": 8}, "heads must have at least 2 entries, got dim=8 and heads=8"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"rows": 1}, "rows=1 has nothing left once its mean is taken from it: set centred to false"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_a_bad_option_is_refused_with_its_name_and_value(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stable_hadamard_memory(**bad)
