"""How each library trains on one rollout, for ``peers.py``: what is built, and what is called.

Only public names of a library are called, and a library is imported when its model is built. All models have equal
width, layers and heads, and the plainest blocks that their library offers. They predict the same number of tokens in
every segment, unless ``called`` says otherwise.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a model and its rollout.

    Args:
        segments: Segments of the rollout.
        lanes: Documents read in parallel.
        segment_length: Tokens of a segment, and of the cache of a Transformer-XL.
        vocab_size: Size of the vocabulary.
        dim: Width.
        heads: Attention heads, each ``dim / heads`` wide.
        layers: Layers; a model of encoder and decoder has half of them in each.
        slots: Slots, memory tokens, or state vectors of a lane.
    """

    segments: int = 8
    lanes: int = 4
    segment_length: int = 64
    vocab_size: int = 256
    dim: int = 128
    heads: int = 4
    layers: int = 4
    slots: int = 32

    def tokens(self) -> Tensor:
        """Random tokens, one segment more than the rollout: an encoder reads one before the first that is predicted."""
        return torch.randint(self.vocab_size, (self.lanes, (self.segments + 1) * self.segment_length))


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to compute the gradient of a rollout.

    Args:
        model: Our model that is nearest in kind.
        library: Name of the distribution.
        module: What is imported.
        called: What computes the gradient.
        build: Builds the untrained model, with a rate of dropout.
        loss: The loss of a rollout with one graph over all segments.
        train: Adds the gradient of a rollout to ``.grad``, as the library does it; by default ``loss().backward()``.
        dropout: Whether the model has dropout.
    """

    model: str
    library: str
    module: str
    called: str
    build: Callable[[Sizes, float], Any]
    loss: Callable[[Any, Tensor, Sizes], Tensor]
    train: Callable[[Any, Tensor, Sizes], object] | None = None
    dropout: bool = True


def pieces(tokens: Tensor, sizes: Sizes) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens of each segment, and the tokens to predict after each of them."""
    length = sizes.segments * sizes.segment_length
    inputs, labels = tokens[:, :length], tokens[:, 1 : length + 1]
    return zip(inputs.split(sizes.segment_length, 1), labels.split(sizes.segment_length, 1), strict=True)


def rollout_and_one(tokens: Tensor, sizes: Sizes) -> Tensor:
    """Tokens of the rollout and one more, which libraries shift by one to have inputs and labels."""
    return tokens[:, : sizes.segments * sizes.segment_length + 1]


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, averaged over all tokens."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class TargetEverySegment:
    """A ``memformer.Memformer`` with a target for every segment that ``memory_replay_backprop`` goes backward through,
    which is from the last to the first."""

    def __init__(self, model: Any, targets: list[Tensor]) -> None:
        self.model, self.targets = model, list(targets)
        self.encoder, self.get_initial_mem = model.encoder, model.get_initial_mem

    def __call__(self, src: Tensor, tgt: Tensor | None = None, **options: Any) -> Any:
        return self.model(src, self.targets.pop() if torch.is_grad_enabled() else None, **options)


def memformer_model(sizes: Sizes, dropout: float) -> Any:
    half = sizes.layers // 2
    both = {"num_tokens": sizes.vocab_size, "max_seq_len": sizes.segment_length, "heads": sizes.heads}
    return import_module("memformer").Memformer(
        dim=sizes.dim,
        num_memory_slots=sizes.slots,
        mem_update_attn_heads=sizes.heads,
        enc_depth=half,
        dec_depth=sizes.layers - half,
        **{f"enc_{name}": value for name, value in both.items()},
        **{f"dec_{name}": value for name, value in both.items()},
    )


def memformer_texts(tokens: Tensor, sizes: Sizes) -> tuple[Tensor, list[Tensor]]:
    """What the encoder reads, and for each segment the next one as target, after the token before it."""
    length = sizes.segment_length
    return tokens[:, :-length], [tokens[:, t * length - 1 : (t + 1) * length] for t in range(1, sizes.segments + 1)]


