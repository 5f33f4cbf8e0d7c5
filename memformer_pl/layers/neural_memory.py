"""A memory that is a small network for each head, trained at every token by gradient descent with momentum (Titans).

B  lanes     L  tokens     C  tokens of a chunk     T  tokens of a piece     D  width     H  heads
K  width of a key and of a value     R  layers of a memory     F  hidden units of a memory
P  inputs of a convolution before the first token     I  its channels
X  width of what a layer of a memory is given     Y  width of what it returns
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.layers.delta_rule import Decay, decays
from memformer_pl.layers.dropout import Keep, add_update
from memformer_pl.layers.head_memory import HeadMemory
from memformer_pl.layers.probe import Probe
from memformer_pl.layers.transformer import BlockConfig, FeedForward

FORGETTING = (1e-3, 1e-1)
"""Shares that the first and the last head forget at each token, before training."""

Weights = Float[Tensor, "B H R K F"]


class Learned(NamedTuple):
    """What a memory has learned: at least float32, whatever the weights of the model are."""

    weights: Weights
    """Of the first layer as it maps a key, and of the second one transposed."""
    momentum: Weights
    """The paper's surprise ``S``."""


class Lessons(NamedTuple):
    """What each token teaches its memory."""

    keys: Float[Tensor, "B H L K"]
    values: Float[Tensor, "B H L K"]
    step: Float[Tensor, "B H L 1"]
    """The paper's theta."""
    log_momentum: Float[Tensor, "B H L 1"]
    """Logarithm of the paper's eta."""
    log_keep: Float[Tensor, "B H L 1"]
    """Logarithm of one less the paper's alpha."""
    exists: Float[Tensor, "B H L 1"]
    """1, or 0 for an absent token, which moves no weight."""

    def masked(self, token_mask: Bool[Tensor, "B L"]) -> "Lessons":
        """These lessons, where absent tokens leave weights and momentum as they are."""
        exists = rearrange(token_mask, "B L -> B 1 L 1")
        step, log_momentum, log_keep = (field.where(exists, 0.0) for field in self[2:5])
        return Lessons(self.keys, self.values, step, log_momentum, log_keep, self.exists * exists)

    def chunks(self, chunk: int, *, like: Tensor) -> list["Lessons"]:
        """The lessons of ``chunk`` tokens after another, of the dtype of ``like``; the last chunk may be shorter."""
        parts = zip(*(torch.split(field.to(like.dtype), chunk, dim=2) for field in self), strict=True)
        return [Lessons(*part) for part in parts]


class Shares(NamedTuple):
    """What the weights after each token of a chunk are made of."""

    weights: Float[Tensor, "B H C 1"]
    """Share of the weights before the chunk."""
    momentum: Float[Tensor, "B H C 1"]
    """Share of the momentum before the chunk."""
    gradients: Float[Tensor, "B H C C"]
    """Share of the gradient of each token (second axis), to be subtracted."""


class Gradient(NamedTuple):
    """Gradients of the loss of each token, as outer products; one of each for each layer of the memory."""

    inputs: list[Float[Tensor, "B H C X"]]
    errors: list[Float[Tensor, "B H C Y"]]
    """Of the loss to what a layer returns."""


def gelu_slope(x: Tensor) -> Tensor:
    """Derivative of the exact GELU."""
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def gradient(weights: Weights, keys: Float[Tensor, "B H C K"], values: Float[Tensor, "B H C K"]) -> Gradient:
    """Gradient of ``|M(k) - v|^2`` to the weights, for each token alone, written out: autograd differentiates it again.

    Args:
        weights: All tokens see the same.
        keys: What memory is asked.
        values: What it should return.
    """
    first = weights[:, :, 0]
    if weights.shape[2] == 1:
        return Gradient([keys], [2 * (keys @ first - values)])
    second, scale = weights[:, :, 1], weights.shape[-1] ** -0.5
    drive = keys @ first
    hidden = F.gelu(drive) * scale
    error = 2 * (hidden @ second.mT - values)
    return Gradient([keys, hidden], [(error @ second) * scale * gelu_slope(drive), error])


