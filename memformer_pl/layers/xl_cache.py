"""XL caches: the last ``M`` rows of each lane, right-aligned, and the number of filled ones.

B  lanes     L  rows that are new     M  rows of the cache     R  rows of both     T  segments of a rollout     D  width
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from memformer_pl.contract import ABSENT, Segment
from memformer_pl.contract.reset import keep_lanes_without_tokens, reset_at_document_start

EMPTY = 0
"""The number of a row that is not filled."""


def push(
    cache: Num[Tensor, "B *N M D"], new: Num[Tensor, "B *N L D"], arrived: Int[Tensor, " B"]
) -> Num[Tensor, "B *N M D"]:
    """The last ``M`` rows of the cache followed by the first ``arrived`` new rows of each lane, without a graph.

    Source: ``[SG(m) o h]`` of Dai et al. 2019, lane by lane, since lanes may be ragged.
    """
    return push_with_graph(cache.detach(), new.detach(), arrived)


def push_with_graph(
    cache: Num[Tensor, "B *N M D"], new: Num[Tensor, "B *N L D"], arrived: Int[Tensor, " B"]
) -> Num[Tensor, "B *N M D"]:
    """As :func:`push`, with the graph of the rows."""
    return rows_after(torch.cat((cache, new.to(cache.dtype)), dim=-2), arrived, rows=cache.shape[-2])


def rows_after(both: Num[Tensor, "B *N R D"], arrived: Int[Tensor, " B"], *, rows: int) -> Num[Tensor, "B *N M D"]:
    """Of a cache of ``rows`` rows and new ones behind it, the last ``rows`` before those that did not arrive."""
    index_BM = torch.arange(rows, device=both.device) + arrived[:, None]
    return both.take_along_dim(index_BM.view(len(both), *[1] * (both.dim() - 3), rows, 1), dim=-2)


def filled_part(filled: Int[Tensor, " B"], *, rows: int) -> Bool[Tensor, "B M"]:
    """Which rows of a cache are filled: the last ``filled``."""
    return torch.arange(rows, device=filled.device) >= rows - filled[:, None]


def cached_and_causal(cached: Bool[Tensor, "B M"], *, length: int) -> Bool[Tensor, "B 1 L M+L"]:
    """Mask of ``length`` tokens over the cache and their segment: filled rows, and tokens up to their own position."""
    causal = torch.ones(length, length, dtype=torch.bool, device=cached.device).tril()
    both = torch.cat((cached[:, None].expand(-1, length, -1), causal.expand(len(cached), -1, -1)), dim=-1)
    return both[:, None]


class CacheNumbers(NamedTuple):
    """What caches hold, as numbers of rows: the state of a model with XL caches, without the rows themselves."""

    rows: Int[Tensor, "B M 1"]
    """``EMPTY``, or the number of a row that :func:`take_rows` looks up."""
    last: Int[Tensor, " B"]
    """The last token, still to be read."""


def follow_caches(
    segments: Sequence[Segment], entering: CacheNumbers, last: Sequence[Int[Tensor, " B"]]
) -> list[CacheNumbers]:
    """What the caches hold at each segment of a rollout and after the last, computed from masks and starts alone.

    Args:
        segments: The segments; all of the same shape.
        entering: From :func:`number_caches`.
        last: The last token of each segment.
    """
    lanes, length = segments[0].tokens.shape
    rows = entering.rows.shape[1]
    initial = CacheNumbers(torch.full_like(entering.rows, EMPTY), torch.full_like(entering.last, ABSENT))
    first = 1 + lanes * rows
    new_TBL1 = torch.arange(first, first + len(segments) * lanes * length, device=entering.rows.device)
    new_TBL1 = new_TBL1.view(-1, lanes, length, 1)
    arrived_TB = torch.stack([segment.token_mask for segment in segments]).sum(2)
    numbers = [entering]
    for segment, new, arrived, token in zip(segments, new_TBL1, arrived_TB, last, strict=True):
        numbers[-1] = reset_at_document_start(segment, initial, numbers[-1])
        pushed = CacheNumbers(push(numbers[-1].rows, new, arrived), token)
        numbers.append(keep_lanes_without_tokens(segment, pushed, numbers[-1]))
    return numbers


def number_caches(filled: Int[Tensor, " B"], last: Int[Tensor, " B"], *, rows: int) -> CacheNumbers:
    """The numbers of the rows that enter a rollout: from 1, lane by lane."""
    numbers = torch.arange(1, 1 + len(filled) * rows, device=filled.device).view(len(filled), rows)
    return CacheNumbers(numbers.where(filled_part(filled, rows=rows), EMPTY)[..., None], last)


def take_rows(
    numbers: Int[Tensor, "*any"], cache: Float[Tensor, "B M D"], new: Float[Tensor, "R L D"]
) -> Float[Tensor, "*any D"]:
    """Look up rows by number, without a graph: first ``EMPTY``, zeros; then those of the cache that entered the
    rollout; then those that are new, segment by segment."""
    empty = cache.new_zeros(1, cache.shape[-1])
    table = torch.cat((empty, cache.detach().flatten(0, 1), new.detach().to(cache.dtype).flatten(0, 1)))
    return table.index_select(0, numbers.flatten()).view(*numbers.shape, cache.shape[-1])
