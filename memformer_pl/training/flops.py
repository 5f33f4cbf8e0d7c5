"""Count the floating-point operations of a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memformer_pl.contract import Segment, SegmentModel, detach
from memformer_pl.training.metrics import evaluation_mode


def count_flops(model: SegmentModel, *, lanes: int = 1, advance: bool = False) -> int:
    """Count the floating-point operations of one forward pass over a full segment in each lane.

    Only matrix products and convolutions count, with two operations for a multiply-add; norms, softmax and rotations
    do not.

    Args:
        model: Counted in evaluation mode; the modes of its parts are restored.
        lanes: Number of segments in the batch.
        advance: Count only what leads to the next state, which replay runs a second time.
    """
    length, device = model.segment_length, next(model.parameters()).device
    tokens = torch.zeros(lanes, length, dtype=torch.int64, device=device)
    segment = Segment(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens[:, 0]).bool())
    state = detach(model.initial_state(lanes))
    with evaluation_mode(model), torch.no_grad(), unfused(), FlopCounterMode(display=False) as counter:
        (model.advance if advance else model)(segment, state)
    return int(counter.get_total_flops())


@contextmanager
def unfused() -> Iterator[None]:
    """Replace kernels whose operations torch does not count by matrix products: the fused attention of CPUs, and the
    recurrent layers of oneDNN and cuDNN."""
    before = torch.backends.mkldnn.enabled
    # `torch.backends.mkldnn.flags` would also set TF32, and warn on hardware without it
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # torch declares a property of its own kind
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch.backends.mkldnn.enabled = before
