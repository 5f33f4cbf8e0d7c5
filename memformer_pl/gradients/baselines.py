"""Alternatives to memory replay, with the signature of :func:`~memformer_pl.gradients.replay_backward`.

Each adds to ``.grad``, returns the sum of the losses and the last state without a graph, draws the same random numbers,
and leaves the default random streams in the same place. All but :func:`truncated` compute the same gradient. None uses
``advance`` or ``growing``.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memformer_pl.gradients.accumulate import backward, parameters_of
from memformer_pl.gradients.replay import Advance, Step, check_rollout, run
from memformer_pl.gradients.side_effects import SideEffects, modules_of, restored
from memformer_pl.gradients.structure import Path, flatten

X = TypeVar("X")
S = TypeVar("S")


def bptt(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None, growing: Any = None
) -> tuple[Tensor, S]:
    """Plain back-propagation through time: holds the graphs of all segments at once."""
    entering, losses = check_rollout(segments, state), []
    for t in range(len(segments)):
        loss, entering = run(step, segments[t], entering)
        losses.append(loss)
    total = sum(losses[1:], losses[0])
    backward([(total, None)], groups=[])
    return total.detach(), entering.detach().build()


def checkpointed(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None, growing: Any = None
) -> tuple[Tensor, S]:
    """Back-propagation through time with a gradient checkpoint at each segment."""
    side_effects, calls = SideEffects(step), count()

    def recomputed(segment: X, state: S) -> tuple[Tensor, S]:
        buffers, entering = side_effects.buffers(), flatten(state, what="state")

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), restored(side_effects, buffers)

        def call(segment: X, leaves: dict[Path, Any], placed: list[Tensor]) -> tuple[Tensor, S]:
            # torch restores the streams of the devices of the arguments, so ``placed`` is one
            # a step may change its containers, so each call has its own
            return step(segment, entering._replace(leaves=leaves).build())

        # what a module makes in its first call is not a change
        with side_effects.watched() if next(calls) else nullcontext():
            returned: tuple[Tensor, S] = checkpoint(
                call, segment, entering.leaves, side_effects.placed, use_reentrant=False, context_fn=contexts
            )
        return returned

    result = bptt(recomputed, segments, state)
    side_effects.end_rollout()
    return result


def truncated(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None, growing: Any = None
) -> tuple[Tensor, S]:
    """Back-propagation inside each segment: no gradient crosses to the previous one.

    Parameters that affect only later segments, such as those of Memformer's writer, get no gradient.
    """
    entering = check_rollout(segments, state)
    parameters = parameters_of(modules_of(step))
    losses = []
    for t in range(len(segments)):
        loss, entering = run(step, segments[t], entering.detach())
        backward([(loss, None)], parameters)
        losses.append(loss.detach())
    return sum(losses[1:], losses[0]), entering.detach().build()
