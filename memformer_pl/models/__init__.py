"""One file for each paper, all under :class:`~memformer_pl.recurrence.SegmentModel`."""

from memformer_pl.models.memformer import Memformer
from memformer_pl.models.memformer_decoder import MemformerDecoder
from memformer_pl.models.memory_transformer import MemoryTransformer
from memformer_pl.models.recurrent_memory_transformer import RecurrentMemoryTransformer
from memformer_pl.models.transformer import Transformer

__all__ = ["Memformer", "MemformerDecoder", "MemoryTransformer", "RecurrentMemoryTransformer", "Transformer"]
