"""A layer that sees the last tokens, older ones as a fading memory has summed them up, and a few that it has stored
(B'MOJO, Zancato et al. 2024, arXiv 2407.06324), and the block around it.

B  lanes     L  tokens     D  width     H  heads     K  width of a head     W  tokens of the window     M  stored tokens
F  rows that fade: 2 W     S  rows of a window and the tokens behind it: W + L, or F + L     C  candidates: M + L
E  errors that are carried: M + W, or 0     R  numbers of a row: D, or 2 D as keys and values
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.contract import ABSENT
from memformer_pl.layers.attention import SelfAttention, split_heads
from memformer_pl.layers.dropout import Keep, add_update, bits_at
from memformer_pl.layers.probe import Probe
from memformer_pl.layers.relative_attention import mix
from memformer_pl.layers.rotary import RotaryPositions
from memformer_pl.layers.transformer import BlockConfig, init_weights
from memformer_pl.layers.xl_cache import rows_after

TIME_SCALES = (2.0, 512.0)
"""Tokens within which the first and the last channel of a fading memory forget, before training."""

Picks = Literal["innovation", "first", "random", "recent"]


class FadingMemory(nn.Module):
    """A gated diagonal state-space model: ``h <- a h + (1 - a) W x``, and each token returns ``y = V h``.

    ``a`` is ``sigmoid(U x + b)``, one for each channel; ``b`` begins spread over time scales.

    Args:
        dim: Width of a token, and of ``h``.
    """

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.to_decay = nn.Linear(dim, dim)
        self.to_hidden, self.to_out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    @torch.no_grad()
    def spread(self) -> None:
        """Spread the time scales of the channels evenly, on a logarithmic scale."""
        first, last = map(math.log, TIME_SCALES)
        scales = torch.linspace(first, last, len(self.to_decay.bias)).exp()
        self.to_decay.bias.copy_((scales - 1).log())

    def forward(
        self, x: Float[Tensor, "B L D"], hidden: Float[Tensor, "B D"], token_mask: Bool[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B L+1 D"], Float[Tensor, "B D"]]:
        """``y`` before the first token and after each, and ``h`` after the last; absent tokens leave it as it is."""
        exact = hidden.dtype
        decays = self.to_decay(x).to(exact).sigmoid().masked_fill(~token_mask[..., None], 1)
        after = [hidden]
        # slices by unbind, whose backward writes each of them once
        for decay, entering in zip(decays.unbind(1), self.to_hidden(x).to(exact).unbind(1), strict=True):
            hidden = torch.lerp(entering, hidden, decay)
            after.append(hidden)
        return self.to_out(torch.stack(after, dim=1).to(self.to_out.weight.dtype)), hidden


class Rows(NamedTuple):
    """Tokens that attention may see, as they are carried or as keys and values; the oldest first."""

    recent: Float[Tensor, "B S R"]
    """The window before the tokens, and the tokens."""
    faded: Float[Tensor, "B S R"]
    """What the fading memory returned, at tokens ``W`` earlier than those of ``recent``."""
    stored: Float[Tensor, "B M R"]


class EideticAttention(SelfAttention):
    """Attention with one softmax over the last ``window`` tokens, over what a fading memory returned at as many tokens
    before them, and over stored tokens.

    One projection makes the keys and values of all three. Rotary positions are those of tokens; a stored token stands
    at distance ``2 window`` from every query. The probe ``weights`` shows ``[B, H, L, S]``, in the order of
    :class:`Rows`, and behind them the tokens that may be stored meanwhile.

    Args:
        dim: Width of tokens.
        heads: Must divide ``dim`` into even widths.
        window: Tokens that are seen as they are, the present one included.
        segment_length: The most tokens of a call.
    """

    def __init__(self, *, dim: int, heads: int, window: int, segment_length: int) -> None:
        super().__init__(dim=dim, heads=heads)
        self.window = window
        self.rotary = RotaryPositions(width=dim // heads, first=-2 * window, last=max(segment_length, 2 * window))

    def look(
        self,
        x: Float[Tensor, "B L D"],
        rows: Rows,
        steps: Int[Tensor, " B"],
        held: Bool[Tensor, "B L C"] | None,
        place: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        """The update of tokens.

        Args:
            x: Tokens.
            rows: Keys and values, from :meth:`side_by_side`.
            steps: Tokens of the document before these.
            held: Which candidates each token sees: the stored ones, then the first ``L`` recent ones; None for no
                candidates.
            place: Tokens of the segment before these, by default none: rotations are rounded, so a token must have
                the same one in a segment and in a piece of it.
        """
        length, window = x.shape[1], self.window
        query = split_heads(F.linear(x, self.to_query_key_value.weight[: x.shape[2]]), heads=self.heads)
        query = query.transpose(1, 2) * (x.shape[2] / self.heads) ** -0.5
        recent = self.rotary.span(-window, length, place)
        faded = self.rotary.span(-2 * window, length - window, place)
        (recent_keys, recent_values), (faded_keys, faded_values) = map(self.as_heads, rows[:2])
        keys = torch.cat((recent.turn_heads(recent_keys), faded.turn_heads(faded_keys)), dim=2)
        scores = recent.rows(slice(window, None)).turn_heads(query) @ keys.mT
        scores = scores.masked_fill(~self.visible(steps, length)[:, None], -torch.inf)
        values = [recent_values, faded_values]
        if held is not None:
            stored_keys, stored_values = self.as_heads(rows.stored)
            keys = torch.cat((stored_keys, recent_keys[:, :, :length]), dim=2)
            far = self.rotary.span(2 * window, 2 * window + 1).turn_heads(query) @ keys.mT
            scores = torch.cat((scores, far.masked_fill(~held[:, None], -torch.inf)), dim=3)
            values += [stored_values, recent_values[:, :, :length]]
        weights = self.weights(scores.softmax(dim=-1))
        out: Tensor = self.to_out(mix(weights, torch.cat(values, dim=2)))
        return out

    def visible(self, steps: Int[Tensor, " B"], length: int) -> Bool[Tensor, "B L seen"]:
        """Which recent rows, and then which faded ones, each token sees: those of the document, ``W`` of each."""
        row = torch.arange(self.window + length, device=steps.device)
        token = torch.arange(length, device=steps.device)[:, None]
        near = (row > token) & (row <= token + self.window)
        recent, faded = (steps[:, None] + row >= many * self.window for many in (1, 2))
        # a token that does not exist sees itself, since a softmax over nothing is NaN
        return torch.cat([near & exists[:, None] for exists in (recent, faded)], dim=2)


def held_after_each(priority: Num[Tensor, "B C"], places: Int[Tensor, "B C"], *, rows: int) -> Bool[Tensor, "B C C"]:
    """Which candidates are held when each of them has come: of those up to it, the ``rows`` of highest priority, the
    earlier of equals. No sort of equal numbers is in it, so it is the same on every device.

    Args:
        priority: Of each candidate.
        places: Of each in its document, in order; ``ABSENT`` where there is none.
        rows: The most that are held.
    """
    exists = places != ABSENT
    before, after = priority[:, :, None], priority[:, None]
    earlier = places[:, :, None] < places[:, None]
    beats = ((before > after) | ((before == after) & earlier)) & exists[:, :, None]
    number = torch.arange(places.shape[1], device=places.device)
    return (beats.cumsum(1, dtype=torch.int32) < rows) & (number <= number[:, None]) & exists[:, None]


class EideticCarried(NamedTuple):
    """What a block carries from token to token."""

    hidden: Float[Tensor, "B D"]
    """Of the fading memory; at least float32."""
    recent: Float[Tensor, "B W R"]
    """The last tokens, right-aligned, as they enter attention."""
    faded: Float[Tensor, "B F R"]
    """What the fading memory returned at the last tokens, right-aligned."""
    stored: Float[Tensor, "B M R"]
    """Stored tokens, right-aligned, in the order of their document."""
    places: Int[Tensor, "B M"]
    """Of stored tokens in their document; ``ABSENT`` where there is none."""
    errors: Float[Tensor, "B E"]
    """Of the prediction of stored tokens, and then of the last tokens; at least float32."""
    steps: Int[Tensor, " B"]
    """Tokens of the document so far."""


class Joined(NamedTuple):
    """What is carried, and the tokens behind it."""

    recent: Float[Tensor, "B S R"]
    faded: Float[Tensor, "B S R"]
    stored: Float[Tensor, "B M R"]
    """Before the tokens. Candidates are these and the first ``L`` of ``recent``; none if nothing is stored."""
    places: Int[Tensor, "B C"]
    """Of candidates."""
    errors: Float[Tensor, "B e"]
    held: Bool[Tensor, "B C C"]
    """From :func:`held_after_each`."""


class EideticBlock(nn.Module):
    """Pre-norm block: attention to what is recent, faded and stored, and feed-forward.

    A token is a candidate from the moment at which it leaves the window. The probe ``innovation`` shows the error of
    the prediction of each token, ``[B, L]``, and ``held`` which candidates each token sees, ``[B, L, C]``.

    Args:
        config: Sizes.
        window: Tokens that are seen as they are.
        stored: The most tokens that are stored.
        picks: Which are: those of the largest error, the first ones, the last ones, or some by their places alone.
        layer: Number of the block in its model.
        segment_length: The most tokens of a call.
    """

    branches = 2
    """Number of branches whose outputs are dropped in part."""

    def __init__(
        self, config: BlockConfig, *, window: int, stored: int, picks: Picks, layer: int, segment_length: int
    ) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.window, self.stored, self.picks, self.layer = window, stored, picks, layer
        self.predicts = stored > 0 and picks == "innovation"
        self.memory_norm, self.fading = nn.LayerNorm(dim), FadingMemory(dim=dim)
        self.attention = EideticAttention(dim=dim, heads=heads, window=window, segment_length=segment_length)
        if self.predicts:
            self.predict = nn.Linear(dim, dim, bias=False)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), config.build_feed_forward()
        self.innovation, self.held = Probe(), Probe()
        init_weights(self)
        self.fading.spread()

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        carried: tuple[Tensor, ...],
        token_mask: Bool[Tensor, "B L"],
        *,
        keep: Keep | None = None,
    ) -> tuple[Float[Tensor, "B L D"], tuple[Tensor, ...]]:
        """Run the block.

        Args:
            x: Tokens.
            carried: :class:`EideticCarried` before the first of them.
            token_mask: Which of the tokens exist, at the left.
            keep: Factors of dropout; by default nothing is dropped.

        Returns:
            The tokens, and what is carried after the last one that exists; behind it, where tokens are predicted, the
            errors ``[B, L]``, whose gradient reaches the predictor alone.
        """
        before, normed = EideticCarried(*carried), self.memory_norm(x)
        faded, errors, hidden = self._hear(normed, before, token_mask)
        joined = self._join(before, normed, faded, errors.detach())
        rows = Rows(*map(self.attention.side_by_side, seen_rows(joined)))
        x = add_update(x, self.attention.look(normed, rows, before.steps, self._held(joined)), keep, 0)
        after = self._after(joined, hidden, before.steps, token_mask)
        return add_update(x, self.ffn(self.ffn_norm(x)), keep, 1), (*after, errors) if self.predicts else after

    def advance(
        self,
        x: Float[Tensor, "B L D"],
        carried: tuple[Tensor, ...],
        token_mask: Bool[Tensor, "B L"],
        *,
        keep: Keep | None = None,
    ) -> EideticCarried:
        """What :meth:`forward` carries on, without attention: nothing of it is dropped."""
        del keep
        before, normed = EideticCarried(*carried), self.memory_norm(x)
        faded, errors, hidden = self._hear(normed, before, token_mask)
        joined = self._join(before, normed, faded, errors.detach())
        return self._after(joined, hidden, before.steps, token_mask)

    def decode(
        self,
        x: Float[Tensor, "B L D"],
        carried: tuple[Tensor, ...],
        token_mask: Bool[Tensor, "B L"],
        place: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B L D"], EideticCarried]:
        """Run the block on the next tokens of a segment, whose rows are keys and values; ``place`` counts the tokens of
        the segment before them."""
        before, normed = EideticCarried(*carried), self.memory_norm(x)
        faded, errors, hidden = self._hear(normed, before, token_mask)
        as_rows = self.attention.side_by_side
        joined = self._join(before, as_rows(normed), as_rows(faded), errors)
        x = x + self.attention.look(normed, seen_rows(joined), before.steps, self._held(joined), place)
        return x + self.ffn(self.ffn_norm(x)), self._after(joined, hidden, before.steps, token_mask)

    def as_keys_values(self, carried: EideticCarried) -> EideticCarried:
        """What is carried, with rows as :meth:`decode` takes them."""
        recent, faded, stored = map(self.attention.side_by_side, (carried.recent, carried.faded, carried.stored))
        return carried._replace(recent=recent, faded=faded, stored=stored)

    def _hear(
        self, normed: Float[Tensor, "B L D"], before: EideticCarried, token_mask: Bool[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B e"], Float[Tensor, "B D"]]:
        """What the fading memory returns at each token, the errors of the tokens' prediction from what it returned
        before, and what it holds after the last."""
        faded, hidden = self.fading(normed, before.hidden, token_mask)
        if not self.predicts:
            return faded[:, 1:], before.errors, hidden
        # in half precision differences would make ties
        wanted, got = normed.detach(), self.predict(faded[:, :-1].detach())
        errors = (wanted.to(before.errors.dtype) - got).square().mean(2)
        return faded[:, 1:], self.innovation(errors), hidden

    def _join(
        self,
        before: EideticCarried,
        recent: Float[Tensor, "B L R"],
        faded: Float[Tensor, "B L R"],
        errors: Float[Tensor, "B e"],
    ) -> Joined:
        """What was carried, with what is new behind it."""
        length = recent.shape[1]
        recent, faded = torch.cat((before.recent, recent), dim=1), torch.cat((before.faded, faded), dim=1)
        errors = torch.cat((before.errors, errors), dim=1) if self.predicts else errors
        row = torch.arange(length if self.stored else 0, device=before.steps.device)
        leaving = (before.steps[:, None] + row - self.window).clamp(min=ABSENT)
        places = torch.cat((before.places, leaving), dim=1)
        held = held_after_each(self._priority(places, errors), places, rows=self.stored)
        return Joined(recent, faded, before.stored, places, errors, held)

    def _priority(self, places: Int[Tensor, "B C"], errors: Float[Tensor, "B e"]) -> Num[Tensor, "B C"]:
        """By what candidates are compared."""
        if self.picks == "innovation":
            return errors[:, : places.shape[1]]
        if self.picks == "random":
            return bits_at(places.new_full((1, 1), self.layer), places + 1)
        return places if self.picks == "recent" else -places

    def _held(self, joined: Joined) -> Bool[Tensor, "B L C"] | None:
        """Which candidates each token sees; None if nothing is stored."""
        held: Tensor | None = self.held(joined.held[:, self.stored :]) if self.stored else None
        return held

    def _after(
        self, joined: Joined, hidden: Float[Tensor, "B D"], steps: Int[Tensor, " B"], token_mask: Bool[Tensor, "B L"]
    ) -> EideticCarried:
        """What is carried after the last token that exists."""
        arrived, window, dtype = token_mask.sum(1), self.window, joined.stored.dtype
        recent = rows_after(joined.recent, arrived, rows=window).to(dtype)
        faded = rows_after(joined.faded, arrived, rows=2 * window).to(dtype)
        stored, places, errors = joined.stored, joined.places, joined.errors
        if self.stored:
            # lanes without a token keep what they had, by the contract
            held = joined.held.take_along_dim((arrived + self.stored - 1)[:, None, None], dim=1)[:, 0]
            chosen = held.int().argsort(dim=1, stable=True)[:, -self.stored :]
            none, candidates = ~held.take_along_dim(chosen, dim=1), places.shape[1]
            rows = torch.cat((stored, joined.recent[:, : candidates - self.stored]), dim=1)
            stored = rows.take_along_dim(chosen[..., None], dim=1).masked_fill(none[..., None], 0.0).to(dtype)
            places = places.take_along_dim(chosen, dim=1).masked_fill(none, ABSENT)
        if self.predicts:
            last = rows_after(errors[:, self.stored :, None], arrived, rows=window)[..., 0]
            errors = torch.cat((errors.take_along_dim(chosen, dim=1).masked_fill(none, 0.0), last), dim=1)
        return EideticCarried(hidden, recent, faded, stored, places, errors, steps + arrived)


def seen_rows(joined: Joined) -> Rows:
    """Of what is carried and the tokens behind it, the rows that one of the tokens may see."""
    return Rows(joined.recent, joined.faded[:, : joined.recent.shape[1]], joined.stored)
