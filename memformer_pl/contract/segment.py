"""The input and the output of a model."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

ABSENT = -1
"""Token number of an empty place."""


class Segment(NamedTuple):
    """A slice of one document for every lane."""

    tokens: Int[Tensor, "B L"]
    """Token numbers, ``int64``; any valid number where ``token_mask`` is False."""
    token_mask: Bool[Tensor, "B L"]
    """Which tokens exist. They stand at the left; a lane without any keeps its state."""
    document_start: Bool[Tensor, " B"]
    """Which lanes start a document with this segment, from the initial state."""
    loss_mask: Bool[Tensor, "B L"] | None = None
    """Which tokens the model must predict; by default all. It reads the others too, at no loss."""
    continues: bool = False
    """Whether every lane continues a document after a full segment, so that a model may leave out masks over what came
    before. The host knows it when it cuts segments; False is always right."""
    seeds: Int[Tensor, " S"] | None = None
    """An ``int64`` seed for each of the ``S`` segments whose lanes are concatenated here: the random numbers that a
    model draws for a segment (dropout) depend on it alone. By default a model draws one from the default stream."""
    weights: Float[Tensor, "B L"] | None = None
    """What a nat of each token costs in a gradient, such as the advantage of an action; by default 1. The output of a
    model holds plain losses, whatever the weights."""

    @property
    def target_mask(self) -> Bool[Tensor, "B L"]:
        """Which tokens count in the loss: those that exist and that ``loss_mask`` selects."""
        return self.token_mask if self.loss_mask is None else self.token_mask & self.loss_mask

    @property
    def last_token(self) -> Int[Tensor, " B"]:
        """The last token of each lane; any valid number in a lane without tokens."""
        last = self.token_mask.sum(1, keepdim=True) - 1
        return self.tokens.gather(1, last.clamp(min=0))[:, 0]

    def to(self, device: torch.device) -> "Segment":
        """The same segment on a device."""
        return Segment._make(field.to(device) if isinstance(field, Tensor) else field for field in self)


class SegmentOutput(NamedTuple):
    """The losses of a segment."""

    token_losses: Float[Tensor, "B L"]
    """Nats per token; 0 where ``target_mask`` is False."""
    correct: Bool[Tensor, "B L"]
    """Whether the most likely token was the right one; False where ``target_mask`` is False."""
    auxiliary_loss: Float[Tensor, ""]
    """A loss of the model itself, added to the mean of the token losses; 0 for most models."""


def concat_segments(segments: Sequence[Segment]) -> Segment:
    """Concatenate the lanes of segments of the same length."""
    fields = zip(*(segment[:3] for segment in segments), strict=True)
    tokens, token_mask, document_start = (torch.cat(field) for field in fields)
    masked = any(segment.loss_mask is not None for segment in segments)
    seeds = [segment.seeds for segment in segments if segment.seeds is not None]
    return Segment(
        tokens,
        token_mask,
        document_start,
        torch.cat([segment.target_mask for segment in segments]) if masked else None,
        all(segment.continues for segment in segments),
        torch.cat(seeds) if len(seeds) == len(segments) else None,
        segment_weights(segments),
    )


def segment_weights(segments: Sequence[Segment]) -> Float[Tensor, "B L"] | None:
    """The weights of segments whose lanes are concatenated: 1 in those without, None if all are."""
    if all(segment.weights is None for segment in segments):
        return None
    return torch.cat(
        [torch.ones_like(s.tokens, dtype=torch.float32) if s.weights is None else s.weights for s in segments]
    )
