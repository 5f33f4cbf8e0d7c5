"""Memory replay for a step with a separate decoder: several segments are decoded in one batch.

The part that leads to the next state, such as Memformer's encoder and writer, must run segment by segment. The decoder
can compute the losses of several segments together once they are encoded. So the first pass, which runs the encoder
anyway, also decodes: it back-propagates the losses of a group and stores the gradients of the encoded segments. The
second pass is that of :func:`~memformer_pl.gradients.replay_backward`, without a decoder.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from memformer_pl.contract import State, as_state
from memformer_pl.contract.checks import check_encoded, check_loss, check_next_state, pair
from memformer_pl.gradients.accumulate import backward, parameters_of
from memformer_pl.gradients.replay import check_rollout, replay_backward
from memformer_pl.gradients.side_effects import modules_of
from memformer_pl.gradients.structure import leaf_of

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

    Stores for each segment the entering state and the gradient of the encoded segment.

    Args:
        encode: Returns the encoded segment, a tuple of tensors, and the state for the next segment. It may depend on
            the same things as a step.
        decode: Returns the summed loss of several segments, given the segments and their encodings. It must not draw
            from the default random streams.
        segments: Arguments of ``encode``, in order; at least one.
        state: As for :func:`~memformer_pl.gradients.replay_backward`.
        group: Number of segments that are decoded at once; at least 1.

    Returns and raises the same as :func:`~memformer_pl.gradients.replay_backward`.
    """
    waiting: list[tuple[X, E]] = []
    encoded_grads: list[list[Tensor | None]] = []
    losses: list[Tensor] = []
    parameters = parameters_of(modules_of(decode))

    @torch.enable_grad()
    def decode_waiting() -> None:
        torch.clear_autocast_cache()  # the first pass may have cast a weight of the decoder without a graph
        leaves = [as_state(encoded, (leaf_of(field, carries=True) for field in encoded)) for _, encoded in waiting]
        loss = decode([segment for segment, _ in waiting], leaves)
        check_loss(loss, by="decode")
        backward([(loss, None)], [*parameters, *leaves])
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
        return _resume(encoded, encoded_grads.pop()), next_state

    check_rollout(segments, state)
    numbered = [(t, segments[t]) for t in range(len(segments))]
    _, last = replay_backward(step, numbered, state, advance=advance)
    return torch.stack(losses).sum(), last


def _encoded(encode: Callable[[X, S], tuple[E, S]], segment: X, state: S) -> tuple[E, S]:
    encoded, next_state = pair(encode(segment, state), by="encode", first="encoded")
    check_encoded(encoded, by="encode")
    check_next_state(next_state, state, by="encode")
    return encoded, next_state


def _resume(tensors: State, grads: Sequence[Tensor | None]) -> Tensor:
    """A scalar with the gradients ``grads``: its backward call continues a pass that stopped at ``tensors``."""
    pairs = [(tensor, grad) for tensor, grad in zip(tensors, grads, strict=True) if grad is not None]
    # for complex numbers, the real part of the product with the conjugate
    products = [(tensor * grad.conj()).real.sum() for tensor, grad in pairs]
    return torch.stack(products).sum() if products else torch.zeros(())
