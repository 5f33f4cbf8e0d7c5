"""Capture and restore random streams, so that a recomputed segment draws the same random numbers."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomState(NamedTuple):
    """The state of the default random streams: the CPU's, and those of the devices in use."""

    cpu: Tensor
    devices: list[int]
    device_states: list[Tensor]

    @classmethod
    def capture(cls, inputs: object) -> "RandomState":
        """Capture the CPU's stream and those of the devices of the tensors in ``inputs``.

        While a CUDA graph is captured, it is the CPU's alone: that of the device cannot be read then, and nothing draws
        from it (``captured.py``).
        """
        initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if initialized and torch.cuda.is_current_stream_capturing():
            return cls(torch.get_rng_state(), [], [])
        # one tensor of each device: torch reads a stream once for each tensor
        tensors = {leaf.device: leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
        return cls(torch.get_rng_state(), *get_device_states(*tensors.values()))

    def restore(self) -> None:
        """Restore the streams."""
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.device_states)
