"""Memory replay for a step of two parts: several segments are read in one batch.

What leads to the next state, such as Memformer's encoder and writer, goes from segment to segment. What a loss needs
beyond that, such as its decoder, does not: as soon as several segments are encoded, their losses can be had at once. So
the first pass, which runs the encoder anyway, reads too: it takes the gradient of a group of losses, and keeps of it
what the encoded segments are asked for. The second pass is that of :func:`~memformer_pl.gradients.replay.replay_backward`,
without a decoder.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from memformer_pl.contract.checks import check_encoded, check_loss, check_next_state, pair
from memformer_pl.contract import State
from memformer_pl.gradients.replay import backward, check_rollout, leaf, replay_backward

X = TypeVar("X")
S = TypeVar("S", bound=State)
E = TypeVar("E", bound=State)


def replay_in_groups(
    encode: Callable[[X, S], tuple[E, S]],
    read: Callable[[Sequence[X], Sequence[E]], Tensor],
    segments: Sequence[X],
    state: S,
    *,
    group: int,
) -> tuple[Tensor, S]:
    """Add to every ``.grad`` what replay of whole steps would, in the memory of ``group`` decoders and one encoder.

    For each segment its state is stored, and the gradient of what it is encoded to.

    Args:
        encode: What ``read`` needs of a segment, a tuple of tensors, and the state for the next segment. Depends on
            nothing but what a step may depend on there.
        read: The summed loss of several segments, given what they are encoded to. Draws nothing from the default
            random streams.
        segments: What ``encode`` takes, in order; at least one.
        state: As for :func:`~memformer_pl.gradients.replay.replay_backward`.
        group: How many segments are read at once; at least 1.

    Returns, and raises, what :func:`~memformer_pl.gradients.replay.replay_backward` does.
    """
    waiting: list[tuple[X, E]] = []
    asked: list[list[Tensor | None]] = []
    losses: list[Tensor] = []

    @torch.enable_grad()
    def read_waiting() -> None:
        torch.clear_autocast_cache()  # the first pass may have cast, without a graph, a weight that is read with
        leaves = [leaf(encoded, carries=[True] * len(encoded)) for _, encoded in waiting]
        loss = read([segment for segment, _ in waiting], leaves)
        check_loss(loss, by="read")
        backward([(loss, None)])
        losses.append(loss.detach().reshape(()))
        asked.extend([tensor.grad for tensor in encoded] for encoded in leaves)
        waiting.clear()

    def advance(numbered: tuple[int, X], state: S) -> S:
        encoded, next_state = _encoded(encode, numbered[1], state)
        waiting.append((numbered[1], encoded))
        if len(waiting) == group:
            read_waiting()
        return next_state

    def step(numbered: tuple[int, X], state: S) -> tuple[Tensor, S]:
        t, segment = numbered
        encoded, next_state = _encoded(encode, segment, state)
        if len(asked) <= t:  # the last segment, which the first pass leaves out
            waiting.append((segment, encoded))
            read_waiting()
        return _with_gradient(encoded, asked.pop()), next_state

    check_rollout(segments, state)
    numbered = [(t, segments[t]) for t in range(len(segments))]
    _, last = replay_backward(step, numbered, state, advance=advance)
    return torch.stack(losses).sum(), last


def _encoded(encode: Callable[[X, S], tuple[E, S]], segment: X, state: S) -> tuple[E, S]:
    encoded, next_state = pair(encode(segment, state), by="encode", first="encoded")
    check_encoded(encoded, by="encode")
    check_next_state(next_state, state, by="encode")
    return encoded, next_state


def _with_gradient(tensors: State, grads: Sequence[Tensor | None]) -> Tensor:
    """A scalar whose gradient for each tensor is the one given."""
    pairs = [(tensor, grad) for tensor, grad in zip(tensors, grads, strict=True) if grad is not None]
    # the real part of the product with the conjugate: so it is for complex numbers
    products = [(tensor * grad.conj()).real.sum() for tensor, grad in pairs]
    return torch.stack(products).sum() if products else torch.zeros(())
