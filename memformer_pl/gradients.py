"""Ways to a gradient through the segments of a window, all with the signature of
:func:`~memformer_pl.replay.replay_backward`.

Each adds to ``.grad``, returns the sum of the losses and the last state without a graph, draws the same random
numbers, and leaves the default random streams in the same place. So they can be exchanged by name: the first three
give the same gradient at different costs in time and memory.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memformer_pl.recurrence import State, detach
from memformer_pl.replay import Advance, Step, backward, check_rollout, replay_backward

X = TypeVar("X")
S = TypeVar("S", bound=State)


class Gradient(Protocol):
    """Adds the gradient of a window's summed loss to every ``.grad``; see
    :func:`~memformer_pl.replay.replay_backward`."""

    def __call__(
        self, step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None
    ) -> tuple[Tensor, S]: ...


def bptt(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None
) -> tuple[Tensor, S]:
    """Plain back-propagation through time: the graphs of all segments are held at once. ``advance`` is not needed."""
    check_rollout(segments, state)
    losses = []
    for segment in segments:
        loss, state = step(segment, state)
        losses.append(loss)
    total = sum(losses[1:], losses[0])
    backward([(total, None)])
    return total.detach(), detach(state)


def checkpointed(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None
) -> tuple[Tensor, S]:
    """Back-propagation through time with a gradient checkpoint at each segment. ``advance`` is not needed."""

    def recomputed(segment: X, state: S) -> tuple[Tensor, S]:
        loss, leaving = checkpoint(step, segment, state, use_reentrant=False)
        return loss, leaving

    return bptt(recomputed, segments, state)


def cut(step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None) -> tuple[Tensor, S]:
    """Back-propagation inside each segment alone: no gradient crosses a border. ``advance`` is not needed.

    What only later segments read, such as Memformer's writer, is not trained.
    """
    check_rollout(segments, state)
    losses = []
    for segment in segments:
        loss, state = step(segment, detach(state))
        backward([(loss, None)])
        losses.append(loss.detach())
    return sum(losses[1:], losses[0]), detach(state)


GRADIENTS: dict[str, Gradient] = {
    "replay": replay_backward,
    "bptt": bptt,
    "checkpointed": checkpointed,
    "cut": cut,
}
