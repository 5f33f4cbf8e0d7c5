"""Capture and restore random streams, so that a recomputed segment draws the same random numbers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomState(NamedTuple):
    """The state of the default random streams: the CPU's, and those of the devices in use."""

    cpu: Tensor
    devices: list[int]
    device_states: list[Tensor]

    @classmethod
    def capture(cls, inputs: object) -> "RandomState":
        """Capture the CPU's stream and those of the devices of the tensors in ``inputs``."""
        return cls(torch.get_rng_state(), *get_device_states(inputs))

    def restore(self) -> None:
        """Restore the streams."""
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.device_states)


def draw_seed() -> int:
    """Draw a seed from the CPU's default stream, without synchronising with a device."""
    return int(torch.randint(2**62, ()).item())


_streams: ContextVar[list[RandomState] | None] = ContextVar("_streams", default=None)


@contextmanager
def own_streams(seeds: Sequence[int], tensor: Tensor) -> Iterator[None]:
    """Run the body on separate random streams, and leave the default ones unchanged.

    The body, such as a decoder, can then be skipped without an effect on the default streams. A batch of several
    segments has one seed each, and :func:`by_stream` draws for each segment what it would draw for that segment alone.

    Args:
        seeds: From :func:`draw_seed`; none if the body draws nothing.
        tensor: A tensor on the device on which the body draws.
    """
    if not seeds:
        yield
        return
    outside = RandomState.capture(tensor)
    streams = [_seeded(seed, tensor) for seed in seeds]
    streams[0].restore()
    token = _streams.set(streams)
    try:
        yield
    finally:
        _streams.reset(token)
        outside.restore()


def own_stream(seed: int | None, tensor: Tensor) -> AbstractContextManager[None]:
    """The same with one seed, or with None if the body draws nothing."""
    return own_streams([] if seed is None else [seed], tensor)


def by_stream(draw: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``draw(x)``; inside several :func:`own_streams`, each of as many equal parts of ``x`` draws from its stream."""
    streams = _streams.get() or []
    if len(streams) < 2:
        return draw(x)
    parts = []
    for n, part in enumerate(x.chunk(len(streams))):
        streams[n].restore()
        parts.append(draw(part))
        streams[n] = RandomState.capture(x)
    return torch.cat(parts)


def _seeded(seed: int, tensor: Tensor) -> RandomState:
    """The state of the default streams after seeding."""
    torch.default_generator.manual_seed(seed)
    if tensor.is_cuda:
        torch.cuda.default_generators[tensor.get_device()].manual_seed(seed)
    return RandomState.capture(tensor)
