"""Floating-point operations of one segment, by a formula for each model; ``memformer_pl/training/flops.py`` counts the
same with torch.

    L  tokens in a segment     M  cached positions, slots or memory tokens     D  width
"""

from collections.abc import Callable
from math import isqrt

from torch import nn

from memformer_pl.contract import SegmentModel


def formula(model: SegmentModel, *, lanes: int) -> int:
    """Operations of a whole step, computed from the model's sizes.

    Raises:
        KeyError: There is no formula for this class of model, or none for its ``feed_forward``.
    """
    name = type(model).__name__
    if getattr(model, "feed_forward", None) is not None and name not in CHOOSING:
        raise KeyError(f"{name} with feed_forward")
    return FORMULAS[name](model, lanes)


def linear(rows: int, inputs: int, outputs: int) -> int:
    """A linear map of ``rows`` vectors."""
    return 2 * rows * inputs * outputs


def attention(queries: int, keys: int, dim: int) -> int:
    """Scores, and weighted means of values."""
    return 4 * queries * keys * dim


def feed_forward(model: nn.Module, rows: int, layer: int) -> int:
    """The feed-forward of a layer: dense, or one that looks up values; these are added without a matrix product."""
    d, chosen = model.dim, model.feed_forward
    if chosen is None or layer not in chosen["layers"]:
        return linear(rows, d, 2 * model.ffn_dim)
    sizes = chosen["init_args"]
    if "hidden" in sizes:
        return linear(rows, d, 2 * sizes["hidden"])
    rank, learned, cores, tables = 2, 1, 0, 1  # product keys: a score and a one
    if chosen["class_path"].endswith("UltraMemory"):
        rank, cores, tables = (sizes.get(*each) for each in (("rank", 2), ("cores", 2), ("expansion", 4)))
        learned = rank
    side, key, picks = sizes["keys"] * isqrt(tables), sizes["key_dim"], sizes["picks"]
    scores = linear(rows, d, 2 * key) + 2 * linear(rows, key, side * learned)
    picking = 2 * linear(rows, rank, side) + linear(rows * picks, rank, rank + picks)
    weighing = cores * linear(rows * picks, rank, rank)
    return scores + picking + weighing + linear(rows, tables * sizes["value_dim"], d)


def self_layer(model: nn.Module, rows: int, layer: int = 0) -> int:
    """Self-attention and feed-forward."""
    d = model.dim
    return linear(rows, d, 4 * d) + attention(rows, rows, d) + feed_forward(model, rows, layer)


def cross_attention(model: nn.Module, rows: int, source: int) -> int:
    """Attention of ``rows`` queries to ``source`` keys from elsewhere."""
    d = model.dim
    return linear(rows, d, 2 * d) + linear(source, d, 2 * d) + attention(rows, source, d)


def writing(model: nn.Module) -> int:
    """The writer: slots attend to the segment, and to themselves without a matrix product."""
    d, length, slots = model.dim, model.segment_length, model.slots
    return linear(slots + length, d, 2 * d) + attention(slots, length, d) if slots else 0


def prediction(model: nn.Module) -> int:
    """Logits."""
    return linear(model.segment_length, model.dim, model.vocab_size)


def memformer(model: nn.Module, lanes: int) -> int:
    """Encoder over START and the previous segment, writer, decoder."""
    length, encoded = model.segment_length, model.segment_length + 1
    reading = cross_attention(model, encoded, model.slots) if model.slots else 0
    layers = model.encoder_layers + model.decoder_layers
    encoder = sum(self_layer(model, encoded, layer) + reading for layer in range(model.encoder_layers))
    decoder = sum(
        self_layer(model, length, layer) + cross_attention(model, length, encoded)
        for layer in range(model.encoder_layers, layers)
    )
    return lanes * (encoder + writing(model) + decoder + prediction(model))


def memformer_decoder(model: nn.Module, lanes: int) -> int:
    """All layers over START and the whole segment, and the writer."""
    rows = model.segment_length + 1
    reading = cross_attention(model, rows, model.slots) if model.slots else 0
    return lanes * (model.layers * (self_layer(model, rows) + reading) + writing(model) + prediction(model))


def transformer(model: nn.Module, lanes: int) -> int:
    """All layers over START and the segment without its last token."""
    layers = sum(self_layer(model, model.segment_length, layer) for layer in range(model.layers))
    return lanes * (layers + prediction(model))


def memory_transformer(model: nn.Module, lanes: int) -> int:
    """A Transformer with memory tokens in front."""
    rows = model.segment_length + model.memory_tokens
    return lanes * (model.layers * self_layer(model, rows) + prediction(model))


def recurrent_memory_transformer(model: nn.Module, lanes: int) -> int:
    """All layers over START and the whole segment between two copies of memory; the last layer, after its
    projections, only where it predicts or writes memory.
    """
    length, written = model.segment_length, model.memory_tokens
    rows, used = length + 1 + 2 * written, length + written
    last = self_layer(model, used) + linear(rows - used, model.dim, 3 * model.dim)
    last += attention(used, rows - used, model.dim)
    return lanes * ((model.layers - 1) * self_layer(model, rows) + last + prediction(model))


