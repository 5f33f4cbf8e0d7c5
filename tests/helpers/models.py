"""Shared fixtures: small models, segments with every irregularity, and a plain loop for reference gradients."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memformer_pl.contract import Segment, SegmentModel, SegmentOutput, State, detach
from memformer_pl.gradients.replay import Advance, Step
from memformer_pl.gradients.rollout import Gradient, add_gradient
from memformer_pl.models import (
    LSTM,
    AssociativeRecurrentMemoryTransformer,
    BlockRecurrentTransformer,
    BMojo,
    CompressiveTransformer,
    GatedDeltaNet,
    HuggingFaceDecoder,
    InfiniAttention,
    LaMemo,
    Memformer,
    MemformerDecoder,
    MemoryTransformer,
    RecurrentMemoryTransformer,
    StableHadamardMemory,
    Titans,
    Transformer,
    TransformerXL,
)

VOCAB, LENGTH, LANES = 11, 5, 4

# Tokens of each lane in each segment, and where documents start. Lane 0 is full and never starts anew; the others are
# ragged, start documents in the middle and towards the end, and have segments without tokens.
LENGTHS = ((5, 5, 2, 5), (5, 3, 4, 0), (5, 5, 5, 0), (5, 1, 5, 5), (5, 5, 0, 2))
STARTS = ((0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 0, 0, 1), (0, 1, 0, 0))


M = TypeVar("M", bound=SegmentModel)


def small(kind: type[M], **sizes: Any) -> M:
    """A small model in double precision, the same at every call, whatever the random stream.

    Untrained, it may read nothing from memory, and its biases are zero; here they are as if it had been trained a
    little.
    """
    everywhere = {"vocab_size": VOCAB, "segment_length": LENGTH, "dim": 8, "heads": 2, "ffn_dim": 12, "dropout": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        own = {name: size for name, size in everywhere.items() if name in inspect.signature(kind).parameters}
        model = kind(**{**own, **sizes}).double()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3)
        return model


memformer = partial(small, Memformer, encoder_layers=2, decoder_layers=2, slots=3)
transformer = partial(small, Transformer, layers=2)
memory_transformer = partial(small, MemoryTransformer, layers=2, memory_tokens=3)
recurrent_memory = partial(small, RecurrentMemoryTransformer, layers=2, memory_tokens=3)
associative_recurrent_memory = partial(
    small, AssociativeRecurrentMemoryTransformer, layers=2, memory_tokens=3, key_width=4
)
memformer_decoder = partial(small, MemformerDecoder, layers=2, slots=3)
transformer_xl = partial(small, TransformerXL, layers=2, memory_length=7)
compressive = partial(
    small, CompressiveTransformer, layers=2, memory_length=4, compressed_length=3, compression=2, compressor="conv"
)
lamemo = partial(small, LaMemo, layers=2, memory_length=7)
lstm = partial(small, LSTM, layers=2)
gated_delta_net = partial(small, GatedDeltaNet, layers=2, key_width=3, chunk=3)

block_recurrent = partial(small, BlockRecurrentTransformer, layers=4, states=3, window=7)
infini_attention = partial(small, InfiniAttention, layers=2)
stable_hadamard_memory = partial(small, StableHadamardMemory, layers=2, rows=5, draw=False)
bmojo = partial(small, BMojo, layers=2, window=3, stored=2)
titans = partial(small, Titans, layers=2, memory_hidden=5, chunk=3, window=7, persistent=2)


ULTRA = {"class_path": "UltraMemory", "init_args": {"keys": 3, "key_dim": 2, "picks": 2, "value_dim": 4}}
"""A feed-forward that looks up values; ``layers`` is still to be said."""


def llama(*, dropout: float = 0.0, options: Mapping[str, Any] | None = None, **sizes: Any) -> HuggingFaceDecoder:
    """A Llama of transformers with two query heads for each of keys and values."""
    widths = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2}
    decoder = {"model_type": "llama", "num_hidden_layers": 2, "initializer_range": 0.3, "attention_dropout": dropout}
    return small(HuggingFaceDecoder, decoder={**decoder, **widths, **(options or {})}, **sizes)


def gpt2(*, dropout: float = 0.0, **sizes: Any) -> HuggingFaceDecoder:
    """A GPT-2 of transformers, which has a table of positions."""
    drop = {"attn_pdrop": dropout, "resid_pdrop": dropout, "embd_pdrop": dropout}
    widths = {"n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 128, "initializer_range": 0.3}
    return small(HuggingFaceDecoder, decoder={"model_type": "gpt2", **drop, **widths}, **sizes)


MODELS: dict[str, Callable[..., SegmentModel]] = {
    "memformer": memformer,
    "memformer without memory": partial(memformer, slots=0),
    "memformer with an overlap, reading memory in the decoder": partial(
        memformer, overlap=3, decoder_reads_memory=True
    ),
    "memformer that overlaps by a token": partial(memformer, overlap=1),
    "memformer with ultra memory": partial(memformer, feed_forward={**ULTRA, "layers": [1, 2]}),
    "memformer decoder": memformer_decoder,
    "transformer": transformer,
    "transformer in chunks": partial(transformer, chunk=3),
    "transformer with ultra memory": partial(transformer, feed_forward={**ULTRA, "layers": [1]}),
    "memory transformer": memory_transformer,
    "recurrent memory transformer": recurrent_memory,
    "associative recurrent memory transformer": associative_recurrent_memory,
    "associative recurrent memory transformer without correction": partial(
        associative_recurrent_memory, correction=False
    ),
    "parallel recurrent memory transformer": partial(associative_recurrent_memory, carried="tokens"),
    "transformer xl": transformer_xl,
    "compressive transformer": compressive,
    "lamemo": lamemo,
    "lstm": lstm,
    "gated delta net": gated_delta_net,
    "delta net": partial(gated_delta_net, update="delta"),
    "gla": partial(gated_delta_net, update="gla"),
    "mamba2": partial(gated_delta_net, update="mamba2", chunk=None),
    "block-recurrent transformer": block_recurrent,
    "block-recurrent transformer of one layer": partial(block_recurrent, layers=1, window=2),
    "infini attention": infini_attention,
    "infini attention without the delta rule": partial(infini_attention, delta=False),
    "stable hadamard memory": stable_hadamard_memory,
    "stable hadamard memory of one row": partial(stable_hadamard_memory, rows=1, centred=False),
    "stable hadamard memory without calibration": partial(stable_hadamard_memory, calibration=False),
    "bmojo": bmojo,
    "bmojo without a store": partial(bmojo, stored=0),
    "bmojo of random places": partial(bmojo, picks="random"),
    "titans": titans,
    "titans with a linear memory": partial(titans, memory_hidden=0, chunk=None),
    "titans, memory as a layer": partial(titans, variant="mal", memory_hidden=0),
    "titans, memory as context": partial(titans, variant="mac"),
    "titans, memory as a gate": partial(titans, variant="mag"),
    "llama": llama,
    "llama with a window": partial(llama, window=7),
}
"""Every model that keeps the contract; ``dropout=`` and ``segment_length=`` can be set."""
SEEDED = {
    **{name: build for name, build in MODELS.items() if "llama" not in name},
    "stable hadamard memory with drawn rows": partial(stable_hadamard_memory, draw=True),
}
"""The models whose random numbers are a function of ``Segment.seeds``. A decoder of transformers draws them from the
default stream."""
BOUNDED = {name: build for name, build in MODELS.items() if name != "llama"}
"""The models whose state does not grow."""


def make_segment(lengths: Sequence[int], *, document_start: Sequence[int] | None = None, seed: int = 0) -> Segment:
    """A segment of random tokens, as wide as the longest that there may be."""
    tokens = torch.randint(VOCAB, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(seed))
    token_mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    return Segment(tokens, token_mask, torch.tensor(document_start or [0] * len(lengths)).bool())


def irregular(horizon: int) -> list[Segment]:
    """A rollout in which lanes are ragged, start documents, and have nothing to read."""
    rows = islice(cycle(zip(LENGTHS, STARTS, strict=True)), horizon)
    return [make_segment(lengths, document_start=starts, seed=10 + t) for t, (lengths, starts) in enumerate(rows)]


def full(horizon: int, *, lanes: int = 2) -> list[Segment]:
    """A rollout in which every lane reads full segments of one document."""
    return [make_segment([LENGTH] * lanes, document_start=[int(t == 0)] * lanes, seed=20 + t) for t in range(horizon)]


def whole_document(segments: Sequence[Segment]) -> Segment:
    """Full segments of one document as a single one."""
    return Segment(*(torch.cat([s[n] for s in segments], dim=1) for n in range(2)), segments[0].document_start)


def losses_of(model: SegmentModel, segments: Sequence[Segment], state: State | None = None) -> list[Tensor]:
    """The losses of each segment ``[B, L]``, from the initial state unless told otherwise."""
    state = model.initial_state(len(segments[0].document_start)) if state is None else state
    losses = []
    with torch.no_grad():
        for segment in segments:
            output, state = model(segment, state)
            losses.append(output.token_losses)
    return losses


def untouched(model: SegmentModel, changed: int, *, token: int = 0) -> list[bool]:
    """Of each of five segments, whether another token in one of them leaves all its losses as they were."""
    segments = full(5)
    before = losses_of(model, segments)
    segments[changed].tokens[:, token] += 1
    segments[changed].tokens[:, token] %= VOCAB
    return [torch.equal(a, b) for a, b in zip(before, losses_of(model, segments), strict=True)]


def shown(probe: nn.Module) -> list[Tensor]:
    """What passes through a probe from now on."""
    seen: list[Tensor] = []
    probe.register_forward_hook(lambda probe, args, value: seen.append(value.detach()))
    return seen


def split_mix(seed: int, number: int) -> int:
    """A number of the stream of a seed, as Steele, Lea & Flood (2014) define it, as a signed one of 64 bits."""
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


@torch.no_grad()
def identities(*layers: nn.Linear, scale: float = 1.0) -> None:
    """Let layers pass on what they are given, as often as it fits into their output."""
    for layer in layers:
        eye = torch.eye(layer.in_features) * scale
        layer.weight.copy_(eye.repeat(layer.out_features // layer.in_features, 1))


class LargestTensor(TorchDispatchMode):
    """Notes how many entries the largest tensor has that is made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        self.entries = max([self.entries, *(tensor.numel() for tensor in made)])
        return result


