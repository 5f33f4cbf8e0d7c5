"""A memory that is a small network for each head, trained at every token by gradient descent with momentum (Titans).

B  lanes     L  tokens     T  tokens of a piece     W  earlier tokens that attention sees     D  width     H  heads
K  width of a key and of a value     R  layers of a memory     F  hidden units of a memory
P  inputs of a convolution before the first token     I  its channels
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.layers.dropout import Keep, add_update
from memformer_pl.layers.head_memory import HeadMemory
from memformer_pl.layers.inner_gradient import Learned, Lessons, Weights, learn, read_and_learn, read_within_chunk
from memformer_pl.layers.probe import Probe
from memformer_pl.layers.sliding_attention import SlidingAttention, Window
from memformer_pl.layers.transformer import BlockConfig, FeedForward

FORGETTING = (1e-3, 1e-1)
"""Shares that the first and the last head forget at each token, before training."""


class LessonGates(nn.Module):
    """The paper's theta, eta and alpha of each head, from the token alone.

    Args:
        dim: Width of a token.
        heads: Number of memories.
        chunk: Tokens whose gradients are taken at the same weights.
    """

    def __init__(self, *, dim: int, heads: int, chunk: int) -> None:
        super().__init__()
        self.to_gates = nn.Linear(dim, 3 * heads, bias=False)
        # a chunk of equal pairs moves a linear memory at most to their value: 2 * chunk * theta / (1 - eta) = 1
        step, momentum = torch.full((heads,), 0.25 / chunk), torch.full((heads,), 0.5)
        first, last = (math.log(share) for share in FORGETTING)
        forgotten = torch.linspace(first, last, heads).exp()
        self.bias = nn.Parameter(torch.cat((step, momentum, forgotten)).logit())

    def forward(self, x: Float[Tensor, "B L D"]) -> tuple[Tensor, Tensor, Tensor]:
        """Step, logarithm of the momentum's factor, and logarithm of what is kept, ``[B, H, L, 1]``."""
        step, momentum, forget = rearrange(self.to_gates(x) + self.bias, "B L (G H) -> G B H L 1", G=3)
        return step.sigmoid(), F.logsigmoid(momentum), F.logsigmoid(-forget)


class Projected(NamedTuple):
    """What the tokens of a segment read and teach."""

    queries: Float[Tensor, "B H L K"]
    lessons: Lessons
    inputs: Float[Tensor, "B P I"]
    """The last inputs of the convolution."""


class NeuralMemory(HeadMemory):
    """A layer in which each token trains a small network for each head, and asks it.

    The probes ``step``, ``momentum`` and ``forgotten`` show theta, eta and alpha of each token, ``[B, H, L, 1]``.

    Args:
        dim: Width of a token; a head has ``dim // heads`` of it.
        heads: Number of memories.
        hidden: Hidden units of a memory; 0 for a matrix alone.
        chunk: Tokens whose gradients are taken at the same weights.
    """

    no_decay = ("initial",)

    def __init__(self, *, dim: int, heads: int, hidden: int, chunk: int) -> None:
        width = dim // heads
        super().__init__(
            dim=dim, heads=heads, key_width=width, gates=lambda: LessonGates(dim=dim, heads=heads, chunk=chunk)
        )
        self.chunk = chunk
        self.initial = nn.Parameter(torch.empty(heads, 2 if hidden else 1, width, hidden or width))
        nn.init.normal_(self.initial, std=1.0 if hidden else width**-0.5)
        self.step, self.momentum, self.forgotten = Probe(), Probe(), Probe()

    def project(
        self, x: Float[Tensor, "B L D"], inputs: Float[Tensor, "B P I"], token_mask: Bool[Tensor, "B L"]
    ) -> Projected:
        """What the tokens read and teach; absent ones teach nothing."""
        queries, keys, values, inputs = self.split(x, inputs, token_mask)
        step, log_momentum, log_keep = self.gates(x)
        lessons = Lessons(keys, values, step, log_momentum, log_keep, torch.ones_like(step)).masked(token_mask)
        self.step(lessons.step)
        if self.momentum.watched:
            self.momentum(lessons.log_momentum.exp())
        if self.forgotten.watched:
            self.forgotten(-lessons.log_keep.expm1())
        return Projected(queries, lessons, inputs)

    def forward(
        self, x: Float[Tensor, "B L D"], learned: Learned, projected: Projected
    ) -> tuple[Float[Tensor, "B L D"], Learned]:
        """The update of each token of a segment, and what memory has learned after the last."""
        read, learned = read_and_learn(learned, projected.queries, projected.lessons, chunk=self.chunk)
        return self.output(x, read), learned

    def learn(self, learned: Learned, projected: Projected) -> Learned:
        """What memory has learned after the last token."""
        return learn(learned, projected.lessons, chunk=self.chunk)

    def decode(
        self,
        x: Float[Tensor, "B T D"],
        learned: Learned,
        first: Weights,
        place: Int[Tensor, " B"],
        projected: Projected,
    ) -> tuple[Float[Tensor, "B T D"], Learned, Weights, Int[Tensor, " B"]]:
        """Continue a segment token by token, in chunks that begin where those of :meth:`forward` do.

        Args:
            x: The next tokens.
            learned: Before them.
            first: Weights before the chunk that each lane is in.
            place: Tokens that each lane has read of the segment.
            projected: What they read and teach.

        Returns:
            The update of each token, and the other three after the last.
        """
        read = []
        queries = torch.split(projected.queries, 1, dim=2)
        for query, lessons in zip(queries, projected.lessons.chunks(1), strict=True):
            begins = (place % self.chunk == 0).view(-1, 1, 1, 1, 1)
            first = learned.weights.where(begins, first)
            part, learned = read_within_chunk(first, learned, query, lessons)
            place = place + lessons.exists[:, 0, 0, 0].to(place.dtype)
            read.append(part)
        return self.output(x, torch.cat(read, dim=2)), learned, first, place


