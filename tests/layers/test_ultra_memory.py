"""Values found by two sets of keys: numbers by hand, picks, values in parts and in virtual tables, and what is
refused."""

from typing import Any

import pytest
import torch
from models import shown
from torch import Tensor, nn

from memformer_pl.errors import UsageError
from memformer_pl.layers import ProductKeys, UltraMemory
from memformer_pl.layers.ultra_memory import (
    STRENGTH,
    Cells,
    Filter,
    Scores,
    best,
    core_scores,
    excess,
    pick,
    pool,
    singular_vectors,
    taken,
)

CORE = torch.tensor([[1.0, 0.2], [0.1, 0.5]])
SCORES = Scores(torch.tensor([[[2.0, 0, 1], [0, 2, 1]]]), torch.tensor([[[1.0, 0, 2], [0, 3, 1]]]))
SIZES = {"dim": 6, "keys": 4, "key_dim": 3, "picks": 3, "value_dim": 4}


def leading(core: Tensor) -> Filter:
    u, t = singular_vectors(core)
    return Filter(u[:, 0], t[:, 0])


def scores_of(cells: Cells, scores: Scores = SCORES, core: Tensor = CORE) -> Tensor:
    return core_scores(taken(scores.rows, cells.rows), core[None], taken(scores.columns, cells.columns))[:, 0]


def ultra(**sizes: int) -> UltraMemory:
    return UltraMemory(**{**SIZES, **sizes}).double()


def same(got: Tensor, expected: object) -> None:
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=0, atol=1e-4)


def test_the_grid_is_the_product_of_scores_with_the_core_between() -> None:
    rows, columns = (torch.arange(3).repeat_interleave(3)[None], torch.arange(3).repeat(3)[None])
    same(scores_of(Cells(rows, columns)), [[2, 1.2, 4.4, 0.2, 3, 1.4, 1.1, 2.1, 2.9]])


def test_each_side_is_filtered_by_the_leading_singular_vector() -> None:
    by = leading(CORE)
    same(SCORES.rows[0].T @ by.rows, [1.9441, 0.4694, 1.2068])
    same(SCORES.columns[0].T @ by.columns, [0.9543, 0.8966, 2.2075])


def test_two_picks_find_the_best_cells_of_two_rows_and_two_columns_and_miss_the_second_best_of_all() -> None:
    cells = pick(SCORES, CORE, leading(CORE), picks=2)
    same(scores_of(cells), [[4.4, 2.9]])
    assert cells.rows.tolist() == [[0, 2]]
    assert cells.columns.tolist() == [[2, 2]]
    kept = Cells(torch.tensor([[0, 2, 0, 2]]), torch.tensor([[2, 2, 0, 0]]))
    same(scores_of(kept), [[4.4, 2.9, 2.0, 1.1]])
    same(scores_of(Cells(torch.tensor([[1]]), torch.tensor([[1]]))), [[3.0]])


def test_singular_values_beyond_the_first_cost_the_square_of_what_exceeds_the_bound() -> None:
    core = CORE.double().requires_grad_()
    u, t = singular_vectors(core)
    same((u.T @ core @ t).detach(), [[1.0432, 0], [0, 0.4601]])
    same(excess(core).detach(), 0.0962)
    assert excess(CORE[:1, :1]) == 0
    assert excess(CORE / 10) == 0


@pytest.mark.parametrize("core", [CORE, torch.rand(3, 3), torch.eye(3)])
def test_the_auxiliary_loss_has_the_gradient_of_singular_values(core: Tensor) -> None:
    leaf = core.double().requires_grad_()
    (got,) = torch.autograd.grad(excess(leaf), leaf)
    (expected,) = torch.autograd.grad((torch.linalg.svdvals(leaf)[1:] - 0.15).relu().square().mean(), leaf)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 16])
def test_singular_vectors_are_those_of_torch_and_the_entry_of_largest_size_in_a_left_one_is_positive(rank: int) -> None:
    low = torch.randn(rank, 1) @ torch.randn(1, rank)
    for core in (torch.randn(rank, rank), -torch.rand(rank, rank), torch.eye(rank), low, torch.zeros(rank, rank)):
        u, t = singular_vectors(core.double())
        assert (u.gather(0, u.abs().argmax(0, keepdim=True)) >= 0).all()
        torch.testing.assert_close(u.T @ core.double() @ t, torch.diag(torch.linalg.svdvals(core.double())))
        if core.any():
            torch.testing.assert_close(t.T @ t, torch.eye(rank).double())


def test_each_matrix_of_the_core_scores_its_part_of_the_value() -> None:
    parts = torch.stack((torch.diag(torch.tensor([0.8, 0.1])), CORE - torch.diag(torch.tensor([0.8, 0.1]))))
    weights = core_scores(torch.tensor([[[2.0], [0]]]), parts, torch.tensor([[[2.0], [1]]]))
    same(weights, [[[3.2], [1.2]]])
    same(pool(torch.tensor([[10.0, 20]]), torch.tensor([[0]]), weights, tables=1), [[32, 24]])


def test_virtual_tables_share_rows_and_have_a_map_each() -> None:
    values = torch.tensor([[0.0, 1], [2, 3], [4, 5]])
    addresses, scores = torch.tensor([[0, 3 + 2, 2]]), torch.tensor([[2.0, 0.5, 1]])
    pooled = pool(values, addresses, scores[:, None], tables=2)
    same(pooled, [[4, 7, 2, 2.5]])
    both = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]])  # the identity, and a swap
    same(pooled @ both.T, [[6.5, 9]])


