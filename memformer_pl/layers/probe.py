"""Named places in a model where a callback may look, without a word about it in any signature."""

from torch import Tensor, nn


class Probe(nn.Module):
    """Passes on what it is given, to forward hooks and to the model.

    A layer owns a probe and hands it what somebody may want to see, such as attention weights. A callback finds it by
    its name in ``model.named_modules()`` and watches it with ``register_forward_hook``. Where computing the value
    costs something, the layer asks :attr:`watched` first. Under replay a probe fires twice in training: watch in
    validation.
    """

    @property
    def watched(self) -> bool:
        """Whether anybody looks."""
        return bool(self._forward_hooks)

    def forward(self, value: Tensor) -> Tensor:
        """``value``, as it is."""
        return value
