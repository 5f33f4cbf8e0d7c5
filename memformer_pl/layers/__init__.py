"""What models are made of."""

from memformer_pl.layers.associative import init_associative
from memformer_pl.layers.attention import Attention, attention_weights
from memformer_pl.layers.transformer import (
    DecoderBlock,
    FeedForward,
    BlockConfig,
    TransformerBlock,
    TokenEmbedding,
    causal_mask,
    causal_blocks,
    init_weights,
    visible_by_rank,
)
from memformer_pl.layers.xl_cache import cached_and_causal, filled_part, push
from memformer_pl.layers.compression import Compressor, Pooling
from memformer_pl.layers.dropout import Dropout
from memformer_pl.layers.look_ahead import LookAheadBlock, RunningSoftmax, ahead_mask
from memformer_pl.layers.memory import BiasedMemoryNorm, SlotReader, SlotWriter, require_times
from memformer_pl.layers.rotary import RotaryPositions, Rotation
from memformer_pl.layers.cross_entropy import output_from_table, output_from_logits
from memformer_pl.layers.relative_attention import (
    RelativeAttention,
    RelativeBlock,
    projected_distances,
    relative_blocks,
    sinusoid,
)
from memformer_pl.layers.kv_cache import CachePositions, KVCache, empty_kv_cache

__all__ = [
    "Attention",
    "BiasedMemoryNorm",
    "Compressor",
    "DecoderLayer",
    "Dropout",
    "FeedForward",
    "LayerSizes",
    "LookAheadLayer",
    "Places",
    "Pooling",
    "RelativeAttention",
    "RelativeLayer",
    "RotaryPositions",
    "Rotation",
    "Rows",
    "RunningSoftmax",
    "SelfLayer",
    "SlotReader",
    "SlotWriter",
    "TokenTable",
    "ahead_mask",
    "attention_weights",
    "begin_associative",
    "cached_and_causal",
    "causal_mask",
    "causal_stack",
    "empty_rows",
    "filled_part",
    "projected_distances",
    "push",
    "relative_stack",
    "require_times",
    "sinusoid",
    "start_plainly",
    "table_reading",
    "token_reading",
    "visible_by_rank",
]
