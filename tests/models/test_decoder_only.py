"""The decoder-only models: who sees whom by hand, what they are without memory, and how far back memory reaches."""

import math
from typing import Any

import pytest
import torch
from models import (
    LANES,
    LENGTH,
    VOCAB,
    AttentionMasks,
    associative_recurrent_memory,
    full,
    irregular,
    losses_of,
    make_segment,
    memformer_decoder,
    memory_transformer,
    recurrent_memory,
    transformer,
    untouched,
)
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.contract import SegmentModel, detach, state_bytes
from memformer_pl.layers import Rotation
from memformer_pl.models import MemformerDecoder, RecurrentMemoryTransformer

close = torch.testing.assert_close
_ = None


class NoPositions(nn.Module):
    """Rotations by nothing."""

    def span(self, first: int, stop: int) -> Rotation:
        nothing = torch.zeros(1, stop - first, 1, 4)
        return Rotation(torch.ones_like(nothing), nothing)


def test_without_positions_it_is_the_transformer_of_torch() -> None:
    model, segment = transformer(), full(1)[0]
    model.rotary = NoPositions()
    x = model.embedding(segment.tokens[:, :-1])
    for layer in model.blocks:
        reference = nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
        )
        attention, ffn = layer.self_attention, layer.ffn
        theirs = {
            reference.self_attn.in_proj_weight: attention.to_query_key_value.weight,
            reference.self_attn.out_proj.weight: attention.to_out.weight,
            reference.linear1.weight: ffn.up.weight,
            reference.linear1.bias: ffn.up.bias,
            reference.linear2.weight: ffn.down.weight,
            reference.linear2.bias: ffn.down.bias,
            reference.norm1.bias: layer.self_norm.bias,
            reference.norm2.bias: layer.ffn_norm.bias,
        }
        with torch.no_grad():
            for parameter, value in theirs.items():
                parameter.copy_(value)
        future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        x = reference(x, src_mask=future)
    logits = F.layer_norm(x, (8,), bias=model.embedding.norm.bias) @ model.embedding.tokens.weight.T
    expected = F.cross_entropy(logits.transpose(1, 2), segment.tokens, reduction="none")
    close(losses_of(model, [segment])[0], expected, rtol=1e-12, atol=0)


