"""Random streams: how a recomputed segment sees the random numbers that it saw the first time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomState(NamedTuple):
    """Where the default random streams stand: the CPU's, and those of the devices in use."""

    cpu: Tensor
    devices: list[int]
    device_states: list[Tensor]

    @classmethod
    def capture(cls, inputs: object) -> "RandomState":
        """The present state of the CPU's stream and of those of the devices of the tensors in ``inputs``."""
        return cls(torch.get_rng_state(), *get_device_states(inputs))

    def restore(self) -> None:
        """Put the streams back to where they stood."""
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.device_states)


def draw_seed() -> int:
    """A seed for a stream of its own: one number from the CPU's default stream, at no synchronisation with a device."""
    return int(torch.randint(2**62, ()).item())


@contextmanager
def own_stream(seed: int | None, tensor: Tensor) -> Iterator[None]:
    """Run the body on a random stream of its own, and leave the default one where it stood.

    What runs inside can then be left out without a trace in the stream, as the decoder is where only the next state
    is wanted.

    Args:
        seed: From :func:`draw_seed`; None where the body draws nothing.
        tensor: Lies on the device on which the body draws.
    """
    if seed is None:
        yield
        return
    outside = RandomState.capture(tensor)
    torch.default_generator.manual_seed(seed)
    if tensor.is_cuda:
        torch.cuda.default_generators[tensor.get_device()].manual_seed(seed)
    try:
        yield
    finally:
        outside.restore()