def test_lookup_equals_gathering_and_adding_with_gradients_to_values_and_weights() -> None:
    values, weights = torch.randn(9, 6).double().requires_grad_(), torch.randn(5, 2, 7).double().requires_grad_()
    addresses, outward = torch.randint(4 * 9, (5, 7)), torch.randn(5, 4 * 6).double()
    read = values[addresses % 9].unflatten(2, (2, 3)) * weights.transpose(1, 2)[..., None]
    tables = nn.functional.one_hot(addresses // 9, 4).double()
    expected = torch.einsum("npe,npcw->necw", tables, read).flatten(1)
    got = pool(values, addresses, weights, tables=4)
    torch.testing.assert_close(got, expected)
    for one, other in zip(*(torch.autograd.grad(y, (values, weights), outward) for y in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_the_first_of_equal_scores_is_picked() -> None:
    assert best(torch.tensor([[1.0, 3, 3, 2, 3]]), 2).tolist() == [[1, 2]]


def test_the_scores_of_product_keys_are_sums_and_the_best_cells_are_never_missed() -> None:
    layer, x = ProductKeys(**SIZES).double(), torch.randn(5, 6).double()
    scores = layer.score(layer.to_query(x))
    row, column = scores.rows[:, 0], scores.columns[:, 1]
    sums = (row[:, :, None] + column[:, None]).flatten(1)
    addresses = shown(layer.picked)
    layer(x)
    expected = sums.topk(3)
    assert torch.equal(addresses[0], layer.shuffle[expected.indices])
    cells = Cells(expected.indices // 4, expected.indices % 4)
    torch.testing.assert_close(layer.weigh(scores, cells)[:, 0], expected.values.softmax(-1))


@pytest.mark.parametrize("kind", [UltraMemory, ProductKeys])
def test_a_token_is_looked_up_alone(kind: type[UltraMemory | ProductKeys]) -> None:
    layer, x = kind(**SIZES).double(), torch.randn(2, 4, 6).double()
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1:2, 2:3])[0, 0])


def test_the_probe_shows_the_picked_addresses_best_first_and_the_output_is_made_of_their_rows() -> None:
    layer, x = ultra(), torch.randn(1, 1, 6).double()
    addresses = shown(layer.picked)
    before = layer(x)
    (picked,) = addresses[0].tolist()
    assert len(set(picked)) == 3
    assert max(picked) < 4 * 16
    rows = {address % 16 for address in picked}
    with torch.no_grad():
        layer.values[[row for row in range(16) if row not in rows]] = 7.0
        assert torch.equal(layer(x), before)
        layer.values[picked[0] % 16] = 7.0
        assert not torch.equal(layer(x), before)


def test_every_cell_has_an_address_of_its_own_which_the_seed_decides() -> None:
    torch.manual_seed(1)
    one = ultra()
    torch.manual_seed(2)
    assert sorted(one.shuffle.tolist()) == list(range(64))
    assert torch.equal(one.shuffle, ultra().shuffle)
    assert not torch.equal(one.shuffle, ultra(seed=1).shuffle)


def test_picks_and_outputs_are_the_same_bit_for_bit_with_a_graph_and_without() -> None:
    layer = UltraMemory(dim=32, keys=16, key_dim=8, picks=8, value_dim=16)
    x, addresses = torch.randn(4, 50, 32), shown(layer.picked)
    with_graph = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), with_graph)
    assert torch.equal(*addresses)


def test_under_autocast_cells_are_ranked_in_single_precision() -> None:
    layer, x = UltraMemory(**SIZES), torch.randn(2, 3, 6)
    with torch.autocast("cpu", torch.bfloat16):
        query = layer.to_query(x.flatten(0, 1)).float()
        addresses = shown(layer.picked)
        assert layer(x).dtype == torch.bfloat16
    cells = pick(layer.score(query), layer.core(), layer.filter(), picks=3)
    assert torch.equal(addresses[0], layer.shuffle[cells.rows * 8 + cells.columns])


def test_weights_in_bfloat16_are_enough() -> None:
    layer = UltraMemory(**SIZES).bfloat16()
    out = layer(torch.randn(2, 3, 6).bfloat16())
    assert out.dtype == torch.bfloat16
    assert layer.weight_loss().dtype == torch.float32


def test_all_weights_get_a_gradient_and_rows_that_were_not_picked_one_of_zero() -> None:
    layer, x = ultra(), torch.randn(2, 3, 6).double()
    addresses = shown(layer.picked)
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layer.parameters())
    rows = set((addresses[0] % 16).flatten().tolist())
    assert set(layer.values.grad.any(1).nonzero().flatten().tolist()) == rows  # type: ignore[union-attr]


def test_the_auxiliary_loss_is_that_of_the_sum_of_all_matrices() -> None:
    layer = ultra()
    with torch.no_grad():
        layer.core_parts.copy_(torch.stack((CORE / 4, 3 * CORE / 4)))
    same(layer.weight_loss().detach() / STRENGTH, 0.0962)


def test_a_core_that_is_not_finite_gives_an_output_that_is_not_finite_instead_of_an_error() -> None:
    layer = ultra()
    with torch.no_grad():
        layer.core_parts[0, 0, 0] = torch.nan
    assert layer(torch.randn(1, 2, 6).double()).isnan().any()
    assert layer.weight_loss().isnan()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"keys": 0}, "keys must be at least 1, got 0"),
        ({"picks": 9}, r"picks must be at most the keys of a side, keys \* sqrt\(expansion\) = 8, got 9"),
        ({"expansion": 3}, "expansion must be a square, such as 1, 4 or 9, got 3"),
        ({"cores": 3}, "cores must divide value_dim, got cores=3 and value_dim=4"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"expansion": 0}, "expansion must be at least 1, got 0"),
        ({"keys": 5000}, "keys squared must be at most 16,777,216, got 25000000"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ultra(**sizes)
