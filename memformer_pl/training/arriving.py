"""Numbers that are copied from the device to the host while the host goes on."""

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor


class Arriving:
    """Numbers on their way to the host.

    Args:
        tensors: Not written to before :meth:`wait`.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self._copies = {name: pinned(tensor) if tensor.is_cuda else tensor for name, tensor in tensors.items()}
        self._arrived: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # the thread sleeps
            self._arrived.record()

    def wait(self) -> dict[str, Float64[np.ndarray, "..."]]:
        """Wait for the work that was enqueued before them, but for none after it, and return their values."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return {name: copy.detach().cpu().double().numpy() for name, copy in self._copies.items()}


def pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, which is complete when the device comes to it."""
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
