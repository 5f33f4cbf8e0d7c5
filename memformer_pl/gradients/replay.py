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
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from memformer_pl.contract.checks import check_loss, pair
from memformer_pl.errors import UsageError
from memformer_pl.gradients.accumulate import backward, parameters_of
from memformer_pl.gradients.growing import GradientBuffers, Storage, axes_of, require_grown
from memformer_pl.gradients.side_effects import Captured, SideEffects
from memformer_pl.gradients.structure import (
    FlatState,
    Path,
    flatten,
    leaf_of,
    require_repeated,
    require_same_kind,
    require_unedited,
    versions,
)

X = TypeVar("X")
S = TypeVar("S")

Step = Callable[[X, S], tuple[Tensor, S]]
"""Reads a segment; returns a scalar loss, and the state for the next segment."""
Advance = Callable[[X, S], S]
"""Returns the next state of the step, at less cost."""


def replay_backward(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None, growing: Any = None
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
        state: Tensors, numbers and None, in tuples, lists, dictionaries, dataclasses, or a cache of transformers, at
            any depth. ``step`` is given containers of its own, which it may change; tensors it may not edit in place.
            It returns the same structure, where None may become anything. Integer and boolean tensors carry no
            gradient. If the state has a graph, the gradient flows on into it.
        advance: Returns the next state alone. It must draw the random numbers that ``step`` draws on the way to the
            next state, and leave the random stream where ``step`` leaves it. By default the whole step.
        growing: Which tensors of the state only gain rows, such as a cache of keys and values: the axis of the rows, or
            None, for the state or for each part of it, as ``in_dims`` of ``torch.vmap``. They are stored once, not once
            for each segment, and their gradient is added up in one buffer.

    Returns:
        The sum of the losses and the last state, both without a graph.

    Raises:
        UsageError: There is no segment, gradients are switched off, or ``growing`` does not fit the state.
        TypeError: The state holds something else, ``segments`` cannot be indexed, ``step`` or ``advance`` returns other
            types than it should, edits the state in place, or changes old rows of a growing tensor.
    """
    return _replay(step, segments, state, advance, growing, every=1)


def sparse_replay_backward(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None, growing: Any = None
) -> tuple[Tensor, S]:
    """The same gradient with one segment's graph and about ``2 sqrt(T)`` of ``T`` states, at one more ``advance`` each.

    The first pass stores the state that enters every ``sqrt(T)``-th segment; those between are recomputed when needed.
    """
    check_rollout(segments, state)
    return _replay(step, segments, state, advance, growing, every=math.isqrt(len(segments) - 1) + 1)


def _replay(
    step: Step[X, S], segments: Sequence[X], state: S, advance: Advance[X, S] | None, growing: Any, *, every: int
) -> tuple[Tensor, S]:
    initial = check_rollout(segments, state)
    side_effects = SideEffects(step, advance)
    parameters = parameters_of(side_effects.modules)
    buffers = GradientBuffers(growing)

    def ahead(t: int, state: FlatState) -> FlatState:
        after = run(step, segments[t], state)[1] if advance is None else next_of(advance, segments[t], state)
        require_grown(after, state, axes_of(after, growing), by="step" if advance is None else "advance")
        return after

    def capture(t: int, state: FlatState) -> Captured:
        return side_effects.capture((segments[t], list(state.leaves.values())))

    def run_ahead(part: range, state: FlatState, every: int) -> tuple[Storage, list[Captured]]:
        return _run_ahead(ahead, capture, part, state, Storage(growing), every=every)

    stored, captured = run_ahead(range(len(segments)), initial, every)
    last_state, after = initial, captured[-1]
    losses = torch.empty(0)
    grads: dict[Path, Tensor] = {}
    later_form: dict[Path, str] | None = None
    for first in reversed(range(0, len(segments), every)):
        captured.pop().restore()
        part = range(first, min(first + every, len(segments)))
        stored_in_part, captured_in_part = run_ahead(part, stored.pop(), 1)
        for t in reversed(part):
            captured_in_part.pop().restore()
            entering, grown = buffers.collect(_leaves(stored_in_part.pop(), like=None if t else initial))
            with side_effects.watched() if t == len(segments) - 1 else nullcontext():
                loss, next_state = run(step, segments[t], entering)
            require_repeated(next_state, later_form, ahead="advance" if advance else "step")
            if t == len(segments) - 1:
                require_grown(next_state, entering, axes_of(next_state, growing), by="step")
                last_state, after = next_state.detach(), capture(t, next_state)
                for storage in (stored, stored_in_part):
                    storage.hold(last_state)
                # one tensor for all losses: small tensors that stay would fragment the memory freed around them
                losses = loss.new_empty(len(segments))
            own = {path: tensor for path, tensor in entering.tensors().items() if path not in grown}
            roots = [(loss, None), *_with_grad(next_state, grads), *buffers.roots(next_state, entering)]
            backward(roots, [*parameters, list(own.values())])
            losses = losses.to(torch.promote_types(losses.dtype, loss.dtype))
            losses[t] = loss.detach()
            grads = {path: tensor.grad for path, tensor in own.items() if tensor.grad is not None}
            later_form = entering.form()
            del entering, own, roots, loss, next_state  # free this segment's graph before the next one is built
    side_effects.end_rollout()
    after.restore()
    backward(_with_grad(initial, grads | buffers.of(initial)), parameters)
    return losses.sum(), last_state.build()


def check_rollout(segments: Sequence[X], state: object) -> FlatState:
    """Return the state, taken apart. Raise if it cannot be, if there are no segments, or if gradients are off."""
    indexed = hasattr(segments, "__len__") and hasattr(segments, "__getitem__") and not isinstance(segments, Mapping)
    if not indexed or (isinstance(segments, Tensor) and not segments.dim()):
        given = type(segments).__name__
        raise TypeError(
            f"segments must be a list, or have a length and be indexed by numbers, got {given}: pass list(segments)"
        )
    if not len(segments):
        raise UsageError("segments is empty: a rollout has at least one segment")
    flat = flatten(state, what="state")
    if not torch.is_grad_enabled():
        raise UsageError("gradients are switched off here, so no gradient can be added: leave torch.no_grad()")
    return flat


def run(step: Step[X, S], segment: X, entering: FlatState) -> tuple[Tensor, FlatState]:
    """Run a step; return its loss, as a scalar, and the next state, taken apart.

    Raises:
        TypeError: It returned other types than it should, or edited the state in place.
    """
    before = versions(entering)
    loss, next_state = pair(step(segment, entering.build()), by="step", first="loss")
    check_loss(loss, by="step")
    return loss.reshape(()) if loss.dim() else loss, _checked(next_state, entering, before, by="step")


def next_of(advance: Advance[X, S], segment: X, entering: FlatState) -> FlatState:
    """Run ``advance``; return the next state, taken apart, with the checks of :func:`run`."""
    before = versions(entering)
    return _checked(advance(segment, entering.build()), entering, before, by="advance")


def _checked(returned: object, entering: FlatState, before: Mapping[Path, int], *, by: str) -> FlatState:
    next_state = flatten(returned, what=f"the next state of {by}")
    require_same_kind(next_state, entering, by=by)
    require_unedited(entering, before, by=by)
    return next_state


def _run_ahead(
    ahead: Callable[[int, FlatState], FlatState],
    capture: Callable[[int, FlatState], Captured],
    part: range,
    state: FlatState,
    stored: Storage,
    *,
    every: int,
) -> tuple[Storage, list[Captured]]:
    """Run without gradient; store the state that enters every ``every``-th segment of ``part``, and its capture."""
    stored.push(state)
    captured = [capture(part.start, state)]
    with torch.no_grad():
        for t in part[: (len(part) - 1) // every * every]:
            state = ahead(t, state)
            if (t + 1 - part.start) % every == 0:
                stored.push(state)
                captured.append(capture(t + 1, state))
    torch.clear_autocast_cache()  # weights that were cast without a graph would get no gradient in the second pass
    return stored, captured


def _leaves(state: FlatState, *, like: FlatState | None) -> FlatState:
    """A state as leaves of a new graph; its numbers collect a gradient, unless those of ``like`` have no graph."""
    return state.map(lambda path, tensor: leaf_of(tensor, carries=like is None or like.leaves[path].requires_grad))


def _with_grad(state: FlatState, grads: Mapping[Path, Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    return [(tensor, grads[path]) for path, tensor in state.tensors().items() if path in grads]