Variant = Literal["lmm", "mal", "mag"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


class AttentionSizes(NamedTuple):
    """Of the attention beside a neural memory."""

    window: int
    """Number of tokens before its own that a token sees."""
    persistent: int
    """Number of learned vectors that it sees."""
    segment_length: int


class NeuralMemoryBlock(nn.Module):
    """Pre-norm block: a neural memory, perhaps with attention behind it (``mal``) or gated by it (``mag``), and
    feed-forward."""

    def __init__(
        self, config: BlockConfig, *, variant: Variant, hidden: int, chunk: int, attention: AttentionSizes
    ) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.variant = variant
        self.branches = 3 if variant == "mal" else 2
        self.memory_norm = nn.LayerNorm(dim)
        self.memory = NeuralMemory(dim=dim, heads=heads, hidden=hidden, chunk=chunk)
        if variant != "lmm":
            self.attention_norm = nn.LayerNorm(dim)
            self.attention = SlidingAttention(dim=dim, heads=heads, **attention._asdict())
        if variant == "mag":
            self.read_norm, self.found_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), FeedForward(dim=dim, hidden=config.hidden)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        weights: Weights,
        momentum: Weights,
        inputs: Float[Tensor, "B P I"],
        keys: Float[Tensor, "B H W K"],
        values: Float[Tensor, "B H W K"],
        filled: Int[Tensor, " B"],
        token_mask: Bool[Tensor, "B L"],
        *,
        keep: Keep | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the block on a segment.

        Args:
            x: Tokens.
            weights: Of memory, before the first of them.
            momentum: Of memory, before the first of them.
            inputs: Of the convolution, before the first of them.
            keys: Of attention, at the tokens before.
            values: Of attention, at the tokens before.
            filled: Number of filled rows of keys and values.
            token_mask: Which of the tokens exist, at the left.
            keep: Factors of dropout; by default nothing is dropped.

        Returns:
            The tokens, and what is carried after the last one that exists.
        """
        normed = self.memory_norm(x)
        projected = self.memory.project(normed, inputs, token_mask)
        read, learned = self.memory(normed, Learned(weights, momentum), projected)
        x, window = self._finish(x, read, Window(keys, values, filled), token_mask, keep)
        return x, *learned, projected.inputs, *window

    def advance(
        self,
        x: Float[Tensor, "B L D"],
        weights: Weights,
        momentum: Weights,
        inputs: Float[Tensor, "B P I"],
        keys: Float[Tensor, "B H W K"],
        values: Float[Tensor, "B H W K"],
        filled: Int[Tensor, " B"],
        token_mask: Bool[Tensor, "B L"],
        *,
        keep: Keep | None = None,
    ) -> tuple[Tensor, ...]:
        """What :meth:`forward` carries on, without what does not lead to it."""
        normed, window = self.memory_norm(x), Window(keys, values, filled)
        projected = self.memory.project(normed, inputs, token_mask)
        if self.variant == "mal":
            read, learned = self.memory(normed, Learned(weights, momentum), projected)
            x = add_update(x, read, keep, 0)
        else:
            learned = self.memory.learn(Learned(weights, momentum), projected)
        if self.variant != "lmm":
            window = self.attention.advance(self.attention_norm(x), window, token_mask)
        return *learned, projected.inputs, *window

    def decode(
        self,
        x: Float[Tensor, "B T D"],
        weights: Weights,
        momentum: Weights,
        inputs: Float[Tensor, "B P I"],
        keys: Float[Tensor, "B H W K"],
        values: Float[Tensor, "B H W K"],
        filled: Int[Tensor, " B"],
        first: Weights,
        place: Int[Tensor, " B"],
        token_mask: Bool[Tensor, "B T"],
    ) -> tuple[Tensor, ...]:
        """Run the block on the next tokens of a segment; return them, and all that was given about those before, after
        them."""
        normed = self.memory_norm(x)
        projected = self.memory.project(normed, inputs, token_mask)
        read, learned, first, after = self.memory.decode(normed, Learned(weights, momentum), first, place, projected)
        x, window = self._finish(x, read, Window(keys, values, filled), token_mask, place=place)
        return x, *learned, projected.inputs, *window, first, after

    def _finish(
        self,
        x: Float[Tensor, "B L D"],
        read: Float[Tensor, "B L D"],
        window: Window,
        token_mask: Bool[Tensor, "B L"],
        keep: Keep | None = None,
        place: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], Window]:
        """The tokens with what memory and attention found, and the window after them."""
        if self.variant != "mag":
            x = add_update(x, read, keep, 0)
        if self.variant != "lmm":
            found, window = self.attention.look(self.attention_norm(x), window, token_mask, place)
            if self.variant == "mag":
                found = self.found_norm(found) * self.read_norm(read).sigmoid()
            x = add_update(x, found, keep, self.branches - 2)
        return add_update(x, self.ffn(self.ffn_norm(x)), keep, self.branches - 1), window