def read_and_learn(
    first: Weights, learned: Learned, queries: Float[Tensor, "B H L K"], lessons: Lessons
) -> tuple[Float[Tensor, "B H L K"], Learned]:
    """Let each token of a chunk teach memory, and then read it.

    At each token ``S <- eta S - theta G`` and ``W <- (1 - alpha) W + S``, where ``G`` is the gradient at the weights
    ``first``; it reads ``M_W(q)``. Both recurrences are linear, so the weights after each token are sums over the
    chunk; they are never made, only multiplied with what is asked. Computed in the dtype of ``learned``, under autocast
    too.

    Args:
        first: Weights at which gradients are taken: those before the chunk's first token.
        learned: Weights and momentum before the first token of this piece of the chunk.
        queries: What each token reads with.
        lessons: What each token teaches.

    Returns:
        What each token reads, and weights and momentum after the last.
    """
    with torch.autocast(first.device.type, enabled=False):
        (lessons,) = lessons.chunks(queries.shape[2], like=first)
        momentum, shares = _shares(lessons)
        found = gradient(first, lessons.keys, lessons.values)
        x = _read_layer(queries.to(first.dtype), learned, shares, found, layer=0)
        if first.shape[2] == 2:
            hidden = F.gelu(x) * first.shape[-1] ** -0.5
            x = _read_layer(hidden, learned, shares, found, layer=1)
        return x, _learn(learned, found, lessons, momentum, shares)


def learn(first: Weights, learned: Learned, lessons: Lessons) -> Learned:
    """The weights and the momentum that :func:`read_and_learn` returns, bit for bit."""
    with torch.autocast(first.device.type, enabled=False):
        (lessons,) = lessons.chunks(lessons.keys.shape[2], like=first)
        momentum, shares = _shares(lessons)
        found = gradient(first, lessons.keys, lessons.values)
        return _learn(learned, found, lessons, momentum, shares)


def _shares(lessons: Lessons) -> tuple[Decay, Shares]:
    """Decays of momentum, and what the weights after each token are made of."""
    momentum, keep = decays(lessons.log_momentum), decays(lessons.log_keep)
    added = keep.between[..., 0] * lessons.exists.mT  # of the momentum after each token
    gradients = (added @ momentum.between[..., 0]) * lessons.step.mT
    return momentum, Shares(keep.from_start, added @ momentum.from_start, gradients)


def _read_layer(
    x: Float[Tensor, "B H C X"], learned: Learned, shares: Shares, found: Gradient, *, layer: int
) -> Float[Tensor, "B H C Y"]:
    """What one layer of a memory makes of ``x``, with the weights after each token."""
    weights, momentum = (field[:, :, layer] if layer == 0 else field[:, :, layer].mT for field in learned)
    among = (x @ found.inputs[layer].mT) * shares.gradients
    return (shares.weights * x) @ weights + (shares.momentum * x) @ momentum - among @ found.errors[layer]


def _learn(learned: Learned, found: Gradient, lessons: Lessons, momentum: Decay, shares: Shares) -> Learned:
    """Weights and momentum after the last token."""
    of_momentum = (momentum.between[:, :, -1:, :, 0] * lessons.step.mT).mT
    of_weights = shares.gradients[:, :, -1:].mT
    kept, added, decayed = (s[:, :, -1:, None] for s in (shares.weights, shares.momentum, momentum.from_start))
    return Learned(
        kept * learned.weights + added * learned.momentum - _sum(found, of_weights),
        decayed * learned.momentum - _sum(found, of_momentum),
    )


