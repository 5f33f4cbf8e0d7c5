"""Hook points in a model, for callbacks that watch internal values without a flag in any signature."""

from torch import Tensor, nn


class Probe(nn.Module):
    """Return the input, and show it to forward hooks.

    A layer passes a value of interest, such as attention weights, through a probe. A callback finds the probe in
    ``model.named_modules()`` and watches it with ``register_forward_hook``. If the value is expensive, the layer asks
    :attr:`watched` first. In training under replay a probe fires twice: watch in validation.
    """

    @property
    def watched(self) -> bool:
        """Whether the probe has a hook."""
        return bool(self._forward_hooks)

    def forward(self, value: Tensor) -> Tensor:
        """``value``, unchanged."""
        return value
