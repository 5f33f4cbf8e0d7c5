"""Building blocks of the models."""

from memformer_pl.layers.associative import init_associative
from memformer_pl.layers.attention import (
    Attention,
    CrossAttention,
    KeysValues,
    Mask,
    Positions,
    SelfAttention,
    as_bias,
    attention_weights,
    causal_mask,
    rotated_keys_values,
)
from memformer_pl.layers.compression import Compressor, Pooling
from memformer_pl.layers.cross_entropy import output_from_logits, output_from_table
from memformer_pl.layers.dropout import Keep, add_update, draw_keep, draw_seeds, drop
from memformer_pl.layers.feed_forward import FeedForward
from memformer_pl.layers.kv_cache import KVCache, LayerKVCache, at_last, empty_kv_cache
from memformer_pl.layers.look_ahead import LookAheadBlock, RunningSoftmax, ahead_mask
from memformer_pl.layers.memory import BiasedMemoryNorm, SlotReader, SlotWriter, require_times
from memformer_pl.layers.relative_attention import (
    RelativeAttention,
    RelativeBlock,
    distances_to_keys,
    projected_distances,
    relative_blocks,
    sinusoid,
)
from memformer_pl.layers.rotary import RotaryPositions, Rotation
from memformer_pl.layers.transformer import (
    BlockConfig,
    DecoderBlock,
    TokenEmbedding,
    TransformerBlock,
    causal_blocks,
    embed_after,
    init_weights,
    visible_by_rank,
)
from memformer_pl.layers.ultra_memory import ProductKeys, UltraMemory
from memformer_pl.layers.xl_cache import (
    EMPTY,
    CacheNumbers,
    cached_and_causal,
    filled_part,
    follow_caches,
    number_caches,
    push,
    push_with_graph,
    take_rows,
)

__all__ = [
    "EMPTY",
    "Attention",
    "BiasedMemoryNorm",
    "BlockConfig",
    "CacheNumbers",
    "Compressor",
    "CrossAttention",
    "DecoderBlock",
    "FeedForward",
    "KVCache",
    "Keep",
    "KeysValues",
    "LayerKVCache",
    "LookAheadBlock",
    "Mask",
    "Pooling",
    "Positions",
    "ProductKeys",
    "RelativeAttention",
    "RelativeBlock",
    "RotaryPositions",
    "Rotation",
    "RunningSoftmax",
    "SelfAttention",
    "SlotReader",
    "SlotWriter",
    "TokenEmbedding",
    "TransformerBlock",
    "UltraMemory",
    "add_update",
    "ahead_mask",
    "as_bias",
    "at_last",
    "attention_weights",
    "cached_and_causal",
    "causal_blocks",
    "causal_mask",
    "distances_to_keys",
    "draw_keep",
    "draw_seeds",
    "drop",
    "embed_after",
    "empty_kv_cache",
    "filled_part",
    "follow_caches",
    "init_associative",
    "init_weights",
    "number_caches",
    "output_from_logits",
    "output_from_table",
    "projected_distances",
    "push",
    "push_with_graph",
    "relative_blocks",
    "require_times",
    "rotated_keys_values",
    "sinusoid",
    "take_rows",
    "visible_by_rank",
]