def memformer_replay(model: Any, tokens: Tensor, sizes: Sizes, *, every_segment: bool) -> None:
    source, targets = memformer_texts(tokens, sizes)
    replay = import_module("memformer").memory_replay_backprop
    replay(TargetEverySegment(model, targets) if every_segment else model, source, targets[-1])


def memformer_loss(model: Any, tokens: Tensor, sizes: Sizes, *, every_segment: bool = True) -> Tensor:
    source, targets = memformer_texts(tokens, sizes)
    losses, memory = [], None
    for t, segment in enumerate(source.split(sizes.segment_length, 1)):
        target = targets[t] if every_segment or t == sizes.segments - 1 else None
        _, memory, loss = model(segment, target, mems=memory)
        losses.append(loss)
    return torch.stack(losses).sum()


def rmt_model(sizes: Sizes, dropout: float, *, xl_memories: bool) -> Any:
    library = import_module("recurrent_memory_transformer_pytorch")
    transformer = library.RecurrentMemoryTransformer(
        sizes.dim,
        num_tokens=sizes.vocab_size,
        depth=sizes.layers,
        num_memory_tokens=sizes.slots,
        seq_len=sizes.segment_length,
        dim_head=sizes.dim // sizes.heads,
        heads=sizes.heads,
        attn_dropout=dropout,
        ff_dropout=dropout,
        use_flash_attn=True,
        use_xl_memories=xl_memories,
        num_residual_streams=1,
    )
    return library.RecurrentMemoryTransformerWrapper(transformer)


def rmt_replay(model: Any, tokens: Tensor, sizes: Sizes) -> None:
    model(rollout_and_one(tokens, sizes), memory_replay_backprop=True)


def rmt_loss(model: Any, tokens: Tensor, sizes: Sizes) -> Tensor:
    losses, memories, xl_memories = [], None, None
    for segment, labels in pieces(tokens, sizes):
        loss, memories, xl_memories = model.transformer(segment, memories, xl_memories=xl_memories, labels=labels)
        losses.append(loss)
    return torch.stack(losses).mean()


def block_recurrent_model(sizes: Sizes, dropout: float, *, one_window: bool) -> Any:
    library = import_module("block_recurrent_transformer_pytorch")
    transformer = library.BlockRecurrentTransformer(
        num_tokens=sizes.vocab_size,
        dim=sizes.dim,
        depth=sizes.layers,
        dim_head=sizes.dim // sizes.heads,
        heads=sizes.heads,
        max_seq_len=sizes.segment_length * (sizes.segments if one_window else 1),
        block_width=sizes.segment_length,
        num_state_vectors=sizes.slots,
        use_flash_attn=True,
    )
    return library.RecurrentTrainerWrapper(transformer)


def whole_loss(model: Any, tokens: Tensor, sizes: Sizes) -> Tensor:
    """The loss of a model that returns the loss of all segments."""
    loss: Tensor = model(rollout_and_one(tokens, sizes))
    return loss


def block_recurrent_loss(model: Any, tokens: Tensor, sizes: Sizes) -> Tensor:
    """The loss with the same weights where one window holds all segments, so that no state is detached."""
    one_window = block_recurrent_model(sizes, 0.0, one_window=True).to(next(model.parameters()).dtype)
    loss: Tensor = functional_call(one_window, dict(model.named_parameters()), (rollout_and_one(tokens, sizes),))
    return loss


def compressive_model(sizes: Sizes, dropout: float) -> Any:
    library = import_module("compressive_transformer_pytorch")
    transformer = library.CompressiveTransformer(
        num_tokens=sizes.vocab_size,
        dim=sizes.dim,
        seq_len=sizes.segment_length,
        depth=sizes.layers,
        heads=sizes.heads,
        mem_len=sizes.segment_length,
        cmem_len=sizes.segment_length // 4,
        gru_gated_residual=False,
        attn_dropout=dropout,
        ff_dropout=dropout,
        attn_layer_dropout=dropout,
    )
    return library.AutoregressiveWrapper(transformer)


