"""Reading from memory, writing a segment into it, and forgetting (sections 3.2 to 3.4 of the paper).

B  lanes     L  tokens in a segment     M  slots     D  width     H  heads     K  width of a head
"""

import math
import warnings
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.errors import UntrainedWarning, UsageError
from memformer_pl.layers.attention import CrossAttention, KeysValues
from memformer_pl.layers.probe import Probe

TIME_SCALE = 32.0
"""Default time, in segments, for which an untrained memory keeps its content."""

SHORTEST = 1 / 16
"""Time scale of the first head of an untrained writer, divided by that of the last."""

SHARPNESS = 3.0
"""Standard deviation of an untrained slot's scores of tokens: at 3 it writes one to three tokens, not their mean."""

SHARPEST = 6.0
"""Upper limit of that deviation in a head that is too narrow to reach its time scale otherwise."""

WARN_BELOW = 0.9
"""Warn if an untrained head keeps a slot for less than this share of its time scale."""

FORGETTING = 3.2
"""Initial length of the forgetting vectors ``v``, times the time scale. A slot has length 1."""


class SlotReader(nn.Module):
    """Attention from tokens to all slots of the lane, which have no order.

    Slots first pass a LayerNorm of their own (the paper's figure).

    Args:
        dim: Width of a slot and of a token.
        heads: Attention heads; must divide ``dim``.
    """

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = CrossAttention(dim=dim, heads=heads)

    def keys_values(self, memory: Float[Tensor, "B M D"]) -> KeysValues:
        """Keys and values of the slots."""
        return self.attention.keys_values(self.norm(memory))

    def forward(self, x: Float[Tensor, "B L D"], memory: Float[Tensor, "B M D"]) -> Float[Tensor, "B L D"]:
        """Attend from ``x`` to ``memory``."""
        out: Tensor = self.attention(x, self.keys_values(memory))
        return out


