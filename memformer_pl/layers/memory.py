"""How tokens read a memory, how a segment is written into it, and how slots forget (section 3.2 to 3.4 of the paper).

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
from memformer_pl.layers.attention import Attention, KeysValues
from memformer_pl.layers.probe import Probe

TIME_SCALE = 32.0
"""Segments that an untrained memory keeps what it holds, unless told otherwise."""

SHORTEST = 1 / 16
"""Time scale of the first head of an untrained writer, as a share of that of the last."""

SHARPNESS = 3.0
"""Spread of the scores that an untrained slot gives to tokens: at 3 it writes one to three tokens, not their mean."""

SHARPEST = 6.0
"""The most that this spread is raised to, in a head that is too narrow to keep for its time scale otherwise."""

SHORT_OF = 0.9
"""Share of its time scale below which it is told that a head does not begin by keeping for so long."""

FORGETTING = 3.2
"""Length of the forgetting vectors ``v`` of an untrained memory, times its time scale. A slot has length 1."""


class SlotReader(nn.Module):
    """What each token takes from memory: attention from tokens to all slots of the lane, which have no order.

    Slots pass a LayerNorm of their own first (the paper's figure).

    Args:
        dim: Width of a slot and of a token.
        heads: Attention heads; must divide ``dim``.
    """

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim=dim, heads=heads)

    def keys_values(self, memory: Float[Tensor, "B M D"]) -> KeysValues:
        """What each slot is found by, and what it gives."""
        return self.attention.keys_values(self.norm(memory))

    def forward(self, x: Float[Tensor, "B L D"], memory: Float[Tensor, "B M D"]) -> Float[Tensor, "B L D"]:
        """What ``x`` reads from ``memory``."""
        out: Tensor = self.attention(x, self.keys_values(memory))
        return out


class SlotWriter(nn.Module):
    """Compute the next memory from the current one and an encoded segment (section 3.3).

    A slot attends to itself and to every token, never to another slot. Its own value is the slot as it stands, so the
    weight that it gives itself is the share of old content that it keeps: the retention. The probes ``retention``
    ``[B, H, M]`` and ``writing`` ``[B, H, M, L]`` show where the attention goes.

    The paper leaves open: heads share a slot by cutting it in equal parts, and there is no output projection, which
    would change a slot that attends to itself alone; slots are normalised for queries and keys; and a token's value
    begins as long as a slot.

    Slots begin inclined to keep, as an LSTM's forget gate does: the keys start close to the queries, so that a slot
    resembles itself more than a token does, by an amount that gives each head a time scale of its own: the segments
    after which half of the slots have less than 1/e left of what they held, by the product of their retentions. Most
    writes take less from a slot than that, a few nearly all. Slots and initialisations differ, and tokens that are
    alike count as fewer; so a head keeps for its time scale within a factor of about three.

    Args:
        dim: Width of a slot and of a token.
        heads: Attention heads; must divide ``dim``.
        temperature: Below 1, a slot tends to keep all or to replace all.
        segment_length: How many tokens a slot usually competes with when it begins.
        time_scale: Of the last head of an untrained writer, in segments; a single head is the last. The first has a
            sixteenth of it, those between have times between.

    Warns:
        UntrainedWarning: A head is too narrow to begin by keeping a slot for its time scale; says for how long it does.
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
        start = inclined(time_scale_H, width=width, tokens=segment_length)
        warn_of_narrow_heads(start.kept, time_scale_H, width=width, tokens=segment_length)
        self._begin(start, width=width, temperature=temperature)

    @torch.no_grad()
    def _begin(self, start: "Inclined", *, width: int, temperature: float) -> None:
        """Draw the keys that heads of some width begin with."""
        weight = self.to_key.weight
        cosine_D1, scale_D1 = (
            rearrange(value_H, "H -> H 1").repeat_interleave(width, dim=0)
            for value_H in (start.cosine.to(weight), (temperature * start.sharpness).to(weight))
        )
        unrelated = torch.randn_like(weight) * self.to_key.in_features**-0.5
        keys = cosine_D1 * self.to_query.weight + (1 - cosine_D1**2).sqrt() * unrelated
        weight.copy_(scale_D1 * keys)

    def forward(
        self, memory: Float[Tensor, "B M D"], tokens: Float[Tensor, "B L D"], token_mask: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B M D"]:
        """The slots after the segment is written, before they forget."""
        slots = self.norm(memory)
        query_BHMK = self._split(self.to_query(slots)) * self.scale
        own_score_BHM = einsum(query_BHMK, self._split(self.to_key(slots)), "B H M K, B H M K -> B H M")
        score_BHML = einsum(query_BHMK, self._split(self.to_key(tokens)), "B H M K, B H L K -> B H M L")
        score_BHML = score_BHML.masked_fill(~rearrange(token_mask, "B L -> B 1 1 L"), -torch.inf)
        # one softmax over itself and the tokens: a slot competes with the segment, not with other slots
        weights = torch.cat((own_score_BHM[..., None], score_BHML), dim=-1).softmax(dim=-1)
        retention_BHM, writing_BHML = self.retention(weights[..., 0]), self.writing(weights[..., 1:])
        value_BHLK = self._split(self.to_value(tokens)) * self.value_scale
        kept_BHMK = retention_BHM[..., None] * self._split(memory)
        written_BHMK = einsum(writing_BHML, value_BHLK, "B H M L, B H L K -> B H M K")
        out: Tensor = rearrange(kept_BHMK + written_BHMK, "B H M K -> B M (H K)")
        return out

    def _split(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B H T K"]:
        return rearrange(x, "B T (H K) -> B H T K", H=self.heads)


class BiasedMemoryNorm(nn.Module):
    """Keep slots on the unit sphere, and pull each towards a place of its own: forgetting (section 3.4).

    A slot that is written no more drifts to ``v / ||v||``, which is also where it begins a document: the faster, the
    longer ``v`` is.

    Args:
        slots: How many.
        dim: Width of a slot.
        forgetting: Whether slots are pulled. Without, they are only kept on the sphere (ours: the paper is silent).
        time_scale: The longer, the shorter ``v`` begins.
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
        return self.anchors * (self.length / math.sqrt(self.anchors.shape[-1]))

    def initial(self, lanes: int) -> Float[Tensor, "B M D"]:
        """The memory at the start of a document: ``v / ||v||`` in each lane."""
        return F.normalize(self.bias, dim=-1).expand(lanes, -1, -1)

    def forward(self, memory: Float[Tensor, "B M D"]) -> Float[Tensor, "B M D"]:
        """The memory one step of forgetting later."""
        out: Tensor = F.normalize(memory + self.bias if self.forgetting else memory, dim=-1)
        return out


class Inclined(NamedTuple):
    """How the heads of an untrained writer begin."""

    cosine: Float[Tensor, " H"]
    """Between a head's keys and its queries."""
    sharpness: Float[Tensor, " H"]
    """Spread of its scores."""
    kept: Float[Tensor, " H"]
    """Segments for which it then keeps a slot."""


def time_scales(time_scale: float, *, heads: int) -> Float[Tensor, " H"]:
    """The time scale of each head of a writer, in segments; of a single one ``time_scale`` itself."""
    longest = min(time_scale, 1e30)  # single precision has no numbers far beyond
    shortest = longest if heads == 1 else SHORTEST * longest
    return torch.logspace(math.log10(shortest), math.log10(longest), heads, device="cpu")


def inclined(time_scale_H: Float[Tensor, " H"], *, width: int, tokens: int) -> Inclined:
    """How heads of some width must begin to keep a slot for their time scales, against so many tokens a segment.

    Scores of unrelated tokens are spread by the sharpness ``s``, and the sum of ``L`` such exponentials is that of the
    random energy model (:func:`log_sum`). A slot's own score is ``s sqrt(K)`` times the cosine of keys and queries.
    Where a cosine of 1 is not enough, a larger ``s`` is, if heads are wide enough to gain more by it than the largest
    score of a token does.
    """
    own, threshold = width**0.5, math.sqrt(2 * math.log(tokens))
    retention_H = (-1 / time_scale_H).exp()
    cosine_H = (retention_H.logit() + log_sum(SHARPNESS, tokens)) / (SHARPNESS * own)
    # the same in double precision: a long time scale leaves no single-precision number below 1
    logit_H = -(1 / time_scale_H.double()).expm1().log()
    sharpness_H = torch.full_like(logit_H, SHARPNESS)
    if own > threshold:
        raised_H = (logit_H / (own - threshold)).clamp(SHARPNESS, SHARPEST)
        sharpness_H = torch.where(cosine_H > 1, raised_H, sharpness_H)
    cosine_H = cosine_H.clamp(-1, 1)
    sums_H = sharpness_H.clone().apply_(lambda sharpness: log_sum(sharpness, tokens))
    kept_H = 1 / F.softplus(sums_H - sharpness_H * own * cosine_H)
    return Inclined(cosine_H, sharpness_H, kept_H)


def warn_of_narrow_heads(
    kept_H: Float[Tensor, " H"], time_scale_H: Float[Tensor, " H"], *, width: int, tokens: int
) -> None:
    """Warn of heads that do not begin by keeping a slot for as long as their time scale."""
    pairs = list(zip(kept_H.tolist(), time_scale_H.tolist(), strict=True))
    missed = [head for head, (kept, wanted) in enumerate(pairs, start=1) if kept < SHORT_OF * wanted]
    if missed:
        kept, wanted = pairs[missed[-1] - 1]
        warnings.warn(
            f"writer_heads={len(pairs)} of width {width} are too narrow for segments of {tokens} tokens: before "
            f"training, {len(missed)} of them keep a slot for less than their time scale (head {missed[-1]} for "
            f"{kept:.3g} segments, not {wanted:.3g}): lower writer_heads, or raise dim",
            UntrainedWarning,
            stacklevel=4,
        )


def log_sum(sharpness: float, tokens: int) -> float:
    """Logarithm of the sum of the exponentials of the scores of unrelated tokens: ``log L + s^2 / 2``, or where a few
    tokens dominate, ``s sqrt(2 log L)``."""
    threshold = math.sqrt(2 * math.log(tokens))
    return math.log(tokens) + sharpness**2 / 2 if threshold > sharpness else sharpness * threshold


def require_times(**times: float) -> None:
    """Raise a ``UsageError`` that names the first time in which nothing could be kept, or that has no end."""
    for name, time in times.items():
        if not 1 <= time < math.inf:
            raise UsageError(f"{name} must be at least 1 segment and finite, got {time}")
