"""What models are made of."""

from memformer_pl.layers.associative import begin_associative
from memformer_pl.layers.attention import Attention, attention_weights
from memformer_pl.layers.blocks import (
    DecoderLayer,
    FeedForward,
    LayerSizes,
    SelfLayer,
    TokenTable,
    causal_mask,
    causal_stack,
    start_plainly,
    visible_by_rank,
)
from memformer_pl.layers.cache import cached_and_causal, filled_part, push
from memformer_pl.layers.compression import Compressor, Pooling
from memformer_pl.layers.dropout import Dropout
from memformer_pl.layers.look_ahead import LookAheadLayer, RunningSoftmax, ahead_mask
from memformer_pl.layers.memory import BiasedMemoryNorm, SlotReader, SlotWriter, require_times
from memformer_pl.layers.positions import RotaryPositions, Rotation
from memformer_pl.layers.reading import table_reading, token_reading
from memformer_pl.layers.relative_attention import (
    RelativeAttention,
    RelativeLayer,
    projected_distances,
    relative_stack,
    sinusoid,
)
from memformer_pl.layers.rows import Places, Rows, empty_rows

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
