"""Gated DeltaNet and its kin: a step by hand, what a border of segments is to them, what they are without memory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from models import (
    LANES,
    LENGTH,
    VOCAB,
    assert_same,
    full,
    gated_delta_net,
    irregular,
    losses_of,
    make_segment,
    outcome,
    plain_loop,
    shown,
    train_on,
    untouched,
)
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.contract import ABSENT, Segment, SegmentModel, state_bytes
from memformer_pl.errors import UsageError
from memformer_pl.gradients.rollout import GRADIENTS
from memformer_pl.layers.matrix_memory import GATES, MatrixMemory
from memformer_pl.models import GatedDeltaNet
from memformer_pl.training.flops import count_flops

close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
LAYERS, HEADS, KEY, VALUE, DIM = 2, 2, 3, 4, 8


@pytest.fixture(params=GATES)
def update(request: pytest.FixtureRequest) -> Any:
    return request.param


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()


def gating(layer: MatrixMemory, update: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Strength ``[H]`` and decay ``[H, K]`` of a token by the equations."""
    gates: Any = layer.gates
    if update == "gla":
        decay = torch.sigmoid(gates.up.weight @ gates.down.weight @ x + gates.up.bias) ** (1 / 16)
        return torch.ones(HEADS).double(), decay.view(HEADS, KEY)
    strength, decay = torch.ones(HEADS).double(), torch.ones(HEADS).double()
    if update in ("gated_delta", "mamba2"):
        step = softplus(gates.steps.to_step.weight @ x + gates.steps.step_bias)
        strength, decay = step, torch.exp(-gates.steps.log_rate.exp() * step)
    if update in ("gated_delta", "delta"):
        strength = 1 / (1 + torch.exp(-gates.to_strength.weight @ x))
    return strength, decay[:, None].expand(HEADS, KEY)


