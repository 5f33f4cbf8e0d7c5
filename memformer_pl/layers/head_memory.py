"""What layers with a memory for each head share: queries, keys and values that pass a short convolution, and a norm and
a gate on what is read.

B  lanes     L  tokens     D  width     H  heads     K  width of a key     W  width of a value
P  inputs of a convolution before the first token     C  its channels
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.layers.short_convolution import ShortConvolution

EPSILON = 1e-6
"""Added to the mean square of what a head reads, as in other norms."""


class Heads(NamedTuple):
    """What the heads of a layer take from tokens."""

    queries: Float[Tensor, "B H L K"]
    """Of unit length."""
    keys: Float[Tensor, "B H L K"]
    """Of unit length."""
    values: Float[Tensor, "B H L W"]
    inputs: Float[Tensor, "B P C"]
    """The last inputs of the convolution."""


class HeadMemory(nn.Module):
    """The maps of a layer in which each head reads and writes a memory.

    The norm of what a head reads hides how much it holds; the gate is how a token leaves it unread.

    Args:
        dim: Width of a token; a value has the width ``dim // heads``.
        heads: Number of memories.
        key_width: Width of a key.
        gates: Builds the module that says how each token writes.
    """

    def __init__(self, *, dim: int, heads: int, key_width: int, gates: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.widths = [heads * key_width, heads * key_width, dim]
        self.to_query_key_value = nn.Linear(dim, sum(self.widths), bias=False)
        self.convolution = ShortConvolution(channels=sum(self.widths))
        self.gates = gates()
        self.to_gate, self.to_out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.scale = nn.Parameter(torch.ones(dim // heads))

    def split(
        self, x: Float[Tensor, "B L D"], inputs: Float[Tensor, "B P C"], token_mask: Bool[Tensor, "B L"]
    ) -> Heads:
        """What each head takes from tokens.

        Args:
            x: Tokens.
            inputs: Of the convolution, before the first of them.
            token_mask: Which of them exist, at the left.
        """
        mixed, inputs = self.convolution(self.to_query_key_value(x), inputs, token_mask.sum(1))
        queries, keys, values = (
            rearrange(part, "B L (H K) -> B H L K", H=self.heads) for part in mixed.split(self.widths, dim=2)
        )
        return Heads(F.normalize(queries, dim=-1), F.normalize(keys, dim=-1), values, inputs)

    def output(self, x: Float[Tensor, "B L D"], read: Float[Tensor, "B H L W"]) -> Float[Tensor, "B L D"]:
        """The update of tokens from what their heads read."""
        normed = rearrange(F.rms_norm(read, read.shape[-1:], eps=EPSILON) * self.scale, "B H L W -> B L (H W)")
        out: Tensor = self.to_out((normed * F.silu(self.to_gate(x))).to(x.dtype))
        return out
