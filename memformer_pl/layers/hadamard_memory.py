"""A memory that is a matrix for each head, each of whose cells a token strengthens or fades on its own (Stable Hadamard
Memory, Le et al. 2024, arXiv 2410.10132), and the block around it.

B  lanes     L  tokens     D  width     H  heads     K  width of a head     R  rows of the table
"""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.layers.dropout import Keep, add_update, bits_at
from memformer_pl.layers.probe import Probe
from memformer_pl.layers.transformer import BlockConfig, init_weights

EPSILON = 1e-5
"""Added to the sum of the entries of a key."""
CONTENT_GAIN = 0.3
"""Gain of the map to what a calibration depends on, before training: below 1, so that products of hundreds of
calibrations stay near 1."""

Memory = Float[Tensor, "B H K K"]


class Written(NamedTuple):
    """What the tokens of a segment do to memory, and ask it."""

    queries: Float[Tensor, "B L H K"]
    calibrations: Float[Tensor, "B L H K K"] | None
    """By what each cell is multiplied; None if all are kept as they are."""
    updates: Float[Tensor, "B L H K K"]
    """What is added to each cell afterwards."""


class Calibration(nn.Module):
    """By what each token multiplies the cells of memory: ``1 + tanh(outer(theta, c))``, between 0 and 2.

    ``c`` is a linear map of the token, ``theta`` a row of a learned table, another one for each token.

    Args:
        dim: Width of a token.
        heads: Number of matrices.
        rows: Rows of the table.
        centred: Whether the mean of the rows is taken from each.
    """

    no_decay = ("table",)

    def __init__(self, *, dim: int, heads: int, rows: int, centred: bool) -> None:
        super().__init__()
        self.centred = centred
        self.to_content = nn.Linear(dim, dim, bias=False)
        width = dim // heads
        self.table = nn.Parameter(torch.randn(rows, heads, width) * (2 / (rows + width)) ** 0.5)

    def forward(self, x: Float[Tensor, "B L D"], rows: Int[Tensor, "B L"]) -> Float[Tensor, "B L H K K"]:
        """The factors, at least in single precision.

        Args:
            x: Tokens.
            rows: Number of the row of each.
        """
        table = self.table - self.table.mean(0) if self.centred else self.table
        content = rearrange(self.to_content(x), "B L (H K) -> B L H K", H=table.shape[1])
        exact = torch.promote_types(content.dtype, torch.float32)
        return 1 + torch.tanh(outer(table[rows].to(exact), content.to(exact)))


class HadamardMemory(nn.Module):
    """A layer in which each token calibrates the cells of a matrix, writes it, and reads it, for each head.

    The probe ``calibration`` shows the factors of the cells, ``[B, L, H, K, K]``, and ``strength`` eta, ``[B, L, H]``.

    Args:
        dim: Width of a token; a head has ``dim // heads`` of it.
        heads: Number of matrices.
        rows: Rows of the table of the calibration; 0 for no calibration.
        centred: Whether the mean of the rows is taken from each.
    """

    def __init__(self, *, dim: int, heads: int, rows: int, centred: bool) -> None:
        super().__init__()
        self.heads, self.rows = heads, rows
        self.to_query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.to_strength, self.to_out = nn.Linear(dim, heads, bias=False), nn.Linear(dim, dim, bias=False)
        if rows:
            self.calibrate = Calibration(dim=dim, heads=heads, rows=rows, centred=centred)
        self.calibration, self.strength = Probe(), Probe()

    def project(
        self, x: Float[Tensor, "B L D"], rows: Int[Tensor, "B L"] | None, token_mask: Bool[Tensor, "B L"]
    ) -> Written:
        """What tokens do to memory; absent ones leave it bit for bit as it is.

        Args:
            x: Tokens.
            rows: Of the table, one for each token; None without a table.
            token_mask: Which of the tokens exist.
        """
        parts = rearrange(self.to_query_key_value(x), "B L (G H K) -> G B L H K", G=3, H=self.heads)
        exact = torch.promote_types(x.dtype, torch.float32)
        queries, keys, values = parts.to(exact).unbind(0)
        strength = self.strength(self.to_strength(x).to(exact).sigmoid())
        # a product with zero, not a choice between matrices, which would take longer than all else
        strength = strength * token_mask[..., None]
        updates = outer(strength[..., None] * values, positive(keys))
        if rows is None:
            return Written(positive(queries), None, updates)
        factors = self.calibration(self.calibrate(x * token_mask[..., None], rows))
        return Written(positive(queries), factors, updates)

    def forward(self, memory: Memory, written: Written) -> tuple[Float[Tensor, "B L D"], Memory]:
        """The update of each token, and memory after the last."""
        after = list(self._steps(memory, written))
        read = einsum(torch.stack(after, dim=1), written.queries, "B L H V K, B L H K -> B L H V")
        out: Tensor = self.to_out(rearrange(read, "B L H V -> B L (H V)").to(self.to_out.weight.dtype))
        return out, after[-1]

    def write(self, memory: Memory, written: Written) -> Memory:
        """Memory after the last token."""
        return deque(self._steps(memory, written), maxlen=1)[0]

    def _steps(self, memory: Memory, written: Written) -> Iterator[Memory]:
        """Memory after each token; slices by ``unbind``, whose backward writes each of them once."""
        updates = written.updates.unbind(1)
        kept = [None] * len(updates) if written.calibrations is None else written.calibrations.unbind(1)
        for update, factors in zip(updates, kept, strict=True):
            memory = memory + update if factors is None else torch.addcmul(update, factors, memory)
            yield memory


