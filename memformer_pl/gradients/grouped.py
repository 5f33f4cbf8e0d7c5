"""Memory replay for a step with a separate decoder: several segments are decoded in one batch.

The part that leads to the next state, such as Memformer's encoder and writer, must go from segment to segment. The
decoder need not: once several segments are encoded, it can compute their losses together. So the first pass, which runs
the encoder anyway, decodes too: it back-propagates the losses of a group, and stores the gradients that arrive at the
encoded segments. The second pass is that of :func:`~memformer_pl.gradients.replay_backward`, without a decoder.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from memformer_pl.contract import State
from memformer_pl.contract.checks import check_encoded, check_loss, check_next_state, pair
from memformer_pl.gradients.replay import backward, check_rollout, leaf, replay_backward

X = TypeVar("X")
S = TypeVar("S", bound=State)
E = TypeVar("E", bound=State)


def replay_in_groups(
    encode: Callable[[X, S], tuple[E, S]],
    decode: Callable[[Sequence[X], Sequence[E]], Tensor],
    segments: Sequence[X],
    state: S,
    *,
    group: int,
) -> tuple[Tensor, S]:
    """Add to every ``.grad`` what replay of whole steps would, holding one encoder's graph and ``group`` decoders'.

    For each segment it stores the entering state, and the gradient of the encoded segment.

    Args:
        encode: Returns what ``decode`` needs of a segment, a tuple of tensors, and the state for the next segment. It
            may depend on what a step may depend on.
        decode: Returns the summed loss of several segments, given what they are encoded to. Draws nothing from the
            default random streams.
        segments: What ``encode`` takes, in order; at least one.
        state: As for :func:`~memformer_pl.gradients.replay_backward`.
        group: How many segments are decoded at once; at least 1.

    Returns, and raises, what :func:`~memformer_pl.gradients.replay_backward` does.
    """
    waiting: list[tuple[X, E]] = []
    encoded_grads: list[list[Tensor | None]] = []
    losses: list[Tensor] = []

    @torch.enable_grad()
    def decode_waiting() -> None:
        torch.clear_autocast_cache()  # the first pass may have cast a weight of the decoder without a graph
        leaves = [leaf(encoded, carries=[True] * len(encoded)) for _, encoded in waiting]
        loss = decode([segment for segment, _ in waiting], leaves)
        check_loss(loss, by="decode")
        backward([(loss, None)])
        losses.append(loss.detach().reshape(()))
        encoded_grads.extend([tensor.grad for tensor in encoded] for encoded in leaves)
        waiting.clear()

    def advance(numbered: tuple[int, X], state: S) -> S:
        encoded, next_state = _encoded(encode, numbered[1], state)
        waiting.append((numbered[1], encoded))
        if len(waiting) == group:
            decode_waiting()
        return next_state

    def step(numbered: tuple[int, X], state: S) -> tuple[Tensor, S]:
        t, segment = numbered
        encoded, next_state = _encoded(encode, segment, state)
        if len(encoded_grads) <= t:  # the first pass leaves out the last segment
            waiting.append((segment, encoded))
            decode_waiting()
        return _with_gradient(encoded, encoded_grads.pop()), next_state

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
    """A scalar whose gradient is ``grads``: its backward call continues one that stopped at ``tensors``."""
    pairs = [(tensor, grad) for tensor, grad in zip(tensors, grads, strict=True) if grad is not None]
    # for complex numbers, the real part of the product with the conjugate
    products = [(tensor * grad.conj()).real.sum() for tensor, grad in pairs]
    return torch.stack(products).sum() if products else torch.zeros(())
