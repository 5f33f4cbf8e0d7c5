"""Building blocks of the models."""

from memformer_pl.layers.associative import init_associative
from memformer_pl.layers.attention import Attention, KeysValues, Positions, attention_weights
from memformer_pl.layers.compression import Compressor, Pooling
from memformer_pl.layers.cross_entropy import output_from_logits, output_from_table
from memformer_pl.layers.dropout import Dropout
from memformer_pl.layers.kv_cache import KVCache, LayerKVCache, empty_kv_cache
from memformer_pl.layers.look_ahead import LookAheadBlock, RunningSoftmax, ahead_mask
from memformer_pl.layers.memory import BiasedMemoryNorm, SlotReader, SlotWriter, require_times
from memformer_pl.layers.relative_attention import (
    RelativeAttention,
    RelativeBlock,
    projected_distances,
    relative_blocks,
    sinusoid,
)
from memformer_pl.layers.rotary import RotaryPositions, Rotation
from memformer_pl.layers.transformer import (
    BlockConfig,
    DecoderBlock,
    FeedForward,
    TokenEmbedding,
    TransformerBlock,
    causal_blocks,
    causal_mask,
    init_weights,
    visible_by_rank,
)
from memformer_pl.layers.xl_cache import cached_and_causal, filled_part, push

__all__ = [
    "Attention",
    "BiasedMemoryNorm",
    "BlockConfig",
    "Compressor",
    "DecoderBlock",
    "Dropout",
    "FeedForward",
    "KVCache",
    "KeysValues",
    "LayerKVCache",
    "LookAheadBlock",
    "Pooling",
    "Positions",
    "RelativeAttention",
    "RelativeBlock",
    "RotaryPositions",
    "Rotation",
    "RunningSoftmax",
    "SlotReader",
    "SlotWriter",
    "TokenEmbedding",
    "TransformerBlock",
    "ahead_mask",
    "attention_weights",
    "cached_and_causal",
    "causal_blocks",
    "causal_mask",
    "empty_kv_cache",
    "filled_part",
    "init_associative",
    "init_weights",
    "output_from_logits",
    "output_from_table",
    "projected_distances",
    "push",
    "relative_blocks",
    "require_times",
    "sinusoid",
    "visible_by_rank",
]