def by_distance(model: nn.Module, queries: int, distances: int, lanes: int) -> int:
    """Projections of the distances, once for all lanes, and their products with queries."""
    return linear(distances, model.dim, model.dim) + lanes * 2 * queries * distances * model.dim


def relative_layer(model: nn.Module, cached: int, lanes: int) -> int:
    """Attention to cached positions and the segment, by content and distance, and feed-forward."""
    d, length = model.dim, model.segment_length
    keys = cached + length
    content = linear(length, d, 2 * d) + linear(keys, d, 2 * d) + attention(length, keys, d)
    return lanes * (content + linear(length, d, 2 * model.ffn_dim)) + by_distance(model, length, keys + 1, lanes)


def transformer_xl(model: nn.Module, lanes: int) -> int:
    """All layers with a cache."""
    return model.layers * relative_layer(model, model.memory_length, lanes) + lanes * prediction(model)


def compressive(model: nn.Module, lanes: int) -> int:
    """All layers with two caches, a convolution over what leaves the first, and attention to it before and after."""
    d, length, rate = model.dim, model.segment_length, model.compression
    new = -(-length // rate)
    old = new * rate
    compression = linear(new, rate * d, d)
    reconstruction = sum(linear(length, d, d) + linear(n, d, 2 * d) + attention(length, n, d) for n in (old, new))
    layer = relative_layer(model, model.memory_length + model.compressed_length, lanes)
    return model.layers * (layer + lanes * (compression + reconstruction)) + lanes * prediction(model)


def look_ahead_layer(model: nn.Module, lanes: int) -> int:
    """A segment and a cache of ``M`` positions, which attends to the following positions up to the first of the
    segment.
    """
    d, length, cached = model.dim, model.segment_length, model.memory_length
    rows, window = cached + length, min(length - 1, cached) + 1
    parts = [min(window, cached - first) for first in range(0, cached, window)]
    content = linear(rows, d, 4 * d) + attention(length, rows, d) + attention(cached, window, d)
    distance = by_distance(model, length, rows + 1, lanes)
    distance += sum(by_distance(model, part, part + window + 1, lanes) for part in parts)
    return lanes * (content + linear(rows, d, 2 * model.ffn_dim)) + distance


def lamemo(model: nn.Module, lanes: int) -> int:
    """All layers but the last refresh the cache."""
    below = (model.layers - 1) * look_ahead_layer(model, lanes)
    return below + relative_layer(model, model.memory_length, lanes) + lanes * prediction(model)


def lstm(model: nn.Module, lanes: int) -> int:
    """Four gates per layer, from the input and the hidden state."""
    d = model.dim
    return lanes * (model.layers * linear(model.segment_length, 2 * d, 4 * d) + prediction(model))


def hugging_face_decoder(model: nn.Module, lanes: int) -> int:
    """A Llama: attention to the window and the segment, and a feed-forward layer with a gate."""
    sizes, length = model.language_model.config, model.segment_length
    d, width = sizes.hidden_size, sizes.head_dim
    queries, keys_values = sizes.num_attention_heads * width, 2 * sizes.num_key_value_heads * width
    layer = linear(length, d, queries + keys_values) + linear(length, queries, d)
    layer += attention(length, model.window + length, queries) + 3 * linear(length, d, sizes.intermediate_size)
    return lanes * (sizes.num_hidden_layers * layer + linear(length, d, sizes.vocab_size))


def gated_delta_net(model: nn.Module, lanes: int) -> int:
    """Projections, and in each chunk the products of its tokens with each other and with memory; the triangular system
    that corrects values is left out, as torch leaves it out.
    """
    d, length, heads, key = model.dim, model.segment_length, model.heads, model.key_width
    rank = 16
    corrects = model.update in ("gated_delta", "delta")
    gates = {"gated_delta": 2 * heads * d, "mamba2": heads * d, "delta": heads * d, "gla": rank * (d + heads * key)}
    layer = linear(length, d, 2 * heads * key + 3 * d + 2 * model.ffn_dim) + 2 * length * gates[model.update]
    at_once = min(64, length) if model.chunk is None else model.chunk
    for first in range(0, length, at_once):
        rows = min(at_once, length - first)
        among, value = linear(rows, heads * key, rows), d // heads
        with_memory = heads * linear(rows, key, value)
        layer += (1 + corrects) * (among + with_memory) + linear(rows, rows, d) + with_memory
    return lanes * (model.layers * layer + prediction(model))


def stable_hadamard_memory(model: nn.Module, lanes: int) -> int:
    """Projections, and what each token reads; cells are multiplied without a matrix product."""
    d, length = model.dim, model.segment_length
    maps = linear(length, d, (4 + model.calibration) * d + model.heads + 2 * model.ffn_dim)
    return lanes * (model.layers * (maps + linear(length, d, d // model.heads)) + prediction(model))


def bmojo(model: nn.Module, lanes: int) -> int:
    """Projections, with keys and values of both windows and of what is stored made anew, the fading memory, attention,
    and the prediction of each token; what is stored is chosen without a matrix product.
    """
    d, length, stored = model.dim, model.segment_length, model.stored
    rows = model.window + length
    layer = linear(length, d, 2 * d) + linear(2 * rows + stored, d, 2 * d) + linear(length, d, 2 * model.ffn_dim)
    layer += linear(length, d, 2 * d) + linear(length + 1, d, d)
    layer += attention(length, 2 * rows + (stored + length if stored else 0), d)
    if stored and model.picks == "innovation":
        layer += linear(length, d, d)
    return lanes * (model.layers * layer + prediction(model))


def titans(model: nn.Module, lanes: int) -> int:
    """Projections, and in each chunk the inner gradient, the products of its tokens with each other, with weights and
    with momentum, and the sums of gradients into both; beside it, attention to learned vectors, and to a window, or to
    a segment and what memory held before it.
    """
    d, length, heads, hidden = model.dim, model.segment_length, model.heads, model.memory_hidden
    width = d // heads
    layer = linear(length, d, 3 * d + 3 * heads + 2 * d + 2 * model.ffn_dim)
    at_once = min(16, length) if model.chunk is None else model.chunk
    for first in range(0, length, at_once):
        rows = min(at_once, length - first)
        whole, among = linear(rows, width, hidden or width), linear(rows, width + (hidden or width), rows)
        products = (3 + 2 * 4) * whole + 2 * among if hidden else (1 + 4) * whole + among
        layer += heads * (products + linear(rows, rows, rows + 1))
    learned = 0
    if model.variant != "lmm":
        learned = linear(model.persistent, d, 2 * d)  # once for all lanes
        layer += linear(length, d, 4 * d)
    if model.variant == "mac":
        layer += linear(length, d, 3 * d) + heads * linear(length, width, width if not hidden else 2 * hidden)
        layer += attention(length, model.persistent + 2 * length, d)
    elif model.variant != "lmm":
        layer += attention(length, model.persistent + model.window + length, d)
    return model.layers * (lanes * layer + learned) + lanes * prediction(model)


def block_recurrent_transformer(model: nn.Module, lanes: int) -> int:
    """All layers with a window, one that also reads state vectors, and the update of these."""
    d, length, keys, states = model.dim, model.segment_length, model.window + model.segment_length, model.states
    layer = linear(length, d, 4 * d) + attention(length, keys, d) + linear(length, d, 2 * model.ffn_dim)
    update = linear(states, d, 4 * d) + attention(states, states + keys, d)
    return lanes * (model.layers * layer + cross_attention(model, length, states) + update + prediction(model))


def infini_attention(model: nn.Module, lanes: int) -> int:
    """All layers of a Transformer, which also read a matrix for each head by queries and, to write a difference, by
    keys, and write it.
    """
    d, length = model.dim, model.segment_length
    product = linear(length, d, d // model.heads)
    reads = 1 + model.delta
    memory = (reads + 1) * product + reads * linear(length, d, 1)
    return lanes * (model.layers * (self_layer(model, length) + memory) + prediction(model))


def associative_recurrent_memory_transformer(model: nn.Module, lanes: int) -> int:
    """All layers over START, the whole segment and memory tokens behind it; the last layer, after its projections, only
    where it predicts or writes. Each layer reads a matrix at all positions and writes it at memory tokens, or attends
    to memory tokens in front, which are projected alone.
    """
    d, length, written = model.dim, model.segment_length, model.memory_tokens
    rows, used = length + 1 + written, length + written
    last = self_layer(model, used) + linear(rows - used, d, 3 * d) + attention(used, rows - used, d)
    blocks = (model.layers - 1) * self_layer(model, rows) + last
    if model.carried == "tokens":
        seen = (model.layers - 1) * rows + used
        in_front = model.layers * linear(written, d, 3 * d) + attention(seen, written, d)
        return lanes * (blocks + in_front + prediction(model))
    key, features = model.key_width, 6 * model.key_width
    reading = linear(rows, d, key) + linear(rows, features, d)
    writing = linear(written, d, key + d + 1) + linear(written, features, d) + linear(features, written, d)
    return lanes * (blocks + model.layers * (reading + writing) + prediction(model))


CHOOSING = ("Memformer", "Transformer")
"""Models whose formula knows the option ``feed_forward``."""
FORMULAS: dict[str, Callable[[nn.Module, int], int]] = {
    "AssociativeRecurrentMemoryTransformer": associative_recurrent_memory_transformer,
    "BMojo": bmojo,
    "BlockRecurrentTransformer": block_recurrent_transformer,
    "CompressiveTransformer": compressive,
    "GatedDeltaNet": gated_delta_net,
    "HuggingFaceDecoder": hugging_face_decoder,
    "InfiniAttention": infini_attention,
    "LSTM": lstm,
    "LaMemo": lamemo,
    "Memformer": memformer,
    "MemformerDecoder": memformer_decoder,
    "MemoryTransformer": memory_transformer,
    "RecurrentMemoryTransformer": recurrent_memory_transformer,
    "StableHadamardMemory": stable_hadamard_memory,
    "Titans": titans,
    "Transformer": transformer,
    "TransformerXL": transformer_xl,
}