def compressive_backward(model: Any, tokens: Tensor, sizes: Sizes) -> None:
    for loss, auxiliary_loss, _ in model(rollout_and_one(tokens, sizes), return_loss=True):
        (loss + auxiliary_loss).backward()


def compressive_loss(model: Any, tokens: Tensor, sizes: Sizes) -> Tensor:
    """The sum of the same losses, where every weight requires a gradient in every segment: the library turns that off
    for the weights of keys and values once it has compressed."""
    total = torch.zeros(())
    for loss, auxiliary_loss, _ in model(rollout_and_one(tokens, sizes), return_loss=True):
        total = total + (loss + auxiliary_loss).sum()
        model.requires_grad_(True)
    return total


def xl_model(sizes: Sizes, dropout: float, **positions: bool) -> Any:
    library = import_module("x_transformers")
    decoder = library.Decoder(
        dim=sizes.dim,
        depth=sizes.layers,
        heads=sizes.heads,
        attn_dim_head=sizes.dim // sizes.heads,
        attn_dropout=dropout,
        ff_dropout=dropout,
        **positions,
    )
    wrapper = library.TransformerWrapper(
        num_tokens=sizes.vocab_size,
        max_seq_len=sizes.segment_length,
        max_mem_len=sizes.segment_length,
        emb_dropout=dropout,
        attn_layers=decoder,
    )
    return library.XLAutoregressiveWrapper(wrapper)


def titans_model(sizes: Sizes, dropout: float) -> Any:
    return import_module("titans_pytorch").MemoryAsContextTransformer(
        num_tokens=sizes.vocab_size,
        dim=sizes.dim,
        depth=sizes.layers,
        segment_len=sizes.segment_length,
        num_longterm_mem_tokens=sizes.slots,
        dim_head=sizes.dim // sizes.heads,
        heads=sizes.heads,
        num_residual_streams=1,
    )


def xlstm_model(sizes: Sizes, dropout: float) -> Any:
    library = import_module("xlstm")
    layer = library.mLSTMLayerConfig(num_heads=sizes.heads)
    config = library.xLSTMLMModelConfig(
        mlstm_block=library.mLSTMBlockConfig(mlstm=layer),
        context_length=sizes.segments * sizes.segment_length,
        num_blocks=sizes.layers,
        embedding_dim=sizes.dim,
        vocab_size=sizes.vocab_size,
        dropout=dropout,
    )
    return library.xLSTMLMModel(config)


def xlstm_large_model(sizes: Sizes, dropout: float) -> Any:
    library = import_module("xlstm.xlstm_large.model")
    config = library.xLSTMLargeConfig(
        embedding_dim=sizes.dim,
        num_heads=sizes.heads,
        num_blocks=sizes.layers,
        vocab_size=sizes.vocab_size,
        return_last_states=True,
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        chunk_size=sizes.segment_length,
        autocast_kernel_dtype="float32",
    )
    return library.xLSTMLarge(config)


def xlstm_loss(model: Any, tokens: Tensor, sizes: Sizes) -> Tensor:
    """The rollout as one sequence."""
    shifted = rollout_and_one(tokens, sizes)
    returned = model(shifted[:, :-1])
    return mean_loss(returned[0] if isinstance(returned, tuple) else returned, shifted[:, 1:])


def xlstm_segments_loss(model: Any, tokens: Tensor, sizes: Sizes) -> Tensor:
    """Segment by segment, with the carried state."""
    losses, state = [], None
    for segment, labels in pieces(tokens, sizes):
        logits, state = model(segment, state)
        losses.append(mean_loss(logits, labels))
    return torch.stack(losses).mean()


