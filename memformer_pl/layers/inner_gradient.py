"""A memory that is a small network for each head, trained at every token by gradient descent with momentum: the
recurrence of Titans (Behrouz et al. 2024, arXiv 2501.00663, sections 3.1 and 3.2), computed by chunks.

B  lanes     L  tokens     C  tokens of a chunk     H  heads     K  width of a key and of a value
R  layers of a memory     F  hidden units of a memory, or K where it has one layer
X  width of what a layer of a memory is given     Y  width of what it returns
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.layers.delta_rule import Decay, decays

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

    def to(self, dtype: torch.dtype) -> "Lessons":
        """These lessons in a dtype."""
        return Lessons(*(field.to(dtype) for field in self))

    def chunks(self, chunk: int) -> list["Lessons"]:
        """The lessons of ``chunk`` tokens after another; the last chunk may be shorter."""
        return [Lessons(*part) for part in zip(*(torch.split(field, chunk, dim=2) for field in self), strict=True)]


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


def answer(weights: Weights, queries: Float[Tensor, "B H L K"]) -> Float[Tensor, "B H L K"]:
    """What a memory returns that does not learn, in the dtype of its weights.

    Args:
        weights: Of the memory.
        queries: What it is asked.
    """
    with torch.autocast(weights.device.type, enabled=False):
        x = queries.to(weights.dtype) @ weights[:, :, 0]
        return x if weights.shape[2] == 1 else (F.gelu(x) * weights.shape[-1] ** -0.5) @ weights[:, :, 1].mT


def read_and_learn(
    learned: Learned, queries: Float[Tensor, "B H L K"], lessons: Lessons, *, chunk: int
) -> tuple[Float[Tensor, "B H L K"], Learned]:
    """Let each token teach memory, and then read it.

    At each token ``S <- eta S - theta G`` and ``W <- (1 - alpha) W + S``, where ``G`` is the gradient at the weights
    before its chunk; it reads ``M_W(q)``. Within a chunk both recurrences are linear, so the weights after each token
    are sums over the chunk; they are never made, only multiplied with what is asked. Computed in the dtype of
    ``learned``, under autocast too.

    Args:
        learned: Weights and momentum before the first token.
        queries: What each token reads with.
        lessons: What each token teaches.
        chunk: Tokens whose gradients are taken at the same weights.

    Returns:
        What each token reads, and weights and momentum after the last.
    """
    read = []
    for query, part in zip(torch.split(queries, chunk, dim=2), lessons.chunks(chunk), strict=True):
        found, learned = read_within_chunk(learned.weights, learned, query, part)
        read.append(found)
    return torch.cat(read, dim=2), learned


def learn(learned: Learned, lessons: Lessons, *, chunk: int) -> Learned:
    """The weights and the momentum that :func:`read_and_learn` returns, bit for bit."""
    with torch.autocast(learned.weights.device.type, enabled=False):
        for part in lessons.to(learned.weights.dtype).chunks(chunk):
            found = gradient(learned.weights, part.keys, part.values)
            learned = _learn(learned, found, part, *_shares(part))
    return learned


def read_within_chunk(
    first: Weights, learned: Learned, queries: Float[Tensor, "B H C K"], lessons: Lessons
) -> tuple[Float[Tensor, "B H C K"], Learned]:
    """:func:`read_and_learn` for some tokens that follow each other in a chunk.

    Args:
        first: Weights before the chunk.
        learned: Weights and momentum before the first of these tokens.
        queries: What each of them reads with.
        lessons: What each of them teaches.
    """
    with torch.autocast(first.device.type, enabled=False):
        lessons = lessons.to(first.dtype)
        momentum, shares = _shares(lessons)
        found = gradient(first, lessons.keys, lessons.values)
        x = _read_layer(queries.to(first.dtype), learned, shares, found, layer=0)
        if first.shape[2] == 2:
            x = _read_layer(F.gelu(x) * first.shape[-1] ** -0.5, learned, shares, found, layer=1)
        return x, _learn(learned, found, lessons, momentum, shares)


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
