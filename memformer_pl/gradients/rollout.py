"""Ways to a gradient through the segments of a window, all with the signature of
:func:`~memformer_pl.gradients.replay.replay_backward`.

Each adds to ``.grad``, returns the sum of the losses and the last state without a graph, draws the same random
numbers, and leaves the default random streams in the same place. So they can be exchanged by name: all but ``cut``
give the same gradient at different costs in time and memory.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memformer_pl.errors import UsageError
from memformer_pl.gradients.grouped import replay_in_groups
from memformer_pl.contract import (
    SegmentOutput,
    Segment,
    SegmentModel,
    State,
    detach,
    concat_segments,
    concat_states,
)
from memformer_pl.gradients.replay import (
    Advance,
    Step,
    backward,
    check_rollout,
    checked,
    replay_backward,
    sparse_replay_backward,
)
from memformer_pl.errors import require_sizes
from memformer_pl.gradients.side_effects import Surroundings, restored

X = TypeVar("X")
S = TypeVar("S", bound=State)


class Gradient(Protocol):
    """Adds the gradient of a window's summed loss to every ``.grad``; see
    :func:`~memformer_pl.gradients.replay.replay_backward`."""

    def __call__(
        self, step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None
    ) -> tuple[Tensor, S]: ...


def bptt(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None
) -> tuple[Tensor, S]:
    """Plain back-propagation through time: the graphs of all segments are held at once. ``advance`` is not needed."""
    check_rollout(segments, state)
    losses = []
    for t in range(len(segments)):
        loss, state = checked(step(segments[t], state), state)
        losses.append(loss)
    total = sum(losses[1:], losses[0])
    backward([(total, None)])
    return total.detach(), detach(state)


def checkpointed(
    step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None
) -> tuple[Tensor, S]:
    """Back-propagation through time with a gradient checkpoint at each segment. ``advance`` is not needed."""

    surroundings = Surroundings(step)

    def recomputed(segment: X, state: S) -> tuple[Tensor, S]:
        buffers = surroundings.buffers()

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), restored(surroundings, buffers)

        returned: tuple[Tensor, S] = checkpoint(step, segment, state, use_reentrant=False, context_fn=contexts)
        return returned

    found = bptt(recomputed, segments, state)
    surroundings.judge()
    return found


def cut(step: Step[X, S], segments: Sequence[X], state: S, *, advance: Advance[X, S] | None = None) -> tuple[Tensor, S]:
    """Back-propagation inside each segment alone: no gradient crosses a border. ``advance`` is not needed.

    What only later segments read, such as Memformer's writer, is not trained.
    """
    check_rollout(segments, state)
    losses = []
    for t in range(len(segments)):
        begun = detach(state)
        loss, state = checked(step(segments[t], begun), begun)
        backward([(loss, None)])
        losses.append(loss.detach())
    return sum(losses[1:], losses[0]), detach(state)


GRADIENTS: dict[str, Gradient] = {
    "replay": replay_backward,
    "sparse_replay": sparse_replay_backward,
    "bptt": bptt,
    "checkpointed": checkpointed,
    "truncated": cut,
}


def check_gradient(model: SegmentModel, *, gradient: str, decoder_group: int) -> None:
    """Raise a ``UsageError`` where :func:`add_gradient` would not know what to do."""
    if gradient not in GRADIENTS:
        raise UsageError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    require_sizes(decoder_group=decoder_group)
    if decoder_group > 1 and (gradient != "replay" or type(model).decode is SegmentModel.decode):
        given = f"gradient={gradient!r} of a {type(model).__name__}"
        raise UsageError(f"decode_group must be 1 but for replay of a Memformer, got {decode_group} for {given}")


def add_gradient(
    model: SegmentModel[S],
    cost: Callable[[SegmentOutput], Tensor],
    segments: Sequence[Segment],
    state: S,
    *,
    gradient: str,
    decoder_group: int = 1,
) -> tuple[Tensor, S]:
    """Add the gradient of a window to the ``.grad`` of every parameter of a model.

    Args:
        model: Reads the segments.
        cost: What a reading adds to the loss; of several segments together, the sum.
        segments: Of the window.
        state: In which the first is entered.
        gradient: Of :data:`GRADIENTS`.
        decode_group: Segments that are decoded in one batch, where :func:`check_gradient` has nothing against it.

    Returns:
        The loss and the last state, both without a graph.
    """

    def step(segment: Segment, state: S) -> tuple[Tensor, S]:
        reading, next_state = model(segment, state)
        return cost(reading), next_state

    def read(segments: Sequence[Segment], encoded: Sequence[State]) -> Tensor:
        return cost(model.decode(concat_segments(segments), concat_states(encoded)))

    if decoder_group > 1:
        return replay_in_groups(model.advance_and_encode, read, segments, state, group=decoder_group)
    return GRADIENTS[gradient](step, segments, state, advance=model.advance)
