"""Memory replay back-propagation (MRBP): exact back-propagation through segments that stores only their states.

Works with any ``step(segment, state) -> (loss, state)`` in plain torch::

    def step(segment, state):
        inputs, targets = segment
        outputs, state = lstm(inputs, state)
        return mse_loss(outputs, targets), state

    loss, state = replay_backward(step, segments, state)
    optimizer.step()

Source: Algorithm 1 of the paper, with two changes that do not affect the gradient. The pass without gradient computes
only the next state, and one backward call per segment covers both loss and state, so autograd walks their shared graph
once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from memformer_pl.contract import State, as_state, carries_gradient, detach
from memformer_pl.contract.checks import check_loss, check_next_state, check_repeated, form, is_state, pair
from memformer_pl.errors import UsageError
from memformer_pl.gradients.accumulate import backward, parameters_of
from memformer_pl.gradients.side_effects import Captured, SideEffects

X = TypeVar("X")
S = TypeVar("S", bound=State)

Step = Callable[[X, S], tuple[Tensor, S]]
"""Reads a segment; returns a scalar loss, and the state for the next segment."""
Advance = Callable[[X, S], S]
"""Returns the next state of the step, at less cost."""


def replay_backward(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None
) -> tuple[Tensor, S]:
    """Add the gradient of the summed losses to every ``.grad``, holding one segment's graph and all states.

    The gradient, the random numbers (dropout) and the final position of the default random streams are those of a plain
    loop over ``step`` with one backward call. The gradients of a segment are added to ``.grad`` together, at the end of
    its backward pass. They are in memory until then, which raises the peak where parameters are larger than the graph
    of a segment.

    Args:
        step: Reads a segment. It may depend on its arguments, parameters, torch's default random streams and the
            buffers of its modules, but not on random numbers of Python or NumPy, nor on an attribute that it changes.
            Buffers that change, such as running averages, see the segments once and in order, if
            :func:`~memformer_pl.gradients.side_effects.modules_of` finds their module. Hooks on a weight's gradient
            run once per segment; those that run after accumulation see the sum so far.
        segments: Arguments of ``step``, in order; at least one. A list, or anything with a length and integer
            indices; each segment is fetched several times.
        state: A tuple of tensors, plain or named; ``step`` returns one with the same number of fields. Integer and
            boolean fields carry no gradient. If it has a graph, the gradient flows on into it.
        advance: Returns the next state alone. It must draw the random numbers that ``step`` draws on the way to the
            next state, and leave the random stream where ``step`` leaves it. By default the whole step.

    Returns:
        The sum of the losses and the last state, both without a graph.

    Raises:
        UsageError: There is no segment, or gradients are switched off.
        TypeError: The state is not a tuple of tensors, ``segments`` cannot be indexed, or ``step`` or ``advance``
            returns other types than it should.
    """
    return _replay(step, segments, state, advance, every=1)


def sparse_replay_backward(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None
) -> tuple[Tensor, S]:
    """The same gradient with one segment's graph and about ``2 sqrt(T)`` of ``T`` states, at one more ``advance`` each.

    The first pass stores the state that enters every ``sqrt(T)``-th segment; those between are recomputed when needed.
    """
    check_rollout(segments, state)
    return _replay(step, segments, state, advance, every=math.isqrt(len(segments) - 1) + 1)


def _replay(
    step: Step[X, S], segments: Sequence[X], state: S, advance: Advance[X, S] | None, *, every: int
) -> tuple[Tensor, S]:
    check_rollout(segments, state)
    side_effects = SideEffects(step, advance)
    parameters = parameters_of(side_effects.modules)

    def ahead(t: int, state: S) -> S:
        if advance is None:
            return checked(step(segments[t], state), state)[1]
        next_state = advance(segments[t], state)
        check_next_state(next_state, state, by="advance")
        return next_state

    def capture(t: int, state: S) -> Captured:
        return side_effects.capture((segments[t], state))

    stored, captured = _run_ahead(ahead, capture, range(len(segments)), state, every=every)
    last_state, after = state, captured[-1]
    losses = torch.empty(0)
    grads: list[Tensor | None] = [None] * len(state)
    later_form: str | None = None
    for first in reversed(range(0, len(segments), every)):
        captured.pop().restore()
        part = range(first, min(first + every, len(segments)))
        entering_states, captured_in_part = _run_ahead(ahead, capture, part, stored.pop(), every=1)
        for t in reversed(part):
            captured_in_part.pop().restore()
            entering = leaf(entering_states.pop(), carries=[t > 0 or tensor.requires_grad for tensor in state])
            loss, next_state = checked(step(segments[t], entering), entering)
            check_repeated(next_state, later_form, ahead="advance" if advance else "step")
            if t == len(segments) - 1:
                last_state, after = detach(next_state), capture(t, next_state)
                # one tensor for all losses: small tensors that stay would fragment the memory freed around them
                losses = loss.new_empty(len(segments))
            backward([(loss, None), *_with_grad(next_state, grads)], [*parameters, entering])
            losses = losses.to(torch.promote_types(losses.dtype, loss.dtype))
            losses[t] = loss.detach()
            grads, later_form = [tensor.grad for tensor in entering], form(entering)
            del entering, loss, next_state  # free this segment's graph before the next one is built
    side_effects.end_rollout()
    after.restore()
    backward(_with_grad(state, grads), parameters)
    return losses.sum(), last_state


def check_rollout(segments: Sequence[X], state: State) -> None:
    """Raise if there are no segments, if gradients are off, or if the state is not a flat tuple of tensors."""
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
        raise UsageError("gradients are switched off here, so no gradient can be added: leave torch.no_grad()")


def checked(returned: object, entering: S) -> tuple[Tensor, S]:
    """Unpack and check the loss, as a scalar, and the next state that a step returned.

    Raises:
        TypeError: It returned other types.
    """
    loss, next_state = pair(returned, by="step", first="loss")
    check_loss(loss, by="step")
    check_next_state(next_state, entering, by="step")
    return loss.reshape(()) if loss.dim() else loss, next_state


def _run_ahead(
    ahead: Callable[[int, S], S], capture: Callable[[int, S], Captured], part: range, state: S, *, every: int
) -> tuple[list[S], list[Captured]]:
    """Run without gradient; return the state that enters every ``every``-th segment of ``part``, and its capture."""
    entering, captured = [state], [capture(part.start, state)]
    with torch.no_grad():
        for t in part[: (len(part) - 1) // every * every]:
            state = ahead(t, state)
            if (t + 1 - part.start) % every == 0:
                entering.append(state)
                captured.append(capture(t + 1, state))
    torch.clear_autocast_cache()  # weights that were cast without a graph would get no gradient in the second pass
    return entering, captured


def leaf(state: S, *, carries: Sequence[bool]) -> S:
    """Copy a state as leaves of a new graph; fields that carry a gradient collect it."""
    fields = zip(state, carries, strict=True)
    return as_state(
        state, (tensor.detach().requires_grad_(carry and carries_gradient(tensor)) for tensor, carry in fields)
    )


def _with_grad(state: State, grads: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
    return [(tensor, grad) for tensor, grad in zip(state, grads, strict=True) if grad is not None]