def outer(a: Float[Tensor, "*B V"], b: Float[Tensor, "*B K"]) -> Float[Tensor, "*B V K"]:
    """The product of each entry of ``a`` with each of ``b``."""
    return a[..., :, None] * b[..., None, :]


def positive(x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B K"]:
    """The positive entries as shares of their sum."""
    x = F.relu(x)
    return x / (EPSILON + x.sum(-1, keepdim=True))


def scheduled_rows(
    steps: Int[Tensor, " B"], token_mask: Bool[Tensor, "B L"], *, layer: int, rows: int
) -> Int[Tensor, "B L"]:
    """Rows of a table that look drawn, and are the same whenever a document is read, however it is cut.

    Args:
        steps: Tokens of the document before these.
        token_mask: Which of these exist, at the left.
        layer: Number of the layer; each has rows of its own.
        rows: Number of rows.
    """
    place = steps[:, None] + torch.arange(1, 1 + token_mask.shape[1], device=steps.device)
    return bits_at(place.new_full((1, 1), layer), place) % rows


class HadamardBlock(nn.Module):
    """Pre-norm block: a Hadamard memory, and feed-forward.

    Args:
        config: Sizes.
        rows: Rows of the table of the calibration; 0 for no calibration.
        centred: Whether the mean of the rows is taken from each.
    """

    branches = 2
    """Number of branches whose outputs are dropped in part."""

    def __init__(self, config: BlockConfig, *, rows: int, centred: bool) -> None:
        super().__init__()
        self.memory_norm = nn.LayerNorm(config.dim)
        self.memory = HadamardMemory(dim=config.dim, heads=config.heads, rows=rows, centred=centred)
        self.ffn_norm, self.ffn = nn.LayerNorm(config.dim), config.build_feed_forward()
        init_weights(self)
        if rows:
            with torch.no_grad():
                self.memory.calibrate.to_content.weight.mul_(CONTENT_GAIN)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        carried: tuple[Tensor, ...],
        token_mask: Bool[Tensor, "B L"],
        *,
        keep: Keep | None = None,
    ) -> tuple[Float[Tensor, "B L D"], tuple[Memory, Int[Tensor, " B"]]]:
        """Run the block.

        Args:
            x: Tokens.
            carried: Memory and the number of tokens read before; then, with a table, the row of each token.
            token_mask: Which of the tokens exist, at the left.
            keep: Factors of dropout; by default nothing is dropped.

        Returns:
            The tokens, and memory and the number of tokens read after the last one that exists.
        """
        written, memory, steps = self._enter(x, carried, token_mask)
        update, memory = self.memory(memory, written)
        x = add_update(x, update, keep, 0)
        return add_update(x, self.ffn(self.ffn_norm(x)), keep, 1), (memory, steps)

    def advance(
        self,
        x: Float[Tensor, "B L D"],
        carried: tuple[Tensor, ...],
        token_mask: Bool[Tensor, "B L"],
        *,
        keep: Keep | None = None,
    ) -> tuple[Memory, Int[Tensor, " B"]]:
        """What :meth:`forward` carries on, without reading: nothing of it is dropped."""
        del keep
        written, memory, steps = self._enter(x, carried, token_mask)
        return self.memory.write(memory, written), steps

    def _enter(
        self, x: Float[Tensor, "B L D"], carried: tuple[Tensor, ...], token_mask: Bool[Tensor, "B L"]
    ) -> tuple[Written, Memory, Int[Tensor, " B"]]:
        """What the tokens write, memory before them, and the number of tokens read after them."""
        memory, steps, *chosen = carried
        written = self.memory.project(self.memory_norm(x), chosen[0] if chosen else None, token_mask)
        return written, memory, steps + token_mask.sum(1)