def layer_by_hand(layer: MatrixMemory, update: str, x_LD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of a layer of matrix memories, memory, and the inputs of the convolution, token by token."""
    memory = torch.zeros(HEADS, KEY, VALUE).double()
    inputs = [torch.zeros(2 * HEADS * KEY + DIM).double()] * 3
    outputs = []
    for x in x_LD:
        inputs.append(layer.to_query_key_value.weight @ x)
        mixed = sum(layer.convolution.weight[n] * inputs[n - 4] for n in range(4))
        assert isinstance(mixed, Tensor)
        mixed = mixed / (1 + torch.exp(-mixed))
        query, key = (part.view(HEADS, KEY) for part in mixed[: 2 * HEADS * KEY].chunk(2))
        query, key = query / query.norm(dim=1, keepdim=True), key / key.norm(dim=1, keepdim=True)
        value = mixed[2 * HEADS * KEY :].view(HEADS, VALUE)
        strength, decay = gating(layer, update, x)
        memory = decay[:, :, None] * memory
        held = torch.stack([key[h] @ memory[h] for h in range(HEADS)]) * (update in ("gated_delta", "delta"))
        memory = memory + key[:, :, None] * (strength[:, None] * (value - held))[:, None]
        read = torch.stack([query[h] @ memory[h] for h in range(HEADS)])
        read = read / (read.square().mean(1, keepdim=True) + 1e-6).sqrt() * layer.scale
        gate = layer.to_gate.weight @ x
        outputs.append(layer.to_out.weight @ (read.flatten() * gate / (1 + torch.exp(-gate))))
    return torch.stack(outputs), memory, torch.stack(inputs[-3:])


def test_four_tokens_by_the_equations(update: Any) -> None:
    model, segment = gated_delta_net(update=update), make_segment([4], document_start=[1])
    x, memories, inputs = model.embedding(segment.tokens[:, :3])[0], [], []
    for block in model.blocks:
        update_LD, memory, last = layer_by_hand(block.memory, update, block.memory_norm(x))
        x = x + update_LD
        x = x + block.ffn(block.ffn_norm(x)[None])[0]
        memories.append(memory)
        inputs.append(last)
    output, state = model(segment, model.initial_state(1))
    close(
        output.token_losses[0, :4], F.cross_entropy(model.embedding.logits(x), segment.tokens[0, :4], reduction="none")
    )
    close(state.memory[0], torch.stack(memories))
    close(state.inputs[0], torch.stack(inputs))
    assert state.last.tolist() == [segment.tokens[0, 3]]


def whole_document(segments: list[Segment]) -> Segment:
    return Segment(*(torch.cat([s[n] for s in segments], dim=1) for n in range(2)), segments[0].document_start)


@pytest.mark.parametrize("chunk", [1, 2, 4, 5, None])
def test_a_document_in_segments_costs_what_it_does_in_one_pass_of_any_chunk(update: Any, chunk: int | None) -> None:
    segments = full(4)
    (together,) = losses_of(
        gated_delta_net(update=update, segment_length=4 * LENGTH, chunk=7), [whole_document(segments)]
    )
    close(torch.cat(losses_of(gated_delta_net(update=update, chunk=chunk), segments), dim=1), together)


def test_what_is_carried_is_the_state_behind_the_last_token_that_is_there(update: Any) -> None:
    model, lengths = gated_delta_net(update=update), (5, 1, 3, 4)
    ragged = make_segment(lengths)
    next_state = model.advance(ragged, model.initial_state(LANES))
    for lane, length in enumerate(lengths):
        tokens = ragged.tokens[lane : lane + 1, :length]
        alone = Segment(tokens, torch.ones_like(tokens).bool(), torch.tensor([True]))
        for got, expected in zip(next_state, model.advance(alone, model.initial_state(1)), strict=True):
            close(got[lane], expected[0])


def test_a_lane_carries_a_matrix_for_each_head_three_inputs_of_the_convolution_and_a_token() -> None:
    state = gated_delta_net(layers=3).initial_state(2)
    assert state_bytes(state) == 3 * (HEADS * KEY * VALUE + 3 * (2 * HEADS * KEY + DIM)) * 8 + 8
    assert GatedDeltaNet(vocab_size=5, dim=8, heads=2).key_width == 4


def test_memory_is_in_single_precision_where_the_weights_are_in_half() -> None:
    state = gated_delta_net().bfloat16().initial_state(1)
    assert (state.memory.dtype, state.inputs.dtype) == (torch.float32, torch.bfloat16)


def test_a_lane_reset_before_each_segment_goes_on_as_if_a_document_began_with_its_last_token() -> None:
    model, begun = gated_delta_net(), gated_delta_net()
    state = model.initial_state(1)
    assert state.last.tolist() == [ABSENT]
    for segment in full(4, lanes=1):
        with torch.no_grad():
            if int(state.last) != ABSENT:
                begun.embedding.start.copy_(begun.embedding.vectors(state.last[:, None])[0, 0])
        (fresh,) = losses_of(begun, [segment])
        output, state = model(segment, model.reset_memory(state))
        close(output.token_losses, fresh)


@torch.no_grad()
def changed(model: GatedDeltaNet, edit: Callable[[MatrixMemory], object]) -> GatedDeltaNet:
    """The model with an edit of its layers."""
    for block in model.blocks:
        edit(block.memory)
    return model


def test_without_values_it_is_a_feed_forward_network_of_the_token_before() -> None:
    model = changed(gated_delta_net(), lambda layer: layer.to_query_key_value.weight[-DIM:].zero_())
    first, second = full(2)
    tokens = torch.cat((first.tokens, second.tokens), dim=1)
    x = model.embedding(tokens[:, :-1])
    for block in model.blocks:
        x = x + block.ffn(block.ffn_norm(x))
    expected = F.cross_entropy(model.embedding.logits(x).mT, tokens, reduction="none")
    close(torch.cat(losses_of(model, [first, second]), dim=1), expected)
    assert not torch.allclose(torch.cat(losses_of(gated_delta_net(), [first, second]), dim=1), expected)


@pytest.mark.parametrize("update", ["gated_delta", "mamba2"])
@pytest.mark.parametrize("layers", [1, 2])
def test_where_all_decays_a_token_is_known_as_far_as_the_convolutions_reach(update: Any, layers: int) -> None:
    def forget(layer: Any) -> None:
        layer.gates.steps.log_rate.fill_(20.0)

    segments = full(5, lanes=1)
    model = changed(gated_delta_net(update=update, layers=layers), forget)
    before = torch.cat(losses_of(model, segments), dim=1)[0]
    segments[1].tokens[:, 0] = (segments[1].tokens[:, 0] + 1) % VOCAB
    differs = torch.cat(losses_of(model, segments), dim=1)[0] != before
    reached = range(LENGTH, LENGTH + 2 + 3 * layers)  # its own loss, those of the token that it enters, and 3 a layer
    assert differs.nonzero()[:, 0].tolist() == list(reached)


def test_a_token_is_known_for_as_long_as_the_state_is_carried(update: Any) -> None:
    build = partial(gated_delta_net, update=update)
    assert untouched(build(), changed=0) == [False] * 5
    assert untouched(build(), changed=2, token=LENGTH - 1) == [True, True, False, False, False]


def test_without_decay_it_is_a_delta_net() -> None:
    def keep(layer: Any) -> None:
        layer.gates.steps.log_rate.fill_(-100.0)

    gated, plain = changed(gated_delta_net(), keep), gated_delta_net(update="delta")
    missing = plain.load_state_dict(gated.state_dict(), strict=False)
    assert not missing.missing_keys
    for a, b in zip(losses_of(gated, irregular(5)), losses_of(plain, irregular(5)), strict=True):
        close(a, b)


@pytest.mark.parametrize("gradient", sorted(GRADIENTS))
def test_every_gradient_but_truncated_gives_the_same(gradient: str, update: Any) -> None:
    def case() -> Any:
        model = gated_delta_net(update=update, dropout=0.2)
        return train_on(model, irregular(7), model.initial_state(LANES))

    got, expected = outcome(GRADIENTS[gradient], case), outcome(plain_loop, case)
    if gradient == "truncated":
        assert torch.equal(got.loss, expected.loss)
        name = "blocks.0.memory.to_query_key_value.weight"
        assert not torch.allclose(got.grads[name], expected.grads[name])
    else:
        assert_same(got, expected)


def test_the_gradient_reaches_through_matrices_and_through_the_inputs_of_the_convolution() -> None:
    model = gated_delta_net()
    state = model.initial_state(1)
    for segment in full(2, lanes=1):
        state = model.advance(segment, state)
    carried = type(state)(*(field.detach().requires_grad_() for field in state[:2]), state.last)
    output, _ = model(full(3, lanes=1)[2], carried)
    for gradient in torch.autograd.grad(output.token_losses.sum(), carried[:2]):
        assert gradient.flatten(2).any(2).all()


def test_heads_begin_with_decays_from_a_thousand_tokens_to_less_than_one() -> None:
    (block,) = GatedDeltaNet(vocab_size=5, dim=16, heads=4, layers=1).blocks
    _, log_decay = block.memory.gates(torch.zeros(1, 1, 16))
    tokens = -1 / log_decay.flatten()
    close(tokens[[0, -1]], torch.tensor([1000.0, 0.625]), rtol=1e-3, atol=0)
    assert (tokens.diff() < 0).all()


def test_probes_show_what_each_token_writes_and_what_it_keeps(update: Any) -> None:
    model, ragged = gated_delta_net(update=update), make_segment([5, 2])
    layer = model.blocks[1].memory
    strengths, decays = shown(layer.strength), shown(layer.decay)
    model.advance(ragged, model.initial_state(2))
    (strength,), (decay,) = strengths, decays
    assert strength.shape == (2, HEADS, LENGTH, 1)
    assert decay.shape == (2, HEADS, LENGTH, KEY if update == "gla" else 1)
    absent = ~ragged.token_mask[:, None, :, None]
    assert torch.equal(strength == 0, absent.expand_as(strength))
    kept = decay.masked_select(~absent)
    assert (kept == 1).all() if update == "delta" else ((kept > 0) & (kept < 1)).all()
    assert (decay.masked_select(absent) == 1).all()


@pytest.mark.parametrize("chunk", [None, 2])
def test_its_operations_are_those_of_the_formula(
    update: Any, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "experiments" / "benchmarks")
    from flops import formula

    model: SegmentModel = gated_delta_net(update=update, chunk=chunk)
    assert count_flops(model, lanes=3) == formula(model, lanes=3)
    assert count_flops(model, lanes=3, advance=True) < count_flops(model, lanes=3)


def test_absent_tokens_draw_no_gradient_that_is_not_finite(update: Any) -> None:
    model = gated_delta_net(update=update)
    output, state = model(make_segment([1, 0, 2, 0]), model.initial_state(LANES))
    (output.token_losses.sum() + state.memory.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"heads": 3}, "heads must divide dim, got heads=3 and dim=8"),
        ({"key_width": 0}, "key_width must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"chunk": 6}, "chunk must be at most segment_length=5, got 6: lower it, or set null"),
    ],
)
def test_a_bad_option_is_refused_with_its_name_and_value(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_delta_net(**bad)


def test_an_update_that_does_not_exist_is_refused_with_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its check of types would come first
    with pytest.raises(UsageError, match="update must be one of gated_delta, delta, gla, mamba2, got 'mamba'"):
        gated_delta_net(update="mamba")


def test_every_layer_but_the_gates_is_the_same_for_every_update() -> None:
    def others(update: Any) -> list[str]:
        named: nn.Module = gated_delta_net(update=update)
        return [name for name, _ in named.named_parameters() if ".gates." not in name]

    assert all(others(update) == others("gated_delta") for update in GATES)
