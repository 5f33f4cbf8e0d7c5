"""A layer whose memory is a matrix for each head (Gated DeltaNet and its kin), and the block around it.

B  lanes     L  tokens     D  width     H  heads     K  width of a key     W  width of a value
P  inputs of a convolution before the first token     C  its channels     G  decays of a head: 1, or K
"""

import math
from functools import partial
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.layers.delta_rule import Writes, read_and_write, write_only
from memformer_pl.layers.dropout import Keep, add_update
from memformer_pl.layers.head_memory import HeadMemory
from memformer_pl.layers.probe import Probe
from memformer_pl.layers.transformer import BlockConfig

RATES, STEPS = (1.0, 16.0), (1e-3, 1e-1)
"""Initial rate and step of the decay, of the first and the last head; a head forgets within ``1 / (rate * step)``
tokens, here 1,000 to 0.6. The public code of Gated DeltaNet draws rates from 0 to 16, and steps from this range."""
RANK, ROOT = 16, 16
"""Of GLA's decay: the rank of its map, and the root that is taken of its sigmoid (arXiv 2312.06635, section 4.4)."""

Gating = tuple[Float[Tensor, "B L H"], Float[Tensor, "B L H G"]]


class Gates(nn.Module):
    """How strongly each token writes, and the logarithm of what it lets memory keep, from the token alone."""

    corrects = True
    """Whether a write replaces what memory holds under its key, and not only adds to it."""

    def forward(self, x: Float[Tensor, "B L D"]) -> Gating:
        """Strength of the write, and logarithm of the decay."""
        raise NotImplementedError


class DeltaGates(Gates):
    """DeltaNet (arXiv 2406.06484): a strength between 0 and 1, and no decay."""

    def __init__(self, *, dim: int, heads: int, key_width: int) -> None:
        super().__init__()
        self.to_strength = nn.Linear(dim, heads, bias=False)

    def forward(self, x: Float[Tensor, "B L D"]) -> Gating:
        """Strength, and zeros."""
        strength = self.to_strength(x).sigmoid()
        return strength, torch.zeros_like(strength)[..., None]


class Steps(nn.Module):
    """The step of each token, above 0, and the decay in that step: ``exp(-rate * step)``, with a rate for each head."""

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        self.to_step = nn.Linear(dim, heads, bias=False)
        self.log_rate = nn.Parameter(torch.linspace(*RATES, heads).log())
        first, last = (math.log(step) for step in STEPS)
        self.step_bias = nn.Parameter(torch.linspace(first, last, heads).exp().expm1().log())  # the inverse of softplus

    def forward(self, x: Float[Tensor, "B L D"]) -> Gating:
        """Steps, and logarithms of the decay."""
        step = F.softplus(self.to_step(x) + self.step_bias)
        return step, (-self.log_rate.exp() * step)[..., None]


class GatedDeltaGates(DeltaGates):
    """Gated DeltaNet: the strength of DeltaNet, and a decay for each head."""

    def __init__(self, *, dim: int, heads: int, key_width: int) -> None:
        super().__init__(dim=dim, heads=heads, key_width=key_width)
        self.steps = Steps(dim=dim, heads=heads)

    def forward(self, x: Float[Tensor, "B L D"]) -> Gating:
        """Strength, and logarithm of the decay."""
        return self.to_strength(x).sigmoid(), self.steps(x)[1]


class MambaGates(Gates):
    """The decay of Mamba-2 (arXiv 2405.21060): one for each head, with the step as the strength of the write."""

    corrects = False

    def __init__(self, *, dim: int, heads: int, key_width: int) -> None:
        super().__init__()
        self.steps = Steps(dim=dim, heads=heads)

    def forward(self, x: Float[Tensor, "B L D"]) -> Gating:
        """The step, and the logarithm of the decay in it."""
        step, log_decay = self.steps(x)
        return step, log_decay


