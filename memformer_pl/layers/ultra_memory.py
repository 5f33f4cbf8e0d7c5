"""Feed-forward layers that look up rows of a large table of values by two small sets of keys: UltraMem (Huang et al.
2024, arXiv 2411.12364) and product keys (Lample et al. 2019, arXiv 1907.05242).

N  tokens     D  width     R  rank     S  keys of a side     P  picks     C  cores     E  virtual tables     V  width of
a value
"""

import math
from abc import ABC, abstractmethod
from itertools import combinations
from typing import ClassVar, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.contract.weight_loss import WeightLoss
from memformer_pl.errors import LARGEST_WIDTH, UsageError, require_sizes
from memformer_pl.layers.probe import Probe

BOUND, STRENGTH = 0.15, 1e-3
"""Of the auxiliary loss: the size up to which a singular value is free, and the factor (tau and alpha)."""
SWEEPS = 10
"""Rotations of each pair of columns of a core, until they are at right angles to rounding; one of two columns needs
one."""
RATES = (4.0, 1.0)
"""Factor of the learning rate of values, at the first step and at the last (the paper's code)."""


class Scores(NamedTuple):
    """Of every key, for each token; at least in single precision."""

    rows: Float[Tensor, "N R S"]
    columns: Float[Tensor, "N R S"]


class Filter(NamedTuple):
    """Weights of the ranks by which each side is reduced to a few keys."""

    rows: Float[Tensor, " R"]
    columns: Float[Tensor, " R"]


class Cells(NamedTuple):
    """The picked cells of the grid, best first."""

    rows: Int[Tensor, "N P"]
    columns: Int[Tensor, "N P"]


