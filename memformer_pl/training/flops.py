"""Count the floating-point operations of a model, and what a device can do in a second.

MFU (model FLOPs utilization) is the share of the devices' peak that the FLOPs of the model take: three times those of a
forward pass, for forward and backward, whatever is computed again (Chowdhery et al. 2022, PaLM, appendix B).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from memformer_pl.contract import Segment, SegmentModel, detach
from memformer_pl.training.metrics import evaluation_mode


class Peak(NamedTuple):
    """FLOP/s of dense matrix products; data sheets that give them with sparsity state twice as many."""

    bfloat16: float
    tf32: float
    float32: float


A100, HOPPER = Peak(312e12, 156e12, 19.5e12), Peak(989e12, 495e12, 67e12)
PEAKS = {
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100 80GB PCIe": A100,
    "NVIDIA H100 80GB HBM3": HOPPER,
    "NVIDIA H100 PCIe": Peak(756e12, 378e12, 51e12),
    "NVIDIA H100 NVL": Peak(835e12, 418e12, 60e12),
    "NVIDIA H200": HOPPER,
    "NVIDIA A10": Peak(125e12, 62.5e12, 31.2e12),
    "NVIDIA L4": Peak(121e12, 60e12, 30.3e12),
    "NVIDIA L40S": Peak(362e12, 183e12, 91.6e12),
    "NVIDIA GeForce RTX 4090": Peak(165e12, 82.6e12, 82.6e12),
}
"""By the name that CUDA gives a device. Source: NVIDIA's data sheets of A100, H100, H200, A10, L4 and L40S; for the RTX
4090 the white paper of the Ada architecture, appendix A, with float32 accumulation."""


def peak_flops_of(device: torch.device, precision: str) -> float | None:
    """FLOP/s that a device can do at best; None if not known.

    Args:
        device: The device.
        precision: Of the trainer. ``32-true`` depends on ``torch.set_float32_matmul_precision``.
    """
    peak = PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None or precision == "64-true":
        return None
    if precision == "32-true":
        return {"highest": peak.float32, "high": peak.tf32}.get(torch.get_float32_matmul_precision(), peak.bfloat16)
    return peak.bfloat16


def training_flops(model: SegmentModel) -> float:
    """FLOPs of a training token in a full segment, for MFU."""
    return 3 * forward_flops(model) / model.segment_length


def forward_flops(model: SegmentModel) -> int:
    """Count the operations of :func:`count_flops` in one lane, without memory for them: on a copy without values.

    A step that depends on values, such as that of an LSTM, runs with the model itself.
    """
    from torch._subclasses import FakeTensorMode  # slow to import

    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # the model has given them
            copy: SegmentModel = SegmentModel.from_config(model.config())
        with FakeTensorMode(allow_non_fake_inputs=True):
            return count_flops(copy.to_empty(device="cpu"))
    except Exception:  # whatever a model does with values that are not there
        return count_flops(model)


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
