"""A cache whose tokens also attend to the tokens after them (LaMemo, Ji et al. 2022, section 3).

B  lanes     L  tokens in a segment     M  cached tokens     W  keys of the look-ahead     D  width     H  heads
K  width of a head
"""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from memformer_pl.layers.attention import Positions
from memformer_pl.layers.relative_attention import RelativeBlock, mix
from memformer_pl.layers.transformer import BlockConfig

AHEAD = 1
"""Tokens of the present segment that cached tokens may see: the first one, which every query of the segment sees."""


class RunningSoftmax(NamedTuple):
    """Attention over the keys seen so far, in a form in which more keys can be merged."""

    context: Float[Tensor, "B L D"]
    """The weighted mean of the values, heads side by side."""
    log_sum: Float[Tensor, "B L H"]
    """Logarithm of the sum of the exponentials of all scores."""


class LookAheadBlock(RelativeBlock):
    """A relative block whose cached tokens attend to the tokens after them.

    The attention of a cached token to new keys is merged with its earlier attention, as one softmax over all keys.
    Tokens before and after have a distance bias each, and distances have no sign: the paper's disentangled relative
    positions.
    """

    no_decay = ("ahead_bias",)

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        self.ahead_bias = nn.Parameter(torch.zeros_like(self.self_attention.distance_bias))

    def refresh(
        self,
        cached: Float[Tensor, "B M D"],
        x: Float[Tensor, "B L D"],
        past: RunningSoftmax,
        *,
        at: Positions,
        ahead_visible: Bool[Tensor, "B 1 M W"],
        keep: Float[Tensor, "N B M+L D"] | None = None,
    ) -> tuple[Float[Tensor, "B M D"], Float[Tensor, "B L D"], RunningSoftmax]:
        """Run the block on cached and present tokens; return both, and the attention of both.

        Args:
            cached: Inputs of this block at the cached tokens, refreshed by the blocks below.
            x: Inputs of this block at the tokens of the segment.
            past: Earlier attention of the cached tokens.
            at: Mask of the present tokens over cache and segment; sinusoids of distances.
            ahead_visible: Which of the last ``W`` tokens, up to the first of the segment, each cached token may see.
            keep: Factors of dropout, of cached and present tokens; by default nothing is dropped.
        """
        rows, both = cached.shape[1], torch.cat((cached, x), dim=1)
        normed = self.self_norm(both)
        query_BHSK, key_BHSK, value_BHSK = self.self_attention.project(normed, normed)
        assert at.visible is not None
        scores_BHLS = self.self_attention.scores(query_BHSK[:, :, rows:], key_BHSK, at.distances)
        present = self._attend(scores_BHLS, value_BHSK, at.visible)
        window = slice(rows + AHEAD - ahead_visible.shape[-1], rows + AHEAD)
        scores_BHMW = self._ahead_scores(query_BHSK[:, :, :rows], key_BHSK[:, :, window])
        merged = merge(past, self._attend(scores_BHMW, value_BHSK[:, :, window], ahead_visible))
        attended = RunningSoftmax(*(torch.cat(pair, dim=1) for pair in zip(merged, present, strict=True)))
        both = self.finish(both, self.self_attention.to_out(attended.context), keep)
        return both[:, :rows], both[:, rows:], attended

    def _ahead_scores(
        self, query_BHMK: Float[Tensor, "B H M K"], key_BHWK: Float[Tensor, "B H W K"]
    ) -> Float[Tensor, "B H M W"]:
        """Scores of cached tokens for keys that end with the first of the segment; in blocks of ``W`` queries.

        A block has few distances to the keys; all queries at once would have ``M + W``, and so a cost of ``M^2``.
        """
        rows, keys, by_distance = query_BHMK.shape[2], key_BHWK.shape[2], []
        for n, block_BHQK in enumerate(torch.split(query_BHMK, keys, dim=2), start=1):
            nearest = rows + AHEAD + 1 - keys - min(n * keys, rows)
            distances = torch.arange(nearest, nearest + keys + block_BHQK.shape[2] + 1, device=key_BHWK.device).abs()
            by_distance.append(
                self.self_attention.distance_scores(block_BHQK, distances, keys=keys, bias=self.ahead_bias)
            )
        return self.self_attention.content_scores(query_BHMK, key_BHWK) + torch.cat(by_distance, dim=2)

    def _attend(
        self,
        scores_BHLS: Float[Tensor, "B H L S"],
        value_BHSK: Float[Tensor, "B H S K"],
        visible: Bool[Tensor, "B 1 L S"],
    ) -> RunningSoftmax:
        # sums that are merged over many segments need more digits than bfloat16 has
        scores_BHLS = scores_BHLS.to(torch.promote_types(scores_BHLS.dtype, torch.float32))
        scores_BHLS = scores_BHLS.masked_fill(~visible, -torch.inf)
        context = mix(scores_BHLS.softmax(dim=-1).to(value_BHSK.dtype), value_BHSK)
        return RunningSoftmax(context, rearrange(scores_BHLS.logsumexp(dim=-1), "B H L -> B L H"))


def merge(past: RunningSoftmax, ahead: RunningSoftmax) -> RunningSoftmax:
    """Merge earlier attention with attention to new keys, as one softmax over the keys of both.

    No gradient flows into the earlier attention (the paper's stop-gradient).
    """
    old, new = (rearrange(each.context, "B M (H K) -> B M H K", H=each.log_sum.shape[-1]) for each in (past, ahead))
    share = rearrange((past.log_sum.detach() - ahead.log_sum).sigmoid(), "B M H -> B M H 1")
    context = rearrange(share * old.detach() + (1 - share) * new, "B M H K -> B M (H K)")
    return RunningSoftmax(context.to(new.dtype), torch.logaddexp(past.log_sum.detach(), ahead.log_sum))


def ahead_mask(arrived: Int[Tensor, " B"], *, cached: int, most: int) -> Bool[Tensor, "B 1 M W"]:
    """Which of the last ``W`` tokens, up to the first of the present segment, each cached token may see: those after it
    that it has not seen yet.

    Args:
        arrived: Number of tokens of the previous segment, of which the cache has seen the first.
        cached: Number of rows of the cache.
        most: The most tokens of a segment; at most as many keys are new.
    """
    width = min(most - 1, cached) + AHEAD
    positions_W = torch.arange(width, device=arrived.device)
    after_MW = positions_W - width + AHEAD > torch.arange(-cached, 0, device=arrived.device)[:, None]
    # rows that are not filled attend too, since a softmax over nothing is NaN
    fresh_BW = positions_W > width - AHEAD - arrived.clamp(min=1)[:, None]
    return (fresh_BW[:, None] & after_MW)[:, None]
