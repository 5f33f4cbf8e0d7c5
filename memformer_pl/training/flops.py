"""Floating-point operations of a model, as torch counts them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memformer_pl.contract import Segment, SegmentModel, detach


def count_flops(model: SegmentModel, *, lanes: int = 1, advance: bool = False) -> int:
    """Floating-point operations of reading a full segment in each lane.

    A product and a sum are two, those of matrix products and convolutions alone: norms, softmax and rotations are left
    out.

    Args:
        model: Is looked at in evaluation mode, and left as it was.
        lanes: How many segments are read side by side.
        advance: Whether to count no more than what leads to the next state, which replay runs once more.
    """
    training, length, device = model.training, model.segment_length, next(model.parameters()).device
    tokens = torch.zeros(lanes, length, dtype=torch.int64, device=device)
    segment = Segment(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens[:, 0]).bool())
    state = detach(model.initial_state(lanes))
    model.eval()
    with torch.no_grad(), unfused(), FlopCounterMode(display=False) as counter:
        (model.advance if advance else model)(segment, state)
    model.train(training)
    return int(counter.get_total_flops())


@contextmanager
def unfused() -> Iterator[None]:
    """Without the kernels in which torch counts no operations: the fused attention of CPUs, and the recurrent layers of
    oneDNN and cuDNN. What takes their place is matrix products."""
    before = torch.backends.mkldnn.enabled
    # a context manager of torch's would set TF32 too, and warn where that does not exist
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # torch declares it as its own kind of property
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mkldnn.enabled = before
