"""Gradient of a model's rollout, by any method in :data:`GRADIENTS`."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from jaxtyping import Float
from torch import Tensor

from memformer_pl.contract import Segment, SegmentModel, SegmentOutput, State
from memformer_pl.contract.segment import segment_weights
from memformer_pl.errors import UsageError, require_sizes
from memformer_pl.gradients.baselines import bptt, checkpointed, truncated
from memformer_pl.gradients.grouped import replay_in_groups
from memformer_pl.gradients.replay import Advance, Step, replay_backward, sparse_replay_backward

X = TypeVar("X")
S = TypeVar("S", bound=State)
Numbered = tuple[int, Segment]
"""A segment, and its number in the rollout."""


class Gradient(Protocol):
    """Add the gradient of a rollout's summed loss to every ``.grad``; see
    :func:`~memformer_pl.gradients.replay_backward`."""

    def __call__(
        self,
        step: Step[X, S],
        segments: Sequence[X],
        state: S,
        *,
        advance: Advance[X, S] | None = None,
        growing: Any = None,
    ) -> tuple[Tensor, S]: ...


GRADIENTS: dict[str, Gradient] = {
    "replay": replay_backward,
    "sparse_replay": sparse_replay_backward,
    "bptt": bptt,
    "checkpointed": checkpointed,
    "truncated": truncated,
}


def check_gradient(model: SegmentModel, *, gradient: str, decoder_group: int) -> None:
    """Raise a ``UsageError`` for an unknown method, or for ``decoder_group > 1`` where it is not supported."""
    if gradient not in GRADIENTS:
        raise UsageError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
    require_sizes(decoder_group=decoder_group)
    able = {
        "replay": type(model).decoder_step is not SegmentModel.decoder_step,
        "truncated": type(model).rollout_step is not SegmentModel.rollout_step,
    }
    if decoder_group > 1 and not able.get(gradient, False):
        raise UsageError(
            "decoder_group > 1 needs gradient='replay' and a model with a separate decoder, such as Memformer, or "
            "gradient='truncated' and a model that reads several segments layer by layer, such as TransformerXL; got "
            f"{decoder_group} with gradient={gradient!r} and model {type(model).__name__}"
        )


def add_gradient(
    model: SegmentModel[S],
    cost: Callable[[SegmentOutput], Tensor],
    segments: Sequence[Segment],
    state: S,
    *,
    gradient: str,
    decoder_group: int = 1,
    keep: Callable[[int, Float[Tensor, "B L"], Float[Tensor, ""]], None] | None = None,
) -> tuple[Tensor, S]:
    """Add the gradient of a rollout to the ``.grad`` of every parameter of a model.

    Args:
        model: Reads the segments.
        cost: Maps an output to a loss; the output of several segments to the sum of their losses. It is given token
            losses that are multiplied with the weights of their segment, where it has some.
        segments: The segments of the rollout.
        state: Enters the first segment.
        gradient: A key of :data:`GRADIENTS`.
        decoder_group: Number of segments that the decoder, or with ``truncated`` each layer of the model, reads in one
            batch; see :func:`check_gradient`.
        keep: Given the number of each segment, its token losses as the model returns them, and its auxiliary loss (of
            segments in a group, an equal part each), without a graph; in any order, and with ``checkpointed`` twice.

    Returns:
        The loss and the last state, both without a graph.
    """

    def priced(output: SegmentOutput, group: Sequence[Numbered]) -> Tensor:
        if keep is not None:
            auxiliary_loss = output.auxiliary_loss.detach() / len(group)
            for (t, _), token_losses in zip(group, output.token_losses.detach().chunk(len(group)), strict=True):
                keep(t, token_losses, auxiliary_loss)
        return cost(weighted(output, [segment for _, segment in group]))

    def step(numbered: Numbered, state: S) -> tuple[Tensor, S]:
        output, next_state = model(numbered[1], state)
        return priced(output, [numbered]), next_state

    def advance(numbered: Numbered, state: S) -> S:
        return model.advance(numbered[1], state)

    def encode(numbered: Numbered, state: S) -> tuple[State, S]:
        return model.advance_and_encode(numbered[1], state)

    def decode(group: Sequence[Numbered], encoded: Sequence[State]) -> Tensor:
        return priced(model.decode_encoded([segment for _, segment in group], encoded), group)

    def read(group: Sequence[Numbered], state: S) -> tuple[Tensor, S]:
        output, next_state = model.forward_rollout([segment for _, segment in group], state)
        return priced(output, group), next_state

    numbered = list(enumerate(segments))
    if decoder_group > 1 and gradient == "truncated":
        firsts = range(0, len(segments), decoder_group)
        return truncated(read, [numbered[first : first + decoder_group] for first in firsts], state)
    if decoder_group > 1:
        return replay_in_groups(encode, decode, numbered, state, group=decoder_group)
    growing = [model.growing.get(name) for name in getattr(state, "_fields", ())] if model.growing else None
    return GRADIENTS[gradient](step, numbered, state, advance=advance, growing=growing)


def weighted(output: SegmentOutput, segments: Sequence[Segment]) -> SegmentOutput:
    """The output of segments whose lanes are concatenated; weights multiply its token losses, if there are any."""
    weights = segment_weights(segments)
    return output if weights is None else output._replace(token_losses=output.token_losses * weights)
