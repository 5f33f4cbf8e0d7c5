"""Compile the blocks of a model, one by one.

A block is traced once for all layers of its class, so a deep model compiles as fast as a shallow one, and everything
between the blocks stays as it is. Dropout is a function of the arguments of a block, so both passes of replay drop the
same entries.
"""

from contextlib import AbstractContextManager, nullcontext

import torch

from memformer_pl.contract import SegmentModel
from memformer_pl.errors import UsageError

LIMIT = 64
"""The most versions of a block: with a mask and without, with gradient and without, for each size of a batch."""


def compile_regions(model: SegmentModel) -> None:
    """Compile :meth:`~memformer_pl.contract.SegmentModel.regions` in place, each without a break in its graph.

    Raises:
        UsageError: The model names no regions.
    """
    require_regions(model)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
    for region in model.regions():
        region.compile(fullgraph=True)


def require_regions(model: SegmentModel) -> None:
    """Raise a ``UsageError`` if a model names no regions."""
    if not model.regions():
        raise UsageError(
            f"{type(model).__name__} has no regions to compile: leave compile_blocks off, or let its regions() return "
            "blocks"
        )


def uncompiled(compiled: bool) -> AbstractContextManager[object]:
    """Run compiled modules as they are written, since hooks on their parts would break the graph."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
