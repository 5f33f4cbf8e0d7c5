"""Alternatives to memory replay, with the signature of :func:`~memformer_pl.gradients.replay_backward`.

Each adds to ``.grad``, returns the sum of the losses and the last state without a graph, draws the same random numbers,
and leaves the default random streams in the same place. All but :func:`truncated` compute the same gradient.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memformer_pl.contract import State, detach
from memformer_pl.gradients.accumulate import backward, parameters_of
from memformer_pl.gradients.replay import Advance, Step, check_rollout, checked
from memformer_pl.gradients.side_effects import SideEffects, modules_of, restored

X = TypeVar("X")
S = TypeVar("S", bound=State)


def bptt(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None
) -> tuple[Tensor, S]:
    """Plain back-propagation through time: holds the graphs of all segments at once. Does not use ``advance``."""
    check_rollout(segments, state)
    losses = []
    for t in range(len(segments)):
        loss, state = checked(step(segments[t], state), state)
        losses.append(loss)
    total = sum(losses[1:], losses[0])
    backward([(total, None)], groups=[])
    return total.detach(), detach(state)


def checkpointed(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None
) -> tuple[Tensor, S]:
    """Back-propagation through time with a gradient checkpoint at each segment. Does not use ``advance``."""
    side_effects = SideEffects(step)

    def recomputed(segment: X, state: S) -> tuple[Tensor, S]:
        buffers = side_effects.buffers()

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), restored(side_effects, buffers)

        returned: tuple[Tensor, S] = checkpoint(step, segment, state, use_reentrant=False, context_fn=contexts)
        return returned

    result = bptt(recomputed, segments, state)
    side_effects.end_rollout()
    return result


def truncated(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None
) -> tuple[Tensor, S]:
    """Back-propagation inside each segment: no gradient crosses to the previous one. Does not use ``advance``.

    Parameters that affect only later segments, such as those of Memformer's writer, get no gradient.
    """
    check_rollout(segments, state)
    parameters = parameters_of(modules_of(step))
    losses = []
    for t in range(len(segments)):
        entering = detach(state)
        loss, state = checked(step(segments[t], entering), entering)
        backward([(loss, None)], parameters)
        losses.append(loss.detach())
    return sum(losses[1:], losses[0]), detach(state)