MEMFORMER = partial(Way, model="Memformer", library="memformer", module="memformer", dropout=False)
RMT = partial(
    Way,
    model="RecurrentMemoryTransformer",
    library="recurrent-memory-transformer-pytorch",
    module="recurrent_memory_transformer_pytorch",
)
BLOCK_RECURRENT = partial(
    Way,
    model="Memformer",
    library="block-recurrent-transformer-pytorch",
    module="block_recurrent_transformer_pytorch",
    dropout=False,
)
XL = partial(Way, model="TransformerXL", library="x-transformers", module="x_transformers", loss=whole_loss)
XLSTM = partial(Way, model="Memformer", library="xlstm", module="xlstm")

LIBRARIES: list[Way] = [
    MEMFORMER(
        build=memformer_model,
        called="memory_replay_backprop, with a target for every segment by an adapter",
        train=partial(memformer_replay, every_segment=True),
        loss=memformer_loss,
    ),
    MEMFORMER(
        build=memformer_model,
        called="memory_replay_backprop: one target, for the last segment (less work)",
        train=partial(memformer_replay, every_segment=False),
        loss=partial(memformer_loss, every_segment=False),
    ),
    MEMFORMER(build=memformer_model, called="Memformer in a loop, one backward", loss=memformer_loss),
    RMT(
        called="Wrapper(memory_replay_backprop=True)",
        build=partial(rmt_model, xl_memories=True),
        train=rmt_replay,
        loss=rmt_loss,
    ),
    RMT(
        called="Wrapper(memory_replay_backprop=True), use_xl_memories=False",
        build=partial(rmt_model, xl_memories=False),
        train=rmt_replay,
        loss=rmt_loss,
    ),
    RMT(
        called="Wrapper(return_loss=True), use_xl_memories=False",
        build=partial(rmt_model, xl_memories=False),
        loss=lambda model, tokens, sizes: model(rollout_and_one(tokens, sizes), return_loss=True)[0],
    ),
    BLOCK_RECURRENT(
        called="RecurrentTrainerWrapper, all segments in one window",
        build=partial(block_recurrent_model, one_window=True),
        loss=whole_loss,
    ),
    BLOCK_RECURRENT(
        called="RecurrentTrainerWrapper, a window each",
        build=partial(block_recurrent_model, one_window=False),
        train=lambda model, tokens, sizes: whole_loss(model, tokens, sizes).backward(),
        loss=block_recurrent_loss,
    ),
    Way(
        model="Memformer",
        library="titans-pytorch",
        module="titans_pytorch",
        called="MemoryAsContextTransformer(return_loss=True), one sequence",
        build=titans_model,
        loss=lambda model, tokens, sizes: model(rollout_and_one(tokens, sizes), return_loss=True),
        dropout=False,
    ),
    XLSTM(called="xLSTMLMModel, one sequence", build=xlstm_model, loss=xlstm_loss),
    XLSTM(called="xLSTMLarge, one sequence", build=xlstm_large_model, loss=xlstm_loss, dropout=False),
    XLSTM(called="xLSTMLarge, state carried", build=xlstm_large_model, loss=xlstm_segments_loss, dropout=False),
    XL(called="XLAutoregressiveWrapper, rel_pos_bias", build=partial(xl_model, rel_pos_bias=True)),
    XL(
        called="XLAutoregressiveWrapper, rotary_pos_emb, attn_flash",
        build=partial(xl_model, rotary_pos_emb=True, attn_flash=True),
    ),
    Way(
        model="CompressiveTransformer",
        library="compressive-transformer-pytorch",
        module="compressive_transformer_pytorch",
        called="AutoregressiveWrapper(return_loss=True), a backward for each segment",
        build=compressive_model,
        train=compressive_backward,
        loss=compressive_loss,
    ),
]
"""Ways of the other libraries."""
