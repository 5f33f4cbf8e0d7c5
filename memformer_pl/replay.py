"""Memory replay back-propagation (MRBP): exact back-propagation through segments that stores only their states.

It knows no model of this package and no Lightning. Any ``step(segment, state) -> (loss, state)`` will do::

    def step(segment, state):
        inputs, targets = segment
        outputs, state = lstm(inputs, state)
        return mse_loss(outputs, targets), state

    loss, state = replay_backward(step, segments, state)
    optimizer.step()

Source: Algorithm 1 of the paper, with two changes that leave the gradient as it is. The pass without gradient runs
only what leads to the next state, and the two backward calls of a segment are one, so that what loss and state have in
common is walked once.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from memformer_pl.errors import UsageError
from memformer_pl.randomness import RandomState
from memformer_pl.recurrence import State, detach, like

X = TypeVar("X")
S = TypeVar("S", bound=State)

Step = Callable[[X, S], tuple[Tensor, S]]
"""Reads a segment: a scalar loss, and the state for the next segment."""
Advance = Callable[[X, S], S]
"""The state that the step would return, at less cost."""


def replay_backward(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None
) -> tuple[Tensor, S]:
    """Add to every ``.grad`` what ``sum(losses).backward()`` would, in the memory of one segment and all states.

    Random numbers (dropout) are those that a plain loop over ``step`` would draw, in both passes, and the default
    random streams are left where that loop leaves them.

    Args:
        step: Reads a segment. Must depend on nothing but its arguments, parameters and the default random streams.
        segments: What ``step`` takes, in order; at least one.
        state: A tuple of tensors, plain or named. Fields without floating point carry no gradient. Where it has a
            graph of its own, the gradient flows on into it.
        advance: The next state alone. Must draw the random numbers that ``step`` draws on the way to the next state,
            and leave the random stream where ``step`` leaves it. By default the whole step.

    Returns:
        The sum of the losses and the last state, both without a graph.

    Raises:
        UsageError: There is no segment.
        TypeError: The state is not a tuple of tensors.
    """
    return _replay(step, segments, state, advance, every=1)


def thinned_replay_backward(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None
) -> tuple[Tensor, S]:
    """The same in the memory of one segment and about ``2 sqrt(T)`` of ``T`` states, for one more pass of ``advance``.

    The first pass keeps the states in which every ``sqrt(T)``-th segment is entered; those between are computed again
    when their turn comes.
    """
    return _replay(step, segments, state, advance, every=math.isqrt(max(len(segments) - 1, 0)) + 1)


def _replay(
    step: Step[X, S], segments: Sequence[X], state: S, advance: Advance[X, S] | None, *, every: int
) -> tuple[Tensor, S]:
    check_rollout(segments, state)
    ahead = advance or (lambda segment, state: step(segment, state)[1])
    kept, kept_streams = _run_ahead(ahead, segments, state, every=every)
    last, after = state, kept_streams[-1]
    losses = torch.empty(0)
    grads: list[Tensor | None] = [None] * len(state)
    for first in reversed(range(0, len(segments), every)):
        kept_streams.pop().restore()
        entering, streams = _run_ahead(ahead, segments[first : first + every], kept.pop(), every=1)
        for t in reversed(range(first, first + len(entering))):
            streams.pop().restore()
            begun = leaf(entering.pop(), carries=[t > 0 or tensor.requires_grad for tensor in state])
            loss, leaving = step(segments[t], begun)
            if t == len(segments) - 1:
                last, after = detach(leaving), RandomState.capture((segments[t], leaving))
                # in one block: single numbers that stay would hold apart the large blocks that are freed around them
                losses = loss.new_empty(len(segments))
            backward([(loss, None), *_with_grad(leaving, grads)])
            losses[t] = loss.detach()
            grads = [tensor.grad for tensor in begun]
            del begun, loss, leaving  # nothing of this segment lives on beside the next one
    after.restore()
    backward(_with_grad(state, grads))
    return losses.sum(), last


def check_rollout(segments: Sequence[X], state: State) -> None:
    """Raise where there is nothing to read, or where the state is no flat tuple of tensors."""
    if not len(segments):
        raise UsageError("segments is empty: a rollout has at least one segment")
    if not isinstance(state, tuple) or not all(isinstance(tensor, Tensor) for tensor in state):
        fields = [type(field).__name__ for field in state] if isinstance(state, tuple) else type(state).__name__
        raise TypeError(f"state must be a flat tuple of tensors, got {fields}")


def backward(roots: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """One backward call from all ``(root, gradient)`` that have a graph; the gradient of a scalar may be None."""
    reached = [(root, grad) for root, grad in roots if root.requires_grad]
    if reached:
        torch.autograd.backward([root for root, _ in reached], [grad for _, grad in reached])


def _run_ahead(
    advance: Advance[X, S], segments: Sequence[X], state: S, *, every: int
) -> tuple[list[S], list[RandomState]]:
    """The state, and the place of the random streams, in which the first segment and every ``every``-th after it is
    entered."""
    entering, streams = [state], [RandomState.capture((segments[0], state))]
    with torch.no_grad():
        for t in range(1, 1 + (len(segments) - 1) // every * every):
            state = advance(segments[t - 1], state)
            if t % every == 0:
                entering.append(state)
                streams.append(RandomState.capture((segments[t], state)))
    torch.clear_autocast_cache()  # weights that were cast without a graph would get no gradient in the second pass
    return entering, streams


def leaf(state: S, *, carries: Sequence[bool]) -> S:
    """The same values as leaves of a new graph, which collect a gradient in the fields that carry one."""
    fields = zip(state, carries, strict=True)
    return like(
        state, (tensor.detach().requires_grad_(carry and tensor.is_floating_point()) for tensor, carry in fields)
    )


def _with_grad(state: State, grads: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
    return [(tensor, grad) for tensor, grad in zip(state, grads, strict=True) if grad is not None]
