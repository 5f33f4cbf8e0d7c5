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
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from memformer_pl.contract.checks import check_loss, check_next_state, check_repeated, form, is_state, pair
from memformer_pl.errors import UsageError
from memformer_pl.contract import State, carries_gradient, detach, as_state
from memformer_pl.gradients.side_effects import Captured, Surroundings

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
        step: Reads a segment. Must depend on nothing but its arguments, parameters, torch's default random streams and
            the buffers of its modules: not on the random numbers of Python or NumPy, nor on an attribute that it
            changes. Buffers that change, such as running averages, see the segments once and in order, if
            :func:`~memformer_pl.gradients.side_effects.modules_of` finds their module. Hooks on a weight's gradient are called
            once for each segment.
        segments: What ``step`` takes, in order; at least one. A list, or all else that has a length and is indexed by
            numbers; one that makes its segments is asked for each of them several times.
        state: A tuple of tensors, plain or named; ``step`` returns one of as many fields. Integer and boolean
            fields carry no gradient. Where it has a graph of its own, the gradient flows on into it.
        advance: The next state alone. Must draw the random numbers that ``step`` draws on the way to the next state,
            and leave the random stream where ``step`` leaves it. By default the whole step.

    Returns:
        The sum of the losses and the last state, both without a graph.

    Raises:
        UsageError: There is no segment, or gradients are switched off.
        TypeError: The state is not a tuple of tensors, ``segments`` cannot be indexed, or ``step`` or ``advance``
            returns something else than it should.
    """
    return _replay(step, segments, state, advance, every=1)


def sparse_replay_backward(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None
) -> tuple[Tensor, S]:
    """The same in the memory of one segment and about ``2 sqrt(T)`` of ``T`` states, for one more pass of ``advance``.

    The first pass keeps the states in which every ``sqrt(T)``-th segment is entered; those between are computed again
    when their turn comes.
    """
    check_rollout(segments, state)
    return _replay(step, segments, state, advance, every=math.isqrt(len(segments) - 1) + 1)


def _replay(
    step: Step[X, S], segments: Sequence[X], state: S, advance: Advance[X, S] | None, *, every: int
) -> tuple[Tensor, S]:
    check_rollout(segments, state)
    surroundings = Surroundings(step, advance)

    def ahead(t: int, state: S) -> S:
        if advance is None:
            return checked(step(segments[t], state), state)[1]
        next_state = advance(segments[t], state)
        check_next_state(next_state, state, by="advance")
        return next_state

    def capture(t: int, state: S) -> Captured:
        return surroundings.capture((segments[t], state))

    kept, places = _run_ahead(ahead, capture, range(len(segments)), state, every=every)
    last, after = state, places[-1]
    losses = torch.empty(0)
    grads: list[Tensor | None] = [None] * len(state)
    follows: str | None = None
    for first in reversed(range(0, len(segments), every)):
        places.pop().restore()
        part = range(first, min(first + every, len(segments)))
        entering, entered = _run_ahead(ahead, capture, part, kept.pop(), every=1)
        for t in reversed(part):
            entered.pop().restore()
            begun = leaf(entering.pop(), carries=[t > 0 or tensor.requires_grad for tensor in state])
            loss, next_state = checked(step(segments[t], begun), begun)
            check_repeated(next_state, follows, ahead="advance" if advance else "step")
            if t == len(segments) - 1:
                last, after = detach(next_state), capture(t, next_state)
                # in one block: single numbers that stay would hold apart the large blocks that are freed around them
                losses = loss.new_empty(len(segments))
            backward([(loss, None), *_with_grad(next_state, grads)])
            losses = losses.to(torch.promote_types(losses.dtype, loss.dtype))
            losses[t] = loss.detach()
            grads, follows = [tensor.grad for tensor in begun], form(begun)
            del begun, loss, next_state  # nothing of this segment lives on beside the next one
    surroundings.judge()
    after.restore()
    backward(_with_grad(state, grads))
    return losses.sum(), last


def check_rollout(segments: Sequence[X], state: State) -> None:
    """Raise where there is nothing to read, or no gradient to take, or where the state is no flat tuple of tensors."""
    indexed = hasattr(segments, "__len__") and hasattr(segments, "__getitem__") and not isinstance(segments, Mapping)
    if not indexed or (isinstance(segments, Tensor) and not segments.dim()):
        given = type(segments).__name__
        raise TypeError(
            f"segments must be a list, or have a length and be indexed by numbers, got {given}: pass list(segments)"
        )
    if not len(segments):
        raise UsageError("segments is empty: a rollout has at least one segment")
    if not is_state(state):
        fields = [type(field).__name__ for field in state] if isinstance(state, tuple) else type(state).__name__
        raise TypeError(f"state must be a flat tuple of tensors, got {fields}")
    try:
        as_state(state, state)
    except TypeError as error:
        raise TypeError(f"state must be a plain or a named tuple: {type(state).__name__}(fields) fails") from error
    if not torch.is_grad_enabled():
        raise UsageError("gradients are switched off here, so there would be none: leave torch.no_grad()")


def checked(returned: object, entering: S) -> tuple[Tensor, S]:
    """The loss, as a scalar, and the next state that a step has returned for a state.

    Raises:
        TypeError: It returned something else.
    """
    loss, next_state = pair(returned, by="step", first="loss")
    check_loss(loss, by="step")
    check_next_state(next_state, entering, by="step")
    return loss.reshape(()) if loss.dim() else loss, next_state


def backward(roots: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """One backward call from all ``(root, gradient)`` that have a graph; the gradient of a scalar may be None."""
    reached = [(root, grad) for root, grad in roots if root.requires_grad]
    if reached:
        torch.autograd.backward([root for root, _ in reached], [grad for _, grad in reached])


def _run_ahead(
    ahead: Callable[[int, S], S], capture: Callable[[int, S], Captured], part: range, state: S, *, every: int
) -> tuple[list[S], list[Captured]]:
    """The state, and the surroundings, in which the first segment of a part and every ``every``-th after it is
    entered."""
    entering, entered = [state], [capture(part.start, state)]
    with torch.no_grad():
        for t in part[: (len(part) - 1) // every * every]:
            state = ahead(t, state)
            if (t + 1 - part.start) % every == 0:
                entering.append(state)
                entered.append(capture(t + 1, state))
    torch.clear_autocast_cache()  # weights that were cast without a graph would get no gradient in the second pass
    return entering, entered


def leaf(state: S, *, carries: Sequence[bool]) -> S:
    """The same values as leaves of a new graph, which collect a gradient in the fields that carry one."""
    fields = zip(state, carries, strict=True)
    return as_state(state, (tensor.detach().requires_grad_(carry and carries_gradient(tensor)) for tensor, carry in fields))


def _with_grad(state: State, grads: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
    return [(tensor, grad) for tensor, grad in zip(state, grads, strict=True) if grad is not None]