class SlotWriter(nn.Module):
    """Compute the next memory from the current one and an encoded segment (section 3.3).

    A slot attends to itself and to every token, never to another slot. Its own value is the slot as it stands, so the
    weight that it gives itself is the share of old content that it keeps: the retention. The probes ``retention``
    ``[B, H, M]`` and ``writing`` ``[B, H, M, L]`` show where the attention goes.

    Ours, where the paper is silent: each head has an equal part of a slot; there is no output projection, which would
    change a slot that attends to itself alone; slots are normalised for queries and keys; and an untrained token's
    value is as long as a slot.

    An untrained writer tends to keep, like the forget gate of an LSTM with a positive bias: the keys start close to
    the queries, so a slot scores itself higher than tokens, by an amount that sets the time scale of each head: the
    number of segments after which half of the slots have less than 1/e left of their content, by the product of their
    retentions. Most writes take less of a slot than that, a few nearly all. Slots and initialisations differ, and
    similar tokens count as fewer; so a head keeps for its time scale within a factor of about three.

    Args:
        dim: Width of a slot and of a token.
        heads: Attention heads; must divide ``dim``.
        temperature: Below 1, a slot tends to keep all or to replace all.
        segment_length: Number of tokens that a slot usually competes with.
        time_scale: Time scale, in segments, of the last head of an untrained writer, or of its only head. The first of
            several heads has a sixteenth of it; the others are spaced between.

    Warns:
        UntrainedWarning: A head is too narrow to keep a slot for its time scale; the message says for how long it does.
    """

    def __init__(
        self, *, dim: int, heads: int, temperature: float, segment_length: int, time_scale: float = TIME_SCALE
    ) -> None:
        super().__init__()
        require_times(time_scale=time_scale)
        if heads < 1 or dim % heads:
            raise UsageError(f"writer_heads must divide dim, got writer_heads={heads} and {dim=}")
        if not 0 < temperature < math.inf:
            raise UsageError(f"temperature must be above 0 and finite, got {temperature}")
        self.heads = heads
        self.scale = (dim / heads) ** -0.5 / temperature
        self.value_scale = dim**-0.5
        self.norm = nn.LayerNorm(dim)
        self.to_query = nn.Linear(dim, dim, bias=False)
        self.to_key = nn.Linear(dim, dim, bias=False)
        self.to_value = nn.Linear(dim, dim, bias=False)
        self.retention = Probe()
        self.writing = Probe()
        for projection in (self.to_query, self.to_value):
            nn.init.normal_(projection.weight, std=dim**-0.5)
        time_scale_H, width = time_scales(time_scale, heads=heads), dim // heads
        init = head_init(time_scale_H, width=width, tokens=segment_length)
        warn_of_narrow_heads(init.lifetime, time_scale_H, width=width, tokens=segment_length)
        self._init_keys(init, width=width, temperature=temperature)

    @torch.no_grad()
    def _init_keys(self, init: "HeadInit", *, width: int, temperature: float) -> None:
        """Draw the initial keys."""
        weight = self.to_key.weight
        cosine_D1, scale_D1 = (
            rearrange(value_H, "H -> H 1").repeat_interleave(width, dim=0)
            for value_H in (init.cosine.to(weight), (temperature * init.sharpness).to(weight))
        )
        unrelated = torch.randn_like(weight) * self.to_key.in_features**-0.5
        keys = cosine_D1 * self.to_query.weight + (1 - cosine_D1**2).sqrt() * unrelated
        weight.copy_(scale_D1 * keys)

    def forward(
        self, memory: Float[Tensor, "B M D"], tokens: Float[Tensor, "B L D"], token_mask: Bool[Tensor, "B L"] | None
    ) -> Float[Tensor, "B M D"]:
        """The slots after the segment is written, before they forget; ``token_mask`` is None if all tokens exist."""
        slots = self.norm(memory)
        query_BHMK = self._split(self.to_query(slots) * self.scale)
        self_score_BHM = (query_BHMK * self._split(self.to_key(slots))).sum(-1)
        score_BHML = einsum(query_BHMK, self._split(self.to_key(tokens)), "B H M K, B H L K -> B H M L")
        if token_mask is not None:
            score_BHML = score_BHML.masked_fill(~rearrange(token_mask, "B L -> B 1 1 L"), -torch.inf)
        # one softmax over the slot itself and the tokens: a slot competes with the segment, not with other slots
        weights = torch.cat((self_score_BHM[..., None], score_BHML), dim=-1).softmax(dim=-1)
        retention_BHM, writing_BHML = self.retention(weights[..., 0]), self.writing(weights[..., 1:])
        value_BHLK = self._split(self.to_value(tokens))
        kept_BMHK = rearrange(retention_BHM, "B H M -> B M H 1") * memory.view(*memory.shape[:2], self.heads, -1)
        written_BMHK = einsum(writing_BHML, value_BHLK, "B H M L, B H L K -> B M H K")
        return torch.add(kept_BMHK, written_BMHK, alpha=self.value_scale).flatten(2)

    def _split(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B H T K"]:
        return rearrange(x, "B T (H K) -> B H T K", H=self.heads)


class BiasedMemoryNorm(nn.Module):
    """Keep slots on the unit sphere, and pull each towards an anchor of its own: forgetting (section 3.4).

    A slot that is not written any more drifts to ``v / ||v||``, which is also its value at the start of a document; the
    longer ``v``, the faster.

    Args:
        slots: Number of slots.
        dim: Width of a slot.
        forgetting: Whether slots are pulled. If not, they are only kept on the sphere (ours: the paper is silent).
        time_scale: In segments; the initial length of ``v`` is inversely proportional to it.
    """

    no_decay = ("anchors",)

    def __init__(self, *, slots: int, dim: int, forgetting: bool, time_scale: float = TIME_SCALE) -> None:
        super().__init__()
        require_times(time_scale=time_scale)
        self.forgetting = forgetting
        self.length = FORGETTING / time_scale
        # Entries near 1 and a fixed factor: the optimizer's steps are then small beside the length of v at the start.
        self.anchors = nn.Parameter(torch.randn(slots, dim))

    @property
    def bias(self) -> Float[Tensor, "M D"]:
        """The paper's ``v``."""
        return self.anchors * self._scale

    def initial(self, lanes: int) -> Float[Tensor, "B M D"]:
        """The memory at the start of a document: ``v / ||v||`` in each lane."""
        return F.normalize(self.bias, dim=-1).expand(lanes, -1, -1)

    def forward(self, memory: Float[Tensor, "B M D"]) -> Float[Tensor, "B M D"]:
        """Apply one step of forgetting."""
        pulled = torch.add(memory, self.anchors, alpha=self._scale) if self.forgetting else memory
        out: Tensor = F.normalize(pulled, dim=-1)
        return out

    @property
    def _scale(self) -> float:
        """What the anchors are multiplied by: their length is near the root of the width."""
        return self.length / math.sqrt(self.anchors.shape[-1])


class HeadInit(NamedTuple):
    """Initial values of the heads of a writer."""

    cosine: Float[Tensor, " H"]
    """Cosine between keys and queries."""
    sharpness: Float[Tensor, " H"]
    """Standard deviation of the scores of tokens."""
    lifetime: Float[Tensor, " H"]
    """Number of segments for which a head then keeps a slot."""


def time_scales(time_scale: float, *, heads: int) -> Float[Tensor, " H"]:
    """The time scale of each head of a writer, in segments; ``time_scale`` itself for a single head."""
    longest = min(time_scale, 1e30)  # close to the end of single precision
    shortest = longest if heads == 1 else SHORTEST * longest
    return torch.logspace(math.log10(shortest), math.log10(longest), heads, device="cpu")


def head_init(time_scale_H: Float[Tensor, " H"], *, width: int, tokens: int) -> HeadInit:
    """Initial values with which heads of this width keep a slot for their time scales, against ``tokens`` a segment.

    Scores of unrelated tokens have the standard deviation ``s``, the sharpness, and the sum of ``L`` such exponentials
    is that of the random energy model (:func:`log_sum`). A slot scores itself ``s sqrt(K)`` times the cosine of keys
    and queries. If a cosine of 1 does not suffice, ``s`` is raised, provided that heads are wide enough for this score
    to grow faster than the largest score of a token.
    """
    self_score, threshold = width**0.5, math.sqrt(2 * math.log(tokens))
    retention_H = (-1 / time_scale_H).exp()
    cosine_H = (retention_H.logit() + log_sum(SHARPNESS, tokens)) / (SHARPNESS * self_score)
    # the same in double precision: for a long time scale, single precision rounds the retention to 1
    logit_H = -(1 / time_scale_H.double()).expm1().log()
    sharpness_H = torch.full_like(logit_H, SHARPNESS)
    if self_score > threshold:
        raised_H = (logit_H / (self_score - threshold)).clamp(SHARPNESS, SHARPEST)
        sharpness_H = torch.where(cosine_H > 1, raised_H, sharpness_H)
    cosine_H = cosine_H.clamp(-1, 1)
    sums_H = sharpness_H.clone().apply_(lambda sharpness: log_sum(sharpness, tokens))
    lifetime_H = 1 / F.softplus(sums_H - sharpness_H * self_score * cosine_H)
    return HeadInit(cosine_H, sharpness_H, lifetime_H)


def warn_of_narrow_heads(
    lifetime_H: Float[Tensor, " H"], time_scale_H: Float[Tensor, " H"], *, width: int, tokens: int
) -> None:
    """Warn of untrained heads that keep a slot for less than their time scale."""
    pairs = list(zip(lifetime_H.tolist(), time_scale_H.tolist(), strict=True))
    missed = [head for head, (lifetime, wanted) in enumerate(pairs, start=1) if lifetime < WARN_BELOW * wanted]
    if missed:
        lifetime, wanted = pairs[missed[-1] - 1]
        warnings.warn(
            f"writer_heads={len(pairs)} of width {width} are too narrow for segments of {tokens} tokens: before "
            f"training, {len(missed)} of them keep a slot for less than their time scale (head {missed[-1]} for "
            f"{lifetime:.3g} segments, not {wanted:.3g}): lower writer_heads, or raise dim",
            UntrainedWarning,
            stacklevel=4,
        )


def log_sum(sharpness: float, tokens: int) -> float:
    """Logarithm of the sum of the exponentials of the scores of unrelated tokens: ``log L + s^2 / 2``, or, if a few
    tokens dominate, ``s sqrt(2 log L)``."""
    threshold = math.sqrt(2 * math.log(tokens))
    return math.log(tokens) + sharpness**2 / 2 if threshold > sharpness else sharpness * threshold


def require_times(**times: float) -> None:
    """Raise a ``UsageError`` that names the first time below 1 segment or not finite."""
    for name, time in times.items():
        if not 1 <= time < math.inf:
            raise UsageError(f"{name} must be at least 1 segment and finite, got {time}")
