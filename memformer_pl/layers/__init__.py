"""What models are made of."""

from memformer_pl.layers.attention import Attention
from memformer_pl.layers.blocks import DecoderLayer, EncoderLayer, FeedForward, LayerSizes, token_reading
from memformer_pl.layers.memory import BiasedMemoryNorm, SlotReader, SlotWriter
from memformer_pl.layers.positions import RotaryPositions, Rotation

__all__ = [
    "Attention",
    "BiasedMemoryNorm",
    "DecoderLayer",
    "EncoderLayer",
    "FeedForward",
    "LayerSizes",
    "RotaryPositions",
    "Rotation",
    "SlotReader",
    "SlotWriter",
    "token_reading",
]
