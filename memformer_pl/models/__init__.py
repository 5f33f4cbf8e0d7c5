"""One file for each paper, all under :class:`~memformer_pl.recurrence.SegmentModel`."""

from memformer_pl.models.memformer import Memformer
from memformer_pl.models.transformer import Transformer

__all__ = ["Memformer", "Transformer"]