class AttentionMasks(TorchFunctionMode):
    """Notes under which mask each attention is computed: ``"causal"``, ``"mask"``, or ``"none"``."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            mask = "none" if kwargs.get("attn_mask") is None else "mask"
            self.seen.append("causal" if kwargs.get("is_causal") else mask)
        return func(*args, **kwargs)


class Case(NamedTuple):
    """Something to train: what holds the parameters, a step, and what to feed it."""

    module: nn.Module
    step: Step
    segments: list[Any]
    state: State
    advance: Advance | None = None


def train_on(model: SegmentModel, segments: Sequence[Segment], state: State) -> Case:
    """A model of this package with its summed losses, as the trainer steps through it."""

    def step(segment: Segment, state: State) -> tuple[Tensor, State]:
        output, next_state = model(segment, state)
        return cost(output), next_state

    return Case(model, step, list(segments), state, model.advance)


def plain_loop(
    step: Step, segments: Sequence[Any], state: State, *, advance: Advance | None = None
) -> tuple[Tensor, State]:
    """Back-propagation through time as anybody would write it."""
    total = torch.zeros((), dtype=torch.float64)
    for segment in segments:
        loss, state = step(segment, state)
        total = total + loss
    total.backward()
    return total.detach(), detach(state)


Grads = Mapping[str, Tensor | None]


class Outcome(NamedTuple):
    """The results of a rollout: loss, state, gradients, and the final random stream."""

    loss: Tensor
    state: State
    grads: Grads
    stream: Tensor


def outcome(gradient: Gradient, build: Callable[[], Case], *, with_advance: bool = True) -> Outcome:
    """Build a case and take the gradient of its rollout; from the same random numbers at every call."""
    torch.manual_seed(0)
    case = build()
    advance = case.advance if with_advance else None
    loss, state = gradient(case.step, case.segments, case.state, advance=advance)
    grads = {name: parameter.grad for name, parameter in case.module.named_parameters()}
    return Outcome(loss, state, grads, torch.get_rng_state())


def cost(output: SegmentOutput) -> Tensor:
    """The summed loss of a segment."""
    return output.token_losses.sum() + output.auxiliary_loss


def in_groups(group: int, case: Case) -> tuple[Tensor, State]:
    """Replay whose decoder runs in groups of segments."""
    assert isinstance(case.module, SegmentModel)
    return add_gradient(case.module, cost, case.segments, case.state, gradient="replay", decoder_group=group)


def outcome_in_groups(group: int, build: Callable[[], Case]) -> Outcome:
    """As :func:`outcome`, of :func:`in_groups`."""
    built: list[Case] = []

    def build_and_keep() -> Case:
        built.append(build())
        return built[0]

    return outcome(lambda *_, **__: in_groups(group, built[0]), build_and_keep)


def largest_relative_difference(got: Grads, expected: Grads) -> float:
    """The largest difference of a parameter's gradient beside its largest entry; NaN where there is a NaN."""
    reached = [name for name, grad in expected.items() if grad is not None and grad.numel()]
    assert reached, "there is no gradient to compare with"
    assert [name for name, grad in got.items() if grad is not None and grad.numel()] == reached
    worst = []
    for name in reached:
        difference = (got[name] - expected[name]).abs().max()
        worst.append(torch.where(difference == 0, 0.0, difference / expected[name].abs().max()))
    return float(torch.stack(worst).max())


def assert_same(got: Outcome, expected: Outcome) -> None:
    """Gradients to twelve digits; last state and random stream bit for bit."""
    assert largest_relative_difference(got.grads, expected.grads) < 1e-12
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-12, atol=0)
    assert type(got.state) is type(expected.state)
    assert all(torch.equal(a, b) for a, b in zip(got.state, expected.state, strict=True))
    assert torch.equal(got.stream, expected.stream)