# How far each position looks to each other one, where it sees it. START stands at -1, two tokens at 0 and 1.
BY_HAND = {
    "transformer": (transformer, [[0, _], [1, 0]]),
    "memory transformer": (
        lambda **sizes: memory_transformer(memory_tokens=2, **sizes),
        [[0, 1, _, _], [1, 0, _, _], [2, 1, 0, _], [3, 2, 1, 0]],
    ),
    "memformer decoder": (memformer_decoder, [[0, _, _], [1, 0, _], [2, 1, 0]]),
    "recurrent memory transformer": (
        lambda **sizes: recurrent_memory(memory_tokens=2, **sizes),
        [
            [0, 1, _, _, _, _, _],
            [1, 0, _, _, _, _, _],
            [2, 1, 0, _, _, _, _],
            [3, 2, 1, 0, _, _, _],
            [4, 3, 2, 1, 0, _, _],
            [5, 4, 3, 2, 1, 0, 1],
            [6, 5, 4, 3, 2, 1, 0],
        ],
    ),
    "associative recurrent memory transformer": (
        lambda **sizes: associative_recurrent_memory(memory_tokens=2, **sizes),
        [[0, _, _, _, _], [1, 0, _, _, _], [2, 1, 0, _, _], [3, 2, 1, 0, _], [4, 3, 2, 1, 0]],
    ),
    "parallel recurrent memory transformer": (
        lambda **sizes: associative_recurrent_memory(memory_tokens=2, carried="tokens", **sizes),
        [
            [2, 1, 0, _, _, _, _],
            [3, 2, 1, 0, _, _, _],
            [4, 3, 2, 1, 0, _, _],
            [5, 4, 3, 2, 1, 0, _],
            [6, 5, 4, 3, 2, 1, 0],
        ],
    ),
}
# Positions that the last layer computes, in order, where these are not all.
IN_THE_LAST_LAYER = {
    "recurrent memory transformer": [5, 6, 2, 3],
    "associative recurrent memory transformer": [3, 4, 0, 1],
    "parallel recurrent memory transformer": [3, 4, 0, 1],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_attention_of_two_tokens_and_one_head_by_hand(name: str) -> None:
    # Every query and every key is (1, 0), turned by one radian a position: a score is the cosine of the distance.
    build, distances = BY_HAND[name]
    model, seen = build(dim=2, heads=1, layers=2, segment_length=2), ([], [])
    for layer, kept in zip(model.blocks, seen, strict=True):
        attention, norm = layer.self_attention, layer.self_norm
        with torch.no_grad():
            norm.weight.zero_()
            norm.bias.copy_(torch.tensor([1.0, 0.0]))
            attention.to_query_key_value.weight.copy_(torch.eye(2).repeat(3, 1))
        attention.weights.register_forward_hook(lambda probe, args, value, kept=kept: kept.append(value.detach()))
    segment = make_segment([2], document_start=[1])
    model(segment._replace(tokens=segment.tokens[:, :2], token_mask=segment.token_mask[:, :2]), model.initial_state(1))
    odds = [[0.0 if d is None else math.exp(math.cos(d) / math.sqrt(2)) for d in row] for row in distances]
    expected = torch.tensor([[odd / sum(row) for odd in row] for row in odds], dtype=torch.float64)
    below, last = (torch.cat(kept, dim=2) for kept in seen)
    close(below, expected[None, None], rtol=1e-6, atol=0)
    close(last, expected[None, None, IN_THE_LAST_LAYER.get(name, slice(None))], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (transformer, ["causal", "causal"]),
        (memformer_decoder, ["causal", "none", "causal", "none"]),
        (memory_transformer, ["mask", "mask"]),
    ],
)
def test_attention_has_a_mask_only_where_it_is_needed(build: Any, expected: list[str]) -> None:
    model, segment = build(), make_segment([5, 3])
    with AttentionMasks() as masks:
        model(segment, model.initial_state(2))
    assert masks.seen == expected


def test_a_transformer_and_a_memory_transformer_know_a_token_in_its_segment_alone() -> None:
    for model in (transformer(), memory_transformer()):
        assert untouched(model, changed=2) == [True, True, False, True, True]
        assert state_bytes(model.initial_state(1)) == 0


@pytest.mark.parametrize("token", [0, LENGTH - 1])
def test_memory_that_recurs_knows_every_token_for_as_long_as_it_is_carried(token: int) -> None:
    for model in (recurrent_memory(), memformer_decoder()):
        assert untouched(model, changed=0, token=token) == [False, False, False, False, False]
        assert untouched(model, changed=2, token=token) == [True, True, False, False, False]


