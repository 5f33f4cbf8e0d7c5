"""What models are made of."""

from memformer_pl.layers.attention import Attention
from memformer_pl.layers.blocks import (
    DecoderLayer,
    FeedForward,
    LayerSizes,
    SelfLayer,
    TokenTable,
    causal_mask,
    start_at_unit_gain,
    token_reading,
)
from memformer_pl.layers.memory import BiasedMemoryNorm, SlotReader, SlotWriter
from memformer_pl.layers.positions import RotaryPositions, Rotation

__all__ = [
    "Attention",
    "BiasedMemoryNorm",
    "DecoderLayer",
    "FeedForward",
    "LayerSizes",
    "RotaryPositions",
    "Rotation",
    "SelfLayer",
    "SlotReader",
    "SlotWriter",
    "TokenTable",
    "causal_mask",
    "start_at_unit_gain",
    "token_reading",
]