class KeyedValues(nn.Module, ABC):
    """Add up a few values of a table, which a token finds through the grid of two sets of keys.

    A token's query has a half for each side, and each key has ``rank`` scores. A cell of the grid, a key of either
    side, has the score ``row^T core column``. Each side is reduced to ``picks`` keys by one sum of its scores, and the
    best ``picks`` cells among these are looked up: the best of the whole grid may be missed. Picks carry no gradient;
    scores and values do.

    The probe ``picked`` shows the addresses, ``[N, P]``, best first: the row of the table plus its number of rows times
    the number of the virtual table.

    Args:
        dim: Width of a token.
        keys: Keys of a side; the table has ``keys`` squared rows.
        key_dim: Width of a key.
        picks: Cells that a token looks up.
        value_dim: Width of a value.
        rank: Scores of a key.
        cores: Parts of a value with a score each.
        expansion: Virtual tables, which share the rows and have a map to ``dim`` each; a square. The keys of a side
            are ``keys * sqrt(expansion)``.
        seed: Seed of the order in which cells have their rows.

    Raises:
        UsageError: A size is below 1 or too large, there are more picks than keys of a side, ``expansion`` is not a
            square, or ``cores`` does not divide ``value_dim``.
    """

    learning_rates: ClassVar = {"values": RATES}
    shuffle: Tensor

    def __init__(
        self,
        *,
        dim: int,
        keys: int,
        key_dim: int,
        picks: int,
        value_dim: int,
        rank: int,
        cores: int,
        expansion: int,
        seed: int,
    ) -> None:
        super().__init__()
        require_sizes(most=LARGEST_WIDTH, keys=keys, key_dim=key_dim, picks=picks, value_dim=value_dim)
        require_sizes(most=LARGEST_WIDTH, rank=rank, cores=cores, expansion=expansion)
        require_sizes(least=0, seed=seed)
        side = keys * math.isqrt(expansion)
        require_sizes(most=LARGEST_WIDTH, **{"keys squared": keys**2, "keys squared times expansion": side**2})
        if math.isqrt(expansion) ** 2 != expansion:
            raise UsageError(f"expansion must be a square, such as 1, 4 or 9, got {expansion}")
        if picks > side:
            raise UsageError(f"picks must be at most the keys of a side, keys * sqrt(expansion) = {side}, got {picks}")
        if value_dim % cores:
            raise UsageError(f"cores must divide value_dim, got {cores=} and {value_dim=}")
        self.picks, self.cores, self.expansion = picks, cores, expansion
        self.to_query, self.query_norm = nn.Linear(dim, 2 * key_dim, bias=False), nn.RMSNorm(2 * key_dim)
        self.keys = nn.Parameter(torch.randn(2, side, key_dim, rank))
        self.values = nn.Parameter(torch.randn(keys**2, value_dim) * picks**-0.5)
        self.to_out = nn.Linear(expansion * value_dim, dim, bias=False)
        shuffle = torch.randperm(side**2, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        self.register_buffer("shuffle", shuffle.to(self.keys.device))
        self.picked = Probe()

    @abstractmethod
    def core(self) -> Float[Tensor, "R R"]:
        """The matrix between the scores of a row and of a column."""

    @abstractmethod
    def filter(self) -> Filter:
        """The sums by which each side is reduced, without a graph."""

    @abstractmethod
    def weigh(self, scores: Scores, cells: Cells) -> Float[Tensor, "N C P"]:
        """The factors of the parts of each picked value."""

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The update of each token."""
        tokens = x.reshape(-1, x.shape[-1])
        query = self.to_query(tokens)
        with torch.autocast(x.device.type, enabled=False):  # rounding makes ties
            scores = self.score(query.to(torch.promote_types(query.dtype, torch.float32)))
            cells = pick(scores, self.core(), self.filter(), picks=self.picks)
            weights = self.weigh(scores, cells).to(self.values.dtype)
            addresses = self.picked(self.shuffle[cells.rows * self.keys.shape[1] + cells.columns])
            pooled = pool(self.values, addresses, weights, tables=self.expansion)
        out: Tensor = self.to_out(pooled.to(query.dtype))
        return out.view_as(x)

    def score(self, query: Float[Tensor, "N Q"]) -> Scores:
        """The scores of all keys, which have length 1."""
        query = F.rms_norm(query, query.shape[1:], self.query_norm.weight.to(query.dtype))
        keys = F.normalize(self.keys.to(query.dtype), dim=2)
        halves = rearrange(query, "N (side K) -> side N K", side=2)
        scores = torch.bmm(halves, rearrange(keys, "side S K R -> side K (R S)"))
        return Scores(*rearrange(scores, "side N (R S) -> side N R S", S=keys.shape[1]).unbind())


class UltraMemory(KeyedValues, WeightLoss):
    """Look up values of a table by two sets of keys and a learned core between their scores (UltraMem).

    The core is a sum of ``cores`` matrices. The sum ranks cells; each matrix scores a part of the value on its own, and
    values are multiplied by these scores, without a softmax. Each side is filtered by the leading singular vector of
    the core. Singular values beyond the first are pulled below a bound, since what they add is not seen by the filter.

    Values take four times the learning rate at the first step, falling to once at the last, and do not decay.

    Ours: one head; an update of its own layer alone, where the paper carries it over several layers, to overlap work
    on several devices; queries after an RMSNorm, and keys of length 1; the matrices of the core begin between 0 and
    ``1 / cores``; singular vectors are those of the present weights, and the entry of largest size in the left one is
    positive, where the public code keeps vectors in buffers, with the sign nearest to that of the step before.

    Args:
        dim: Width of a token.
        keys: Keys of a side; the table has ``keys`` squared rows.
        key_dim: Width of a key.
        picks: Cells that a token looks up.
        value_dim: Width of a value.
        rank: Scores of a key.
        cores: Parts of a value with a score each.
        expansion: Virtual tables that share the rows (implicit value expansion); a square.
        seed: Seed of the order in which cells have their rows.
    """

    def __init__(
        self,
        *,
        dim: int,
        keys: int,
        key_dim: int,
        picks: int,
        value_dim: int,
        rank: int = 2,
        cores: int = 2,
        expansion: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(
            dim=dim,
            keys=keys,
            key_dim=key_dim,
            picks=picks,
            value_dim=value_dim,
            rank=rank,
            cores=cores,
            expansion=expansion,
            seed=seed,
        )
        self.core_parts = nn.Parameter(torch.rand(cores, rank, rank) / cores)

    def core(self) -> Float[Tensor, "R R"]:
        """The sum of all matrices, at least in single precision."""
        return self._parts().sum(0)

    def filter(self) -> Filter:
        """The leading singular vectors of the core."""
        u, t = singular_vectors(self.core())
        return Filter(u[:, 0], t[:, 0])

    def weigh(self, scores: Scores, cells: Cells) -> Float[Tensor, "N C P"]:
        """The score of each matrix."""
        return core_scores(taken(scores.rows, cells.rows), self._parts(), taken(scores.columns, cells.columns))

    def weight_loss(self) -> Float[Tensor, ""]:
        """The auxiliary loss: mean square of what singular values beyond the first exceed the bound by."""
        return STRENGTH * excess(self.core())

    def _parts(self) -> Float[Tensor, "C R R"]:
        return self.core_parts.to(torch.promote_types(self.core_parts.dtype, torch.float32))


class ProductKeys(KeyedValues):
    """Look up values of a table by two sets of keys whose scores are added: product keys, without a learned core.

    The score of a cell is the sum of a row's and a column's, so no cell among the best is missed. Values are multiplied
    by a softmax over the picked cells.

    Ours: one head; queries after an RMSNorm, where the paper has a batch norm; values narrower than a token, with a map
    behind them, as in :class:`UltraMemory`, and their learning rate.

    Args:
        dim: Width of a token.
        keys: Keys of a side; the table has ``keys`` squared rows.
        key_dim: Width of a key.
        picks: Cells that a token looks up.
        value_dim: Width of a value.
    """

    def __init__(self, *, dim: int, keys: int, key_dim: int, picks: int, value_dim: int) -> None:
        sizes = {"keys": keys, "key_dim": key_dim, "picks": picks, "value_dim": value_dim}
        super().__init__(dim=dim, **sizes, rank=1, cores=1, expansion=1, seed=0)
        nn.init.normal_(self.values)  # of which the softmax makes a mean, not a sum

    def score(self, query: Float[Tensor, "N Q"]) -> Scores:
        """The score of each key, and a one: the product with the core is a sum."""
        rows, columns = super().score(query)
        one = torch.ones_like(rows)
        return Scores(torch.cat((rows, one), dim=1), torch.cat((one, columns), dim=1))

    def core(self) -> Float[Tensor, "R R"]:
        """One."""
        return torch.eye(2, dtype=torch.promote_types(self.keys.dtype, torch.float32), device=self.keys.device)

    def filter(self) -> Filter:
        """The score alone."""
        return Filter(*self.core().unbind())

    def weigh(self, scores: Scores, cells: Cells) -> Float[Tensor, "N C P"]:
        """A softmax over the picked cells."""
        rows, columns = taken(scores.rows, cells.rows), taken(scores.columns, cells.columns)
        return (rows * columns).sum(1, keepdim=True).softmax(-1)


@torch.no_grad()
def pick(scores: Scores, core: Float[Tensor, "R R"], by: Filter, *, picks: int) -> Cells:
    """The best cells of the grid, among those of the best keys of each side."""
    rows = best(einsum(by.rows, scores.rows, "R, N R S -> N S"), picks)
    columns = best(einsum(by.columns, scores.columns, "R, N R S -> N S"), picks)
    left = einsum(taken(scores.rows, rows), core, "N R A, R Q -> N A Q")
    grid = torch.bmm(left, taken(scores.columns, columns))
    cells = best(grid.flatten(1), picks)
    return Cells(rows.gather(1, cells // picks), columns.gather(1, cells % picks))


def best(scores: Float[Tensor, "N S"], count: int) -> Int[Tensor, "N P"]:
    """Places of the largest scores, the first of equal ones first, which ``torch.topk`` does not promise."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def taken(scores: Float[Tensor, "N R S"], places: Int[Tensor, "N P"]) -> Float[Tensor, "N R P"]:
    """The scores at some places."""
    return scores.gather(2, places[:, None].expand(-1, scores.shape[1], -1))


def core_scores(
    rows: Float[Tensor, "N R P"], parts: Float[Tensor, "C R R"], columns: Float[Tensor, "N R P"]
) -> Float[Tensor, "N C P"]:
    """The score of each cell by each matrix."""
    left = einsum(rows, parts, "N R P, C R Q -> N C Q P")
    return (left * columns[:, None]).sum(2)


@torch.no_grad()
def singular_vectors(core: Float[Tensor, "R R"]) -> tuple[Float[Tensor, "R R"], Float[Tensor, "R R"]]:
    """Left and right singular vectors, as columns, largest first; of each left one, the entry of largest size is
    positive.

    Found by rotations of pairs of columns until all are at right angles (one-sided Jacobi). Torch's decomposition
    would make the host wait for the device, and refuse NaN.
    """
    rank = len(core)
    both = torch.cat((core, torch.eye(rank, dtype=core.dtype, device=core.device)))
    for _ in range(1 if rank == 2 else SWEEPS):
        for first, second in combinations(range(rank), 2):
            a, b = both[:, first].clone(), both[:, second].clone()
            angle = torch.atan2(2 * (a * b)[:rank].sum(), (a * a - b * b)[:rank].sum()) / 2
            both[:, first], both[:, second] = angle.cos() * a + angle.sin() * b, angle.cos() * b - angle.sin() * a
    u, t = both[:rank] / both[:rank].norm(dim=0).clamp(min=torch.finfo(core.dtype).tiny), both[rank:]
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u * signs, t * signs


def excess(core: Float[Tensor, "R R"]) -> Float[Tensor, ""]:
    """The mean square of what the singular values beyond the first exceed the bound by; 0 if there is only one."""
    if len(core) == 1:
        return core.new_zeros(())
    u, t = singular_vectors(core)
    # with constant vectors, the value and the gradient of singular values, also of equal ones
    sizes = (u[:, None] * core[..., None] * t).sum((0, 1))
    return F.relu(sizes[1:] - BOUND).square().mean()


def pool(
    values: Float[Tensor, "M V"], addresses: Int[Tensor, "N P"], weights: Float[Tensor, "N C P"], *, tables: int
) -> Float[Tensor, "N _"]:
    """The sums of weighted values in each virtual table, side by side.

    Args:
        values: The table.
        addresses: Rows of it, plus its number of rows times the number of the virtual table.
        weights: Factors of the ``C`` parts of each value.
        tables: Number of virtual tables.
    """
    parts = weights.shape[1]
    table, row = addresses // len(values), addresses % len(values)
    table, order = table.sort(dim=1, stable=True)
    row, weights = row.gather(1, order), weights.gather(2, order[:, None].expand_as(weights))
    places = row[:, None] * parts + torch.arange(parts, device=row.device)[:, None]
    counts = (table[..., None] == torch.arange(tables, device=row.device)).sum(1)
    sizes = counts[:, None].expand(-1, parts, -1).flatten()
    sums = F.embedding_bag(
        places.flatten(),
        rearrange(values, "M (C W) -> (M C) W", C=parts),
        sizes.cumsum(0) - sizes,
        mode="sum",
        per_sample_weights=weights.flatten(),
    )
    return rearrange(sums, "(N C E) W -> N (E C W)", C=parts, E=tables)