def _sum(found: Gradient, share: Float[Tensor, "B H C 1"]) -> Weights:
    """The gradients of all tokens, each as often as ``share`` says."""
    sums = [(share * x).mT @ error for x, error in zip(found.inputs, found.errors, strict=True)]
    return torch.stack([sums[0], *(s.mT for s in sums[1:])], dim=2)


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
        read = []
        queries = torch.split(projected.queries, self.chunk, dim=2)
        for query, lessons in zip(queries, projected.lessons.chunks(self.chunk, like=learned.weights), strict=True):
            part, learned = read_and_learn(learned.weights, learned, query, lessons)
            read.append(part)
        return self.output(x, torch.cat(read, dim=2)), learned

    def learn(self, learned: Learned, projected: Projected) -> Learned:
        """What memory has learned after the last token."""
        for lessons in projected.lessons.chunks(self.chunk, like=learned.weights):
            learned = learn(learned.weights, learned, lessons)
        return learned

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
        for query, lessons in zip(queries, projected.lessons.chunks(1, like=learned.weights), strict=True):
            begins = (place % self.chunk == 0).view(-1, 1, 1, 1, 1)
            first = learned.weights.where(begins, first)
            part, learned = read_and_learn(first, learned, query, lessons)
            place = place + lessons.exists[:, 0, 0, 0].to(place.dtype)
            read.append(part)
        return self.output(x, torch.cat(read, dim=2)), learned, first, place


class NeuralMemoryBlock(nn.Module):
    """Pre-norm block: a neural memory, and feed-forward."""

    branches = 2
    """Number of branches whose outputs are dropped in part."""

    def __init__(self, config: BlockConfig, *, hidden: int, chunk: int) -> None:
        super().__init__()
        dim = config.dim
        self.memory_norm = nn.LayerNorm(dim)
        self.memory = NeuralMemory(dim=dim, heads=config.heads, hidden=hidden, chunk=chunk)
        self.ffn_norm, self.ffn = nn.LayerNorm(dim), FeedForward(dim=dim, hidden=config.hidden)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        weights: Weights,
        momentum: Weights,
        inputs: Float[Tensor, "B P I"],
        token_mask: Bool[Tensor, "B L"],
        *,
        keep: Keep | None = None,
    ) -> tuple[Float[Tensor, "B L D"], Weights, Weights, Float[Tensor, "B P I"]]:
        """Run the block on a segment.

        Args:
            x: Tokens.
            weights: Of memory, before the first of them.
            momentum: Of memory, before the first of them.
            inputs: Of the convolution, before the first of them.
            token_mask: Which of them exist, at the left.
            keep: Factors of dropout; by default nothing is dropped.

        Returns:
            The tokens, and what is carried after the last one that exists.
        """
        normed = self.memory_norm(x)
        projected = self.memory.project(normed, inputs, token_mask)
        update, learned = self.memory(normed, Learned(weights, momentum), projected)
        return self._finish(x, update, keep), *learned, projected.inputs

    def advance(
        self,
        x: Float[Tensor, "B L D"],
        weights: Weights,
        momentum: Weights,
        inputs: Float[Tensor, "B P I"],
        token_mask: Bool[Tensor, "B L"],
    ) -> tuple[Weights, Weights, Float[Tensor, "B P I"]]:
        """What :meth:`forward` carries on, without reading."""
        projected = self.memory.project(self.memory_norm(x), inputs, token_mask)
        return *self.memory.learn(Learned(weights, momentum), projected), projected.inputs

    def decode(
        self,
        x: Float[Tensor, "B T D"],
        weights: Weights,
        momentum: Weights,
        inputs: Float[Tensor, "B P I"],
        first: Weights,
        place: Int[Tensor, " B"],
        token_mask: Bool[Tensor, "B T"],
    ) -> tuple[Tensor, ...]:
        """Run the block on the next tokens of a segment; return them, and all that was given about those before, after
        them."""
        normed = self.memory_norm(x)
        projected = self.memory.project(normed, inputs, token_mask)
        update, learned, first, place = self.memory.decode(normed, Learned(weights, momentum), first, place, projected)
        return self._finish(x, update, None), *learned, projected.inputs, first, place

    def _finish(
        self, x: Float[Tensor, "B L D"], update: Float[Tensor, "B L D"], keep: Keep | None
    ) -> Float[Tensor, "B L D"]:
        x = add_update(x, update, keep, 0)
        return add_update(x, self.ffn(self.ffn_norm(x)), keep, 1)
