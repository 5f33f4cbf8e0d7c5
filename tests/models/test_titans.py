"""Titans: a step by hand, what a border of segments is to it, what it is without learning."""

from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from models import (
    LANES,
    LENGTH,
    assert_same,
    full,
    irregular,
    losses_of,
    make_segment,
    outcome,
    plain_loop,
    shown,
    titans,
    train_on,
    untouched,
    whole_document,
)
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.contract import ABSENT, Segment, SegmentModel, state_bytes
from memformer_pl.errors import UsageError
from memformer_pl.gradients.rollout import GRADIENTS
from memformer_pl.layers.inner_gradient import Learned, Lessons, learn
from memformer_pl.layers.neural_memory import NeuralMemory
from memformer_pl.layers.neural_memory_block import BLOCKS, MemoryAsContextBlock, MemoryAsLayerBlock, NeuralMemoryBlock
from memformer_pl.layers.sliding_attention import SlidingAttention
from memformer_pl.models import Titans
from memformer_pl.training.flops import count_flops

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
LAYERS, HEADS, WIDTH, DIM, HIDDEN = 2, 2, 4, 8, 5


@pytest.fixture(params=[0, HIDDEN], ids=["a matrix", "two layers"])
def hidden(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def ask(weights: Tensor, x: Tensor) -> Tensor:
    """The memory of a head: weights ``[R, K, F]``, and ``x`` ``[K]``."""
    out = x @ weights[0]
    return out if len(weights) == 1 else weights[1] @ F.gelu(out) / HIDDEN**0.5


def layer_by_hand(layer: NeuralMemory, x_LD: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of a layer, weights, momentum, and the inputs of the convolution, token by token."""
    weights, momentum = list(layer.initial), [torch.zeros_like(w) for w in layer.initial]
    first = list(weights)
    inputs, outputs = [torch.zeros(3 * DIM).double()] * 3, []
    for place, x in enumerate(x_LD):
        first = list(weights) if place % chunk == 0 else first
        inputs.append(layer.to_query_key_value.weight @ x)
        mixed = F.silu(torch.stack([layer.convolution.weight[n] * inputs[n - 4] for n in range(4)]).sum(0))
        query, key, value = mixed.view(3, HEADS, WIDTH)
        gates: Any = layer.gates
        theta, eta, alpha = (gates.to_gates.weight @ x + gates.bias).sigmoid().view(3, HEADS)
        read = []
        for h in range(HEADS):
            loss = (ask(first[h], key[h] / key[h].norm()) - value[h]).square().sum()
            (surprise,) = torch.autograd.grad(loss, first[h], create_graph=True)
            momentum[h] = eta[h] * momentum[h] - theta[h] * surprise
            weights[h] = (1 - alpha[h]) * weights[h] + momentum[h]
            found = ask(weights[h], query[h] / query[h].norm())
            read.append(found / (found.square().mean() + 1e-6).sqrt() * layer.scale)
        outputs.append(layer.to_out.weight @ (torch.cat(read) * F.silu(layer.to_gate.weight @ x)))
    return torch.stack(outputs), torch.stack(weights), torch.stack(momentum), torch.stack(inputs[-3:])


def turned(x: Tensor, place: int) -> Tensor:
    """Vectors of a head at a place: each channel of the first half turns with one of the second."""
    angle = place * 10_000.0 ** -(torch.arange(0, WIDTH, 2) / WIDTH)
    a, b, cos, sin = *x.chunk(2), angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin))


def attention_by_hand(layer: SlidingAttention, x_LD: Tensor, window: int, reads: Tensor | None = None) -> Tensor:
    """The updates of tokens that see ``window`` tokens before their own, perhaps reads at the same places, and the
    learned vectors without places."""

    def mapped(x: Tensor) -> Any:
        return (layer.to_query_key_value.weight @ x).view(3, HEADS, WIDTH)

    outputs = []
    for place, x in enumerate(x_LD):
        found = []
        for h in range(HEADS):
            query, scores, values = mapped(x)[0, h], [], []
            for vector in layer.persistent:
                scores.append(query @ mapped(vector)[1, h])
                values.append(mapped(vector)[2, h])
            for other in range(max(place - window, 0), place + 1):
                for there in (x_LD[other],) if reads is None else (x_LD[other], reads[other]):
                    scores.append(turned(query, place) @ turned(mapped(there)[1, h], other))
                    values.append(mapped(there)[2, h])
            weights = (torch.stack(scores) / WIDTH**0.5).softmax(0)
            found.append(weights @ torch.stack(values))
        outputs.append(layer.to_out.weight @ torch.cat(found))
    return torch.stack(outputs)


def recalled_by_hand(block: MemoryAsContextBlock, x_LD: Tensor) -> Tensor:
    """What the initial memories of a block return to tokens."""
    reads = []
    for x in x_LD:
        queries = (block.to_recall.weight @ x).view(HEADS, WIDTH)
        reads.append(torch.cat([ask(block.memory.initial[h], queries[h] / queries[h].norm()) for h in range(HEADS)]))
    recalled: Tensor = block.recalled_norm(torch.stack(reads))
    return recalled


def block_by_hand(block: Any, x: Tensor, chunk: int, window: int) -> tuple[Tensor, list[Tensor]]:
    """What leaves a block, and weights, momentum and inputs after the last token."""
    if isinstance(block, MemoryAsContextBlock):
        normed = block.attention_norm(x)
        lesson = block.memory_norm(
            attention_by_hand(block.attention, normed, len(x), reads=recalled_by_hand(block, normed))
        )
        read, *state = layer_by_hand(block.memory, lesson, chunk)
        x = x + lesson * block.read_norm(read).sigmoid()
        return x + block.ffn(block.ffn_norm(x)[None])[0], state
    read, *state = layer_by_hand(block.memory, block.memory_norm(x), chunk)
    if type(block) is NeuralMemoryBlock:
        x = x + read
    elif isinstance(block, MemoryAsLayerBlock):
        x = x + read
        x = x + attention_by_hand(block.attention, block.attention_norm(x), window)
    else:
        found = attention_by_hand(block.attention, block.attention_norm(x), window)
        x = x + block.found_norm(found) * block.read_norm(read).sigmoid()
    return x + block.ffn(block.ffn_norm(x)[None])[0], state


@pytest.mark.parametrize("variant", list(BLOCKS))
@pytest.mark.parametrize("chunk", [1, 3])
def test_five_tokens_and_their_gradients_by_the_equations(hidden: int, chunk: int, variant: str) -> None:
    model = titans(memory_hidden=hidden, chunk=chunk, variant=variant, window=2)
    segment = make_segment([5], document_start=[1])
    x, states = model.embedding(segment.tokens[:, :4])[0], []
    for block in model.blocks:
        x, state = block_by_hand(block, x, chunk, window=2)
        states.append(state)
    expected = F.cross_entropy(model.embedding.logits(x), segment.tokens[0], reduction="none")
    output, state = model(segment, model.initial_state(1))
    close(output.token_losses[0], expected)
    for got, fields in zip(state[:3], zip(*states, strict=True), strict=True):
        close(got[0], torch.stack(fields))
    assert state.last.tolist() == [segment.tokens[0, 4]]
    parameters = list(model.parameters())
    close(torch.autograd.grad(output.token_losses.sum(), parameters), torch.autograd.grad(expected.sum(), parameters))


@pytest.mark.parametrize(("chunk", "same"), [(1, True), (LENGTH, True), (3, False)])
def test_a_document_in_segments_is_one_pass_if_chunks_divide_segments(hidden: int, chunk: int, same: bool) -> None:
    """Otherwise a chunk that one pass reads as a whole ends where a segment does."""
    segments = full(4)
    build = partial(titans, memory_hidden=hidden, chunk=chunk)
    (together,) = losses_of(build(segment_length=4 * LENGTH), [whole_document(segments)])
    apart = torch.cat(losses_of(build(), segments), dim=1)
    close(apart[:, :LENGTH], together[:, :LENGTH])
    assert torch.allclose(apart, together, rtol=1e-12, atol=1e-12) == same


@pytest.mark.parametrize("variant", ["mal", "mag"])
def test_attention_of_a_document_in_segments_is_that_of_one_pass(variant: str) -> None:
    segments = full(4)
    build = partial(titans, chunk=1, variant=variant)
    (together,) = losses_of(build(segment_length=4 * LENGTH), [whole_document(segments)])
    # rotations are in float32, and places count from the start of a segment
    close(torch.cat(losses_of(build(), segments), dim=1), together, rtol=1e-6, atol=1e-6)


def reach(**sizes: Any) -> list[int]:
    """The tokens whose losses differ if the first of the second segment does, with memories that learn nothing."""
    model, segments = still(titans(**sizes)), full(5, lanes=1)
    before = torch.cat(losses_of(model, segments), dim=1)[0]
    segments[1].tokens[:, 0] = (segments[1].tokens[:, 0] + 1) % 11
    return (torch.cat(losses_of(model, segments), dim=1)[0] != before).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("window", [0, 2])
def test_attention_sees_as_many_tokens_before_its_own_as_the_window_has(window: int) -> None:
    # its own loss, those of the token that it enters, and 3 a layer by convolution
    last = LENGTH + 1 + LAYERS * window
    assert reach(variant="mal", window=window) == list(range(LENGTH, last + 1 + 3 * LAYERS))
    # with a gate, attention and convolution stand beside each other
    assert reach(variant="mag", window=window) == list(range(LENGTH, LENGTH + 2 + LAYERS * max(window, 3)))


def test_what_is_carried_is_the_state_behind_the_last_token_that_is_there(hidden: int) -> None:
    model, lengths = titans(memory_hidden=hidden), (5, 1, 3, 4)
    ragged = make_segment(lengths)
    next_state = model.advance(ragged, model.initial_state(LANES))
    for lane, length in enumerate(lengths):
        tokens = ragged.tokens[lane : lane + 1, :length]
        alone = Segment(tokens, torch.ones_like(tokens).bool(), torch.tensor([True]))
        for got, expected in zip(next_state, model.advance(alone, model.initial_state(1)), strict=True):
            close(got[lane], expected[0])


def test_memory_as_context_adds_attention_to_the_segment_and_carries_no_token() -> None:
    # to the end of the segment, 3 tokens further by convolution; the next layer goes to the end of that segment, and 3
    assert reach(variant="mac") == list(range(LENGTH, 3 * LENGTH + 3))


@torch.no_grad()
@pytest.mark.parametrize("place", range(LENGTH))
def test_memory_as_context_asks_for_no_earlier_token(place: int) -> None:
    """The read of a token is seen from its place on, though memory is that before the segment."""
    model, segments = titans(variant="mac"), full(2, lanes=1)
    _, state = model(segments[0], model.initial_state(1))
    before = model(segments[1], state)[0].token_losses[0]
    segments[1].tokens[:, place] = (segments[1].tokens[:, place] + 1) % 11
    after = model(segments[1], state)[0].token_losses[0]
    assert torch.equal(before[:place], after[:place])
    assert (before[place:] != after[place:]).all()


@torch.no_grad()
def test_memory_as_context_reads_what_memory_held_before_the_segment() -> None:
    """Not only what it holds at a token: without the first read, tokens are predicted otherwise."""
    model, segments = titans(variant="mac"), full(2, lanes=1)
    _, state = model(segments[0], model.initial_state(1))
    before = model(segments[1], state)[0].token_losses
    for block in model.blocks:
        block.recalled_norm.weight.zero_()
    assert (model(segments[1], state)[0].token_losses != before).all()


@pytest.mark.parametrize(("variant", "window"), [("lmm", 0), ("mac", 0), ("mal", 7), ("mag", 7)])
def test_a_lane_carries_weights_and_momentum_three_inputs_of_the_convolution_a_window_and_a_token(
    hidden: int, variant: str, window: int
) -> None:
    state = titans(layers=3, memory_hidden=hidden, variant=variant).initial_state(2)
    numbers = 2 * HIDDEN * WIDTH if hidden else WIDTH * WIDTH
    assert state_bytes(state) == 3 * (2 * HEADS * numbers + 3 * 3 * DIM + 2 * DIM * window + 1) * 8 + 8
    assert Titans(vocab_size=5, dim=8, heads=2).memory_hidden == 16


def test_memory_is_in_single_precision_where_the_weights_are_in_half() -> None:
    model = titans().bfloat16()
    _, state = model(full(1)[0], model.initial_state(2))
    assert [field.dtype for field in state[:3]] == [torch.float32, torch.float32, torch.bfloat16]


def test_a_document_begins_with_the_learned_weights_no_momentum_and_no_token() -> None:
    model = titans()
    state = model.initial_state(3)
    for lane in range(3):
        close(state.weights[lane], torch.stack([block.memory.initial for block in model.blocks]))
    assert not state.momentum.any()
    assert not state.inputs.any()
    assert state.last.tolist() == [ABSENT] * 3
    output, _ = model(full(1, lanes=3)[0], state)
    gradients = torch.autograd.grad(output.token_losses.sum(), [block.memory.initial for block in model.blocks])
    assert all(gradient.any(-1).all() for gradient in gradients)


def test_a_lane_reset_before_each_segment_goes_on_as_if_a_document_began_with_its_last_token() -> None:
    model, begun = titans(), titans()
    state = model.initial_state(1)
    for segment in full(4, lanes=1):
        with torch.no_grad():
            if int(state.last) != ABSENT:
                begun.embedding.start.copy_(begun.embedding.vectors(state.last[:, None])[0, 0])
        (fresh,) = losses_of(begun, [segment])
        output, state = model(segment, model.reset_memory(state))
        close(output.token_losses, fresh)


@torch.no_grad()
def still(model: Titans) -> Titans:
    """The model with memories that neither learn nor forget."""
    for block in model.blocks:
        block.memory.gates.to_gates.weight.zero_()
        theta, _, alpha = block.memory.gates.bias.view(3, HEADS)
        theta.fill_(-1000.0)
        alpha.fill_(-1000.0)
    return model


def test_a_memory_that_learns_nothing_stays_as_it_began_and_knows_three_tokens_a_layer(hidden: int) -> None:
    model = still(titans(memory_hidden=hidden))
    state = model.initial_state(LANES)
    weights = state.weights
    for segment in irregular(5):
        state = model.advance(segment, state)
    assert torch.equal(state.weights, weights)
    assert not state.momentum.any()
    # its own loss, those of the token that it enters, and 3 a layer
    assert reach(memory_hidden=hidden) == list(range(LENGTH, LENGTH + 2 + 3 * LAYERS))


def test_a_token_is_known_for_as_long_as_the_state_is_carried(hidden: int) -> None:
    build = partial(titans, memory_hidden=hidden)
    assert untouched(build(), changed=0) == [False] * 5
    assert untouched(build(), changed=2, token=LENGTH - 1) == [True, True, False, False, False]


@pytest.mark.parametrize("gradient", sorted(GRADIENTS))
def test_every_gradient_but_truncated_gives_the_same(gradient: str, hidden: int) -> None:
    def case() -> Any:
        model = titans(memory_hidden=hidden, chunk=2, dropout=0.2)
        return train_on(model, irregular(7), model.initial_state(LANES))

    got, expected = outcome(GRADIENTS[gradient], case), outcome(plain_loop, case)
    if gradient == "truncated":
        assert torch.equal(got.loss, expected.loss)
        name = "blocks.0.memory.to_query_key_value.weight"
        assert not torch.allclose(got.grads[name], expected.grads[name])
    else:
        assert_same(got, expected)


@pytest.mark.parametrize(("variant", "fields"), [("lmm", 3), ("mac", 3), ("mal", 5), ("mag", 5)])
def test_the_gradient_reaches_through_all_that_is_carried(hidden: int, variant: str, fields: int) -> None:
    """Weights, momentum and the inputs of the convolution, and keys and values of attention."""
    model = titans(memory_hidden=hidden, variant=variant)
    state = model.initial_state(1)
    for segment in full(2, lanes=1):
        state = model.advance(segment, state)
    carried = state._make(field.detach().requires_grad_(field.is_floating_point()) for field in state)
    output, _ = model(full(3, lanes=1)[2], carried)
    for gradient in torch.autograd.grad(output.token_losses.sum(), carried[:fields]):
        assert gradient.flatten(2).any(2).all()


@pytest.mark.parametrize("chunk", [1, 4])
def test_before_training_a_chunk_of_equal_pairs_moves_a_matrix_at_most_to_their_value(chunk: int) -> None:
    """With the gates of the bias, and all of the momentum that is to come."""
    memory = (
        Titans(vocab_size=5, dim=8, heads=2, layers=1, memory_hidden=0, segment_length=4, chunk=chunk).blocks[0].memory
    )
    theta, log_eta, _ = (gate.expand(1, 2, chunk, 1) for gate in memory.gates(torch.zeros(1, 1, 8)))
    key, zero = torch.eye(4)[0].expand(1, 2, chunk, 4), torch.zeros_like(theta)
    value = torch.tensor([4.0, 0, 0, 0]).expand_as(key)
    learned = Learned(torch.zeros(1, 2, 1, 4, 4), torch.zeros(1, 2, 1, 4, 4))
    learned = learn(learned, Lessons(key, value, theta, log_eta, zero, torch.ones_like(theta)), chunk=chunk)
    to_come = learned.weights + learned.momentum  # eta / (1 - eta) = 1
    torch.testing.assert_close(to_come[0, :, 0, 0, 0], torch.full((2,), 4.0))


def test_heads_begin_to_forget_one_token_in_a_thousand_to_one_in_ten() -> None:
    (block,) = Titans(vocab_size=5, dim=16, heads=4, layers=1).blocks
    _, _, log_keep = block.memory.gates(torch.zeros(1, 1, 16))
    forgotten = 1 - log_keep.exp().flatten()
    close(forgotten[[0, -1]], torch.tensor([0.001, 0.1]), rtol=1e-3, atol=0)
    assert (forgotten.diff() > 0).all()


def test_probes_show_how_each_token_teaches() -> None:
    model, ragged = titans(), make_segment([5, 2])
    layer = model.blocks[1].memory
    seen = [shown(probe) for probe in (layer.step, layer.momentum, layer.forgotten)]
    model.advance(ragged, model.initial_state(2))
    absent = ~ragged.token_mask[:, None, :, None]
    for (value,), at_rest in zip(seen, (0, 1, 0), strict=True):
        assert value.shape == (2, HEADS, LENGTH, 1)
        assert torch.equal(value == at_rest, absent.expand_as(value))
        assert ((value >= 0) & (value <= 1)).all()


@pytest.mark.parametrize("variant", list(BLOCKS))
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_its_operations_are_those_of_the_formula(
    hidden: int, chunk: int | None, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments" / "benchmarks")
    from flops import formula

    model: SegmentModel = titans(memory_hidden=hidden, chunk=chunk, variant=variant)
    assert count_flops(model, lanes=3) == formula(model, lanes=3)
    assert count_flops(model, lanes=3, advance=True) < count_flops(model, lanes=3)


@pytest.mark.parametrize("variant", list(BLOCKS))
def test_absent_tokens_draw_no_gradient_that_is_not_finite(hidden: int, variant: str) -> None:
    model = titans(memory_hidden=hidden, variant=variant)
    output, state = model(make_segment([1, 0, 2, 0]), model.initial_state(LANES))
    (output.token_losses.sum() + state.weights.sum() + state.momentum.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"variant": "mal", "window": -1}, "window must be at least 0, got -1"),
        ({"variant": "mal", "persistent": -1}, "persistent must be at least 0, got -1"),
        ({"variant": "mag", "heads": 8}, "rotary positions need heads of an even width, got width=1"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"heads": 3}, "heads must divide dim, got heads=3 and dim=8"),
        ({"memory_hidden": -1}, "memory_hidden must be at least 0, got -1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"chunk": 6}, "chunk must be at most segment_length=5, got 6: lower it, or set null"),
    ],
)
def test_a_bad_option_is_refused_with_its_name_and_value(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        titans(**bad)


def test_another_variant_is_refused_with_those_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its check of types would come first
    with pytest.raises(UsageError, match="variant must be one of lmm, mac, mag, mal, got 'mla'"):
        titans(variant="mla")


@pytest.mark.parametrize("variant", ["mac", "mag", "mal"])
def test_attention_may_have_no_learned_vector(variant: str) -> None:
    segments = full(2)
    (without, _), (with_two, _) = (losses_of(titans(variant=variant, persistent=n), segments) for n in (0, 2))
    assert without.isfinite().all()
    assert (without != with_two).all()
