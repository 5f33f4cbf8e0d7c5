"""A matrix that memory tokens write and all positions read: the memory of a layer of ARMT (Rodkin et al. 2024).

B  lanes     P  positions     M  memory tokens     D  width     K  width of a key     F  features of a key: 6 K
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.layers.probe import Probe
from memformer_pl.layers.transformer import BlockConfig, TransformerBlock, init_weights

ROLLS = 3
"""The paper's ``nu``: with how many of its neighbours each channel is multiplied."""
EPSILON = 1e-5
"""Added to every divisor."""


class Matrix(NamedTuple):
    """What a layer has stored of earlier segments; at least float32."""

    values: Float[Tensor, "B F D"]
    """The paper's ``A``, transposed: sums of values, weighed by each feature of their keys."""
    keys: Float[Tensor, "B F"]
    """The paper's ``z``: sums of the features of keys, which normalise what is read."""


class MatrixReader(nn.Module):
    """Read a matrix at every position, by linear attention (equations 1 to 4).

    The probe ``read`` shows what memory returns, ``[B, P, D]``.

    Args:
        dim: Width of positions.
        key_width: Width of a query before :func:`dpfp`.
    """

    def __init__(self, *, dim: int, key_width: int) -> None:
        super().__init__()
        self.to_query = nn.Linear(dim, key_width, bias=False)
        self.read = Probe()

    def forward(self, x: Float[Tensor, "B P D"], matrix: Matrix) -> Float[Tensor, "B P D"]:
        """``x`` and what memory returns for it; ``x`` if nothing is stored.

        Args:
            x: What enters a layer, without a norm.
            matrix: Its memory.
        """
        query_BPF = dpfp(self.to_query(x).to(matrix.keys.dtype))
        read_BPD, _ = recall(query_BPF, matrix)
        out: Tensor = x + self.read(read_BPD.to(x.dtype))
        return out


class MatrixWriter(nn.Module):
    """Write memory tokens into a matrix, all against the matrix as it was before the segment (equations 1 to 4).

    A write moves what memory returns for its key towards its value, by a share: its strength. The sum of the keys grows
    by the share of the key that it does not hold yet, ``gamma``, through which no gradient flows. So a key that is
    written again does not count twice.

    The probes ``strength`` and ``gamma`` show ``[B, M, 1]`` each.

    Args:
        dim: Width of memory tokens.
        key_width: Width of a key before :func:`dpfp`.
        correction: Whether the sum of the keys is corrected by ``gamma``; otherwise it grows by every key.
    """

    def __init__(self, *, dim: int, key_width: int, correction: bool) -> None:
        super().__init__()
        self.correction = correction
        self.to_key, self.to_value = nn.Linear(dim, key_width, bias=False), nn.Linear(dim, dim, bias=False)
        self.to_strength = nn.Linear(dim, 1)
        self.strength, self.gamma = Probe(), Probe()

    def forward(self, tokens: Float[Tensor, "B M D"], matrix: Matrix) -> Matrix:
        """The matrix after a segment.

        Args:
            tokens: What leaves a layer at its memory tokens.
            matrix: Memory before the segment.
        """
        key_BMF = dpfp(self.to_key(tokens).to(matrix.keys.dtype))
        held_BMD, met_BM1 = recall(key_BMF, matrix)
        gamma_BM1 = torch.ones_like(met_BM1)
        if self.correction:
            length_BM1 = key_BMF.square().sum(-1, keepdim=True)
            gamma_BM1 = (1 - met_BM1 / (length_BM1 + EPSILON)).clamp(0, 1).detach()
        gamma_BM1 = self.gamma(gamma_BM1)
        strength_BM1 = self.strength(self.to_strength(tokens).sigmoid())
        change_BMD = strength_BM1 * (self.to_value(tokens) - held_BMD)
        values = matrix.values + key_BMF.transpose(1, 2) @ change_BMD.to(key_BMF.dtype)
        return Matrix(values, matrix.keys + (gamma_BM1 * key_BMF).sum(1))


class AssociativeBlock(TransformerBlock):
    """A block with a matrix of its own: the model reads it before the block, and writes it from what leaves the block.

    Args:
        config: The sizes of the block.
        key_width: Width of keys and queries of the matrix.
        correction: As for :class:`MatrixWriter`.
    """

    def __init__(self, config: BlockConfig, *, key_width: int, correction: bool) -> None:
        super().__init__(config)
        self.reader = MatrixReader(dim=config.dim, key_width=key_width)
        self.writer = MatrixWriter(dim=config.dim, key_width=key_width, correction=correction)


def associative_blocks(config: BlockConfig, *, layers: int, key_width: int, correction: bool) -> nn.ModuleList:
    """Build blocks whose values begin at zero, as in the paper's code: an untrained model reads nothing from memory."""
    blocks = [AssociativeBlock(each, key_width=key_width, correction=correction) for each in config.of_layers(layers)]
    built = nn.ModuleList(blocks)
    init_weights(built)
    for block in blocks:
        nn.init.zeros_(block.writer.to_value.weight)
    return built


def dpfp(x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B F"]:
    """Features of queries or keys, at least 0 and mostly 0 (DPFP-3; Schlag et al. 2021, arXiv 2102.11174).

    The positive and the negative parts of all channels stand in a ring; each is multiplied by the first, the second and
    the third before it.
    """
    parts = torch.cat((F.relu(x), F.relu(-x)), dim=-1)
    return torch.cat([parts * parts.roll(shift, dims=-1) for shift in range(1, ROLLS + 1)], dim=-1)


def recall(
    features_BPF: Float[Tensor, "B P F"], matrix: Matrix
) -> tuple[Float[Tensor, "B P D"], Float[Tensor, "B P 1"]]:
    """What a matrix returns for queries, and how much of its keys they meet; zeros if nothing is stored.

    Args:
        features_BPF: Features of the queries.
        matrix: The matrix.
    """
    met_BP1 = (features_BPF * matrix.keys[:, None]).sum(-1, keepdim=True)  # autocast would round it
    return features_BPF @ matrix.values / (met_BP1 + EPSILON), met_BP1
