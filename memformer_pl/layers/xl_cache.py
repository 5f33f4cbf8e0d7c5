"""XL caches: the last ``M`` rows of each lane, right-aligned, and the number of filled ones.

B  lanes     L  rows that are new     M  rows of the cache
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def push(
    cache: Float[Tensor, "B *N M D"], new: Float[Tensor, "B *N L D"], arrived: Int[Tensor, " B"]
) -> Float[Tensor, "B *N M D"]:
    """The last ``M`` rows of the cache followed by the first ``arrived`` new rows of each lane, without a graph.

    Source: ``[SG(m) o h]`` of Dai et al. 2019, lane by lane, since lanes may be ragged.
    """
    rows = cache.shape[-2]
    index_BM = torch.arange(rows, device=cache.device) + arrived[:, None]
    both = torch.cat((cache.detach(), new.detach().to(cache.dtype)), dim=-2)
    return both.take_along_dim(index_BM.view(len(cache), *[1] * (cache.dim() - 3), rows, 1), dim=-2)


def filled_part(filled: Int[Tensor, " B"], *, rows: int) -> Bool[Tensor, "B M"]:
    """Which rows of a cache are filled: the last ``filled``."""
    return torch.arange(rows, device=filled.device) >= rows - filled[:, None]


def cached_and_causal(cached: Bool[Tensor, "B M"], *, length: int) -> Bool[Tensor, "B 1 L M+L"]:
    """Mask of ``length`` tokens over the cache and their segment: filled rows, and tokens up to their own position."""
    causal = torch.ones(length, length, dtype=torch.bool, device=cached.device).tril()
    both = torch.cat((cached[:, None].expand(-1, length, -1), causal.expand(len(cached), -1, -1)), dim=-1)
    return both[:, None]