@pytest.mark.parametrize(
    "model",
    [memory_transformer(memory_tokens=0), recurrent_memory(memory_tokens=0), memformer_decoder(slots=0)],
    ids=lambda model: type(model).__name__,
)
def test_without_memory_it_is_the_transformer(model: SegmentModel) -> None:
    plain = transformer()
    loaded = model.load_state_dict(plain.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= {"memory", "memory_norm.anchors"}
    assert not any(model.get_parameter(name).numel() for name in loaded.missing_keys)
    for got, expected in zip(losses_of(model, irregular(5)), losses_of(plain, irregular(5)), strict=True):
        close(got, expected, rtol=1e-12, atol=0)
    assert state_bytes(model.initial_state(1)) == 0


def test_what_becomes_of_memory_in_front_of_a_segment_is_the_same_for_every_segment() -> None:
    model, left = memory_transformer(), []
    model.blocks[-1].register_forward_hook(lambda layer, args, x: left.append(x.detach()))
    losses_of(model, full(2))
    close(left[0][:, :3], left[1][:, :3], rtol=1e-12, atol=0)
    assert not torch.allclose(left[0][:, 3:], left[1][:, 3:])


def embedded(model: RecurrentMemoryTransformer, *, cut: int | None) -> list[Tensor]:
    """What enters four segments, with the gradient of the losses of the last two, where the memory that enters segment
    ``cut`` carries no graph."""
    entering: list[Tensor] = []
    model.embedding.register_forward_hook(lambda table, args, x: (entering.append(x), x.retain_grad())[-1])
    state, total = model.initial_state(2), torch.zeros(())
    for t, segment in enumerate(full(4)):
        output, state = model(segment, detach(state) if t == cut else state)
        total = total + (output.token_losses.sum() if t >= 2 else 0.0)
    total.backward()
    return entering


def test_the_gradient_flows_through_memory_tokens_back_to_where_they_are_cut() -> None:
    reached = [x.grad is not None and bool(x.grad.any()) for x in embedded(recurrent_memory(), cut=None)]
    assert reached == [True, True, True, True]
    for cut in (1, 2):
        reached = [x.grad is not None and bool(x.grad.any()) for x in embedded(recurrent_memory(), cut=cut)]
        assert reached == [t >= cut for t in range(4)]


def test_the_last_layer_makes_only_what_is_written_and_what_predicts_and_the_latter_not_for_the_next_state() -> None:
    model, rows = recurrent_memory(memory_tokens=2), []
    model.blocks[-1].ffn.register_forward_hook(lambda ffn, args, out: rows.append(args[0].shape[1]))
    segment, state = full(1)[0], model.initial_state(2)
    model.advance(segment, state)
    assert rows == [2]
    model(segment, state)
    assert rows == [2, 2, LENGTH]


def test_layers_that_add_nothing_leave_memory_as_it_is_up_to_the_norm_behind_them() -> None:
    model = recurrent_memory()
    with torch.no_grad():
        for layer in model.blocks:
            for linear in (layer.self_attention.to_out, layer.ffn.down):
                linear.weight.zero_()
            layer.ffn.down.bias.zero_()
        model.embedding.norm.bias.zero_()
    state = model.initial_state(LANES)
    next_state = model.advance(make_segment([5, 3, 5, 1]), state)
    close(next_state.memory, F.layer_norm(state.memory, (8,)))
    close(model.advance(make_segment([5, 3, 5, 1]), next_state).memory, next_state.memory, rtol=0, atol=1e-4)


def test_memory_tokens_are_not_alike_at_the_start() -> None:
    for memory in (memory_transformer().memory, recurrent_memory().memory):
        assert torch.pdist(memory).min() > 0.5


def test_an_untrained_decoder_reads_nothing_from_memory_and_keeps_it_on_the_sphere() -> None:
    model = MemformerDecoder(vocab_size=VOCAB, dim=8, heads=2, layers=2, slots=3, segment_length=LENGTH, dropout=0.0)
    segment, state = full(1)[0]._replace(document_start=torch.zeros(2, dtype=torch.bool)), model.initial_state(2)
    elsewhere = state._replace(memory=F.normalize(torch.randn_like(state.memory), dim=-1))
    (output, next_state), (other, _) = model(segment, state), model(segment, elsewhere)
    assert torch.equal(output.token_losses, other.token_losses)
    assert not torch.equal(next_state.memory, state.memory)
    close(next_state.memory.norm(dim=-1), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("build", "bad", "message"),
    [
        *(
            (build, bad, message)
            for build in (transformer, memory_transformer, recurrent_memory, memformer_decoder)
            for bad, message in (
                ({"layers": 0}, "layers must be at least 1, got 0"),
                ({"heads": 3}, "heads must divide dim, got heads=3 and dim=8"),
                ({"ffn_dim": 0}, "ffn_dim must be at least 1, got 0"),
                ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
            )
        ),
        (transformer, {"chunk": 0}, "chunk must be at least 1, got 0"),
        (memory_transformer, {"memory_tokens": -1}, r"memory_tokens must be at least 0, got -1"),
        (recurrent_memory, {"memory_tokens": -1}, r"memory_tokens must be at least 0, got -1"),
        (memformer_decoder, {"slots": -1}, r"slots must be at least 0, got -1"),
        (memformer_decoder, {"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
    ],
)
def test_a_bad_size_is_refused_with_its_name_and_value(build: Any, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**bad)
