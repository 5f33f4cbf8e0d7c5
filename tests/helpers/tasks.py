"""What the tests of training share: a small model, documents of uneven lengths, and a loader of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from models import LENGTH, VOCAB, memformer
from torch import Tensor, nn

from memformer_pl.data import LaneLoader
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.data.revisiting import Revisit
from memformer_pl.models import Memformer
from memformer_pl.training.task import SegmentTask

LENGTHS = (31, 1, 17, 40, 8, 23, 12, 5)


def documents(lengths: Sequence[int] = LENGTHS) -> PackedDocuments:
    random = np.random.default_rng(0)
    return PackedDocuments.from_arrays([random.integers(VOCAB, size=length) for length in lengths])


def loader(
    *, lanes: int = 2, horizon: int = 3, shuffle: bool = True, interleave: int = 1, revisit: Revisit | None = None
) -> LaneLoader:
    sizes = {"batch_size": lanes, "segment_length": LENGTH, "horizon": horizon, "interleave": interleave}
    return LaneLoader(documents(), **sizes, shuffle=shuffle, revisit=revisit)


def small_memformer(dropout: float = 0.0, **options: Any) -> Memformer:
    return memformer(encoder_layers=1, decoder_layers=1, dropout=dropout, **options)


def weights(task: SegmentTask) -> Tensor:
    return nn.utils.parameters_to_vector(task.parameters()).detach()
