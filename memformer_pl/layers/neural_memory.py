"""A memory that is a small network for each head, trained at every token by gradient descent with momentum (Titans).

B  lanes     L  tokens     T  tokens of a piece     D  width     H  heads     K  width of a key and of a value
R  layers of a memory     F  hidden units of a memory     P  inputs of a convolution before the first token
I  its channels
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.layers.head_memory import HeadMemory
from memformer_pl.layers.inner_gradient import Learned, Lessons, Weights, learn, read_and_learn, read_within_chunk
from memformer_pl.layers.probe import Probe

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
        # with the gates of the bias, a chunk of equal pairs moves a linear memory at most to their value:
        # 2 * chunk * theta / (1 - eta) = 1
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
