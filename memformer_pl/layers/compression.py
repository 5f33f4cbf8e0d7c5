"""Compress blocks of old rows to one row each (Compressive Transformer, Rae et al. 2019, section 3.2).

B  lanes     L  old rows     P  compressed rows     D  width
"""

from itertools import count
from math import gcd
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.errors import LARGEST, UsageError, require_sizes

Pooling = Literal["max", "mean", "conv", "dilated_conv", "most_used"]


def check_compression(pooling: str, rate: int) -> None:
    """Raise a ``UsageError`` for an unknown way of pooling, or a rate out of range, in the words of the model."""
    if pooling not in get_args(Pooling):
        raise UsageError(f"compressor must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
    require_sizes(most=LARGEST, compression=rate)


class Compressor(nn.Module):
    """Compress each block of ``rate`` rows to one row; rows that do not fill a block are dropped.

    ``max`` and ``mean`` pool each channel, ``conv`` is a convolution over each block, ``dilated_conv`` reaches into the
    neighbouring blocks. ``most_used`` keeps the row of each block that is attended to most (the paper sorts all old
    rows at once; here each row still stands for its block).

    Ours, where the paper is silent: the dilation is the smallest that reads every row, convolutions have no bias and
    are initialised as a mean.

    Args:
        pooling: ``max``, ``mean``, ``conv``, ``dilated_conv`` or ``most_used``.
        dim: Width of a row.
        rate: Number of rows that become one.
    """

    def __init__(self, *, pooling: Pooling, dim: int, rate: int) -> None:
        super().__init__()
        check_compression(pooling, rate)
        self.pooling, self.rate = pooling, rate
        if pooling.endswith("conv"):
            dilation = next(d for d in count(2) if gcd(d, rate) == 1) if pooling == "dilated_conv" else 1
            self.conv = nn.Conv1d(dim, dim, kernel_size=rate, stride=rate, dilation=dilation, bias=False)
            with torch.no_grad():
                self.conv.weight.copy_(torch.eye(dim)[..., None].expand(-1, -1, rate) / rate)

    def forward(self, old: Float[Tensor, "B L D"], usage: Float[Tensor, "B L"] | None = None) -> Float[Tensor, "B P D"]:
        """The compressed rows, oldest first.

        Args:
            old: Old rows, oldest first; zeros where a lane has fewer than others.
            usage: Attention that each row gets; required by ``most_used``.
        """
        rows_BDL = rearrange(old, "B L D -> B D L")
        if self.pooling == "max":
            rows_BDP = F.max_pool1d(rows_BDL, self.rate)
        elif self.pooling == "mean":
            rows_BDP = F.avg_pool1d(rows_BDL, self.rate)
        elif self.pooling == "most_used":
            assert usage is not None, "most_used needs usage"
            used = F.max_pool1d(usage, self.rate, return_indices=True)[1]
            rows_BDP = rows_BDL.take_along_dim(used[:, None], dim=-1)
        else:
            spread = (self.conv.dilation[0] - 1) * (self.rate - 1)
            rows_BDP = self.conv(F.pad(rows_BDL, (spread // 2, spread - spread // 2)))
        return rearrange(rows_BDP, "B D P -> B P D")
