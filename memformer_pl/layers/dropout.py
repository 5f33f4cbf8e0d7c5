"""Dropout that falls on a segment as it would if the segment were read alone."""

from torch import Tensor, nn

from memformer_pl.randomness import by_stream


class Dropout(nn.Dropout):
    """Torch's, save that of several segments in one batch each is drawn from its own random stream, where it has one
    (:func:`~memformer_pl.randomness.own_streams`)."""

    def forward(self, input: Tensor) -> Tensor:
        """``input`` with some entries at zero and the others as much larger."""
        return by_stream(super().forward, input)
