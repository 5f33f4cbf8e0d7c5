"""Floating-point operations of a model, as torch counts them."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memformer_pl.recurrence import Segment, SegmentModel


def operations(model: SegmentModel, *, lanes: int = 1, advance: bool = False) -> int:
    """Operations of reading a full segment in each lane.

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
    model.eval()
    # torch counts no operations in the fused attention of CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (model.advance if advance else model)(segment, model.initial_state(lanes))
    model.train(training)
    return int(counter.get_total_flops())
