"""Parts of a model that have a loss of their own."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn


class WeightLoss(nn.Module, ABC):
    """A part of a model with a loss that depends on weights alone, such as a bound on a matrix.

    A model that says ``has_weight_losses`` adds the losses of all such parts to ``SegmentOutput.auxiliary_loss``, once
    for each segment.
    """

    @abstractmethod
    def weight_loss(self) -> Float[Tensor, ""]:
        """The loss."""
