"""One file for each paper, all under :class:`~memformer_pl.contract.model.SegmentModel`."""

from memformer_pl.models.associative_recurrent_memory_transformer import AssociativeRecurrentMemoryTransformer
from memformer_pl.models.block_recurrent_transformer import BlockRecurrentTransformer
from memformer_pl.models.bmojo import BMojo
from memformer_pl.models.compressive import CompressiveTransformer
from memformer_pl.models.gated_delta_net import GatedDeltaNet
from memformer_pl.models.hugging_face_decoder import HuggingFaceDecoder
from memformer_pl.models.infini_attention import InfiniAttention
from memformer_pl.models.lamemo import LaMemo
from memformer_pl.models.lstm import LSTM
from memformer_pl.models.memformer import Memformer
from memformer_pl.models.memformer_decoder import MemformerDecoder
from memformer_pl.models.memory_transformer import MemoryTransformer
from memformer_pl.models.recurrent_memory_transformer import RecurrentMemoryTransformer
from memformer_pl.models.stable_hadamard_memory import StableHadamardMemory
from memformer_pl.models.titans import Titans
from memformer_pl.models.transformer import Transformer
from memformer_pl.models.transformer_xl import TransformerXL

__all__ = [
    "LSTM",
    "AssociativeRecurrentMemoryTransformer",
    "BMojo",
    "BlockRecurrentTransformer",
    "CompressiveTransformer",
    "GatedDeltaNet",
    "HuggingFaceDecoder",
    "InfiniAttention",
    "LaMemo",
    "Memformer",
    "MemformerDecoder",
    "MemoryTransformer",
    "RecurrentMemoryTransformer",
    "StableHadamardMemory",
    "Titans",
    "Transformer",
    "TransformerXL",
]