class GLAGates(Gates):
    """Gated linear attention (arXiv 2312.06635): a decay for each entry of a key, and writes of strength 1."""

    corrects = False

    def __init__(self, *, dim: int, heads: int, key_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.down, self.up = nn.Linear(dim, RANK, bias=False), nn.Linear(RANK, heads * key_width)

    def forward(self, x: Float[Tensor, "B L D"]) -> Gating:
        """Ones, and the logarithm of the decay."""
        log_decay = rearrange(F.logsigmoid(self.up(self.down(x))) / ROOT, "B L (H K) -> B L H K", H=self.heads)
        return torch.ones_like(log_decay[..., 0]), log_decay


Update = Literal["gated_delta", "delta", "gla", "mamba2"]
GATES: dict[str, type[DeltaGates | GLAGates | MambaGates]] = {
    "gated_delta": GatedDeltaGates,
    "delta": DeltaGates,
    "gla": GLAGates,
    "mamba2": MambaGates,
}
"""The values of ``update``."""


class Projected(NamedTuple):
    """What the tokens of a segment read and write with."""

    queries: Float[Tensor, "B H L K"]
    writes: Writes
    inputs: Float[Tensor, "B P C"]
    """The last inputs of the convolution."""


class MatrixMemory(HeadMemory):
    """A layer in which each token writes a matrix and reads it, for each head.

    Args:
        dim: Width of a token; a value has the width ``dim // heads``.
        heads: Number of matrices.
        key_width: Width of a key, and number of rows of a matrix.
        update: How memory is written.
        chunk: Tokens that are computed at once.
    """

    def __init__(self, *, dim: int, heads: int, key_width: int, update: Update, chunk: int) -> None:
        gates = partial(GATES[update], dim=dim, heads=heads, key_width=key_width)
        super().__init__(dim=dim, heads=heads, key_width=key_width, gates=gates)
        self.chunk, self.corrects = chunk, GATES[update].corrects
        self.strength, self.decay = Probe(), Probe()

    def project(
        self, x: Float[Tensor, "B L D"], inputs: Float[Tensor, "B P C"], token_mask: Bool[Tensor, "B L"]
    ) -> Projected:
        """What the tokens read and write with; absent ones write nothing."""
        queries, keys, values, inputs = self.split(x, inputs, token_mask)
        strength, log_decay = self.gates(x)
        strength, log_decay = rearrange(strength, "B L H -> B H L 1"), rearrange(log_decay, "B L H G -> B H L G")
        writes = Writes(keys, values, strength, log_decay).masked(token_mask)
        self.strength(writes.strength)
        if self.decay.watched:
            self.decay(writes.log_decay.exp())
        return Projected(queries, writes, inputs)

    def forward(
        self, x: Float[Tensor, "B L D"], memory: Float[Tensor, "B H K W"], projected: Projected
    ) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B H K W"]]:
        """The update of each token, and memory after the last."""
        corrects = self.corrects
        read, memory = read_and_write(memory, projected.queries, projected.writes, corrects=corrects, chunk=self.chunk)
        return self.output(x, read), memory

    def write(self, memory: Float[Tensor, "B H K W"], projected: Projected) -> Float[Tensor, "B H K W"]:
        """Memory after the last token."""
        return write_only(memory, projected.writes, corrects=self.corrects, chunk=self.chunk)


Carried = tuple[Float[Tensor, "B H K W"], Float[Tensor, "B P C"]]
"""Memory, and the last inputs of the convolution."""


class MatrixMemoryBlock(nn.Module):
    """Pre-norm block: a matrix memory, and feed-forward."""

    branches = 2
    """Number of branches whose outputs are dropped in part."""

    def __init__(self, config: BlockConfig, *, key_width: int, update: Update, chunk: int) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.memory_norm = nn.LayerNorm(dim)
        self.memory = MatrixMemory(dim=dim, heads=heads, key_width=key_width, update=update, chunk=chunk)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), config.build_feed_forward()

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        carried: Carried,
        token_mask: Bool[Tensor, "B L"],
        *,
        keep: Keep | None = None,
    ) -> tuple[Float[Tensor, "B L D"], Carried]:
        """Run the block.

        Args:
            x: Tokens.
            carried: Before the first of them.
            token_mask: Which of them exist, at the left.
            keep: Factors of dropout; by default nothing is dropped.

        Returns:
            The tokens, and what is carried after the last one that exists.
        """
        memory, inputs = carried
        normed = self.memory_norm(x)
        projected = self.memory.project(normed, inputs, token_mask)
        update, memory = self.memory(normed, memory, projected)
        x = add_update(x, update, keep, 0)
        return add_update(x, self.ffn(self.ffn_norm(x)), keep, 1), (memory, projected.inputs)

    def advance(
        self,
        x: Float[Tensor, "B L D"],
        carried: Carried,
        token_mask: Bool[Tensor, "B L"],
        *,
        keep: Keep | None = None,
    ) -> Carried:
        """What :meth:`forward` carries on, without reading: nothing of it is dropped."""
        del keep
        memory, inputs = carried
        projected = self.memory.project(self.memory_norm(x), inputs, token_mask)
        return self.memory.write(memory, projected), projected.inputs
