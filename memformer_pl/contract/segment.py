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

    @property
    def target_mask(self) -> Bool[Tensor, "B L"]:
        """Which tokens count in the loss: those that exist and that ``loss_mask`` selects."""
        return self.token_mask if self.loss_mask is None else self.token_mask & self.loss_mask


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
    if all(segment.loss_mask is None for segment in segments):
        return Segment(tokens, token_mask, document_start)
    return Segment(tokens, token_mask, document_start, torch.cat([segment.target_mask for segment in segments]))
