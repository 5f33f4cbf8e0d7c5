"""Memformer: what memory is for, how it begins, how it is forgotten, and what each ablation takes away."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from models import (
    LANES,
    LENGTH,
    VOCAB,
    AttentionMasks,
    Case,
    assert_same,
    full,
    irregular,
    losses_of,
    make_segment,
    memformer,
    outcome,
    outcome_in_groups,
    plain_loop,
    train_on,
    untouched,
)
from torch import Tensor, nn
from torch.nn import functional as F

from memformer_pl.contract import ABSENT, Segment, state_bytes
from memformer_pl.errors import UsageError
from memformer_pl.models import Memformer
from memformer_pl.models.memformer import MemformerState


def memories(model: Memformer, horizon: int) -> Iterator[Tensor]:
    """The memory before a rollout of full segments and after each of them."""
    state = model.initial_state(2)
    yield state.memory
    for segment in full(horizon):
        _, state = model(segment, state)
        yield state.memory


def elsewhere(model: Memformer) -> MemformerState:
    """A state whose slots stand somewhere on the sphere, with nothing to be read."""
    state = model.initial_state(LANES)
    slots = torch.randn(state.memory.shape, generator=torch.Generator().manual_seed(3)).double()
    return state._replace(memory=F.normalize(slots, dim=-1))


def test_a_token_is_remembered_for_as_long_as_there_is_memory() -> None:
    assert untouched(memformer(), changed=0) == [False, False, False, False, False]
    assert untouched(memformer(), changed=2) == [True, True, False, False, False]


def test_without_memory_a_token_is_known_in_its_segment_and_the_next_alone() -> None:
    assert untouched(memformer(slots=0), changed=0) == [False, False, True, True, True]
    assert untouched(memformer(slots=0), changed=2) == [True, True, False, False, True]


def test_slots_have_no_order() -> None:
    model, permuted, order = memformer(), memformer(), torch.tensor([2, 0, 1])
    with torch.no_grad():
        permuted.memory_norm.anchors.copy_(model.memory_norm.anchors[order])
    for a, b in zip(losses_of(model, full(4)), losses_of(permuted, full(4)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    for a, b in zip(memories(model, 4), memories(permuted, 4), strict=True):
        torch.testing.assert_close(a[:, order], b, rtol=1e-12, atol=1e-14)


def test_memory_begins_at_the_direction_of_the_forgetting_vectors() -> None:
    model = memformer()
    vectors = model.memory_norm.anchors.detach()
    expected = vectors / vectors.square().sum(-1, keepdim=True).sqrt()
    for lane in model.initial_state(LANES).memory:
        torch.testing.assert_close(lane, expected)


def test_nothing_is_to_be_read_at_the_start_of_a_document_and_so_nothing_is_written() -> None:
    model = memformer()
    initial, first, second = memories(model, 2)
    assert (model.initial_state(2).previous == ABSENT).all()
    torch.testing.assert_close(first, initial)
    assert (second - first).norm(dim=-1).min() > 1e-3


def test_slots_stay_on_the_unit_sphere() -> None:
    for memory in memories(memformer(), 5):
        torch.testing.assert_close(memory.norm(dim=-1), torch.ones(2, 3).double())


def test_a_state_holds_the_last_segment_of_a_lane_until_it_is_read() -> None:
    model = memformer()
    segment = make_segment([5, 3, 0, 1])
    _, state = model(segment, model.initial_state(LANES))
    assert torch.equal(state.previous, segment.tokens.where(segment.token_mask, ABSENT))


def test_without_slots_a_lane_carries_the_tokens_of_one_segment_and_no_number_else() -> None:
    memory, previous = memformer(slots=0).initial_state(LANES)
    assert memory.numel() == 0
    assert state_bytes(memformer(slots=0).initial_state(1)) == LENGTH * previous.element_size()


def test_room_for_longer_segments_changes_no_loss() -> None:
    for reads_memory in (False, True):
        model, roomy = (memformer(segment_length=n, decoder_reads_memory=reads_memory) for n in (LENGTH, 2 * LENGTH))
        roomy.load_state_dict(model.state_dict())
        for a, b in zip(losses_of(model, irregular(5)), losses_of(roomy, irregular(5)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=0)


def without(*layers: nn.Linear) -> None:
    """Silence layers."""
    for layer in layers:
        nn.init.zeros_(layer.weight)


@pytest.mark.parametrize("overlap", [0, 1, 3, LENGTH])
def test_the_decoder_reads_the_last_tokens_of_the_previous_segment_again(overlap: int) -> None:
    model = memformer(overlap=overlap)
    without(*(block.cross_attention.to_out for block in model.decoder))  # nothing else comes from before
    for token in range(LENGTH):
        again = token >= LENGTH - overlap
        assert untouched(model, changed=1, token=token) == [True, False, not again, True, True]


def test_what_does_not_exist_of_an_overlap_is_start() -> None:
    model, start = memformer(overlap=3), memformer()
    first, second = make_segment([5, 2, 0, 1], seed=1), make_segment([5] * LANES, document_start=[0, 0, 0, 1], seed=2)
    _, state = model(first, model.initial_state(LANES))
    entered: list[Tensor] = []
    model.decoder[0].register_forward_pre_hook(lambda block, args: entered.append(args[0].detach()))
    model(second, state)
    tokens, expected = first.tokens, model.start.detach().repeat(LANES, 3, 1)
    expected[0] = model.embedding.weight.detach()[tokens[0, 2:]] * model.dim**0.5
    expected[1, 1:] = model.embedding.weight.detach()[tokens[1, :2]] * model.dim**0.5
    torch.testing.assert_close(entered[0][:, :3], expected)
    one = memformer(overlap=1)(first, one_state := memformer(overlap=1).initial_state(LANES))[0]
    torch.testing.assert_close(one.token_losses, start(first, one_state)[0].token_losses)  # nothing was before


@pytest.mark.parametrize("overlap", [-1, LENGTH + 1])
def test_an_overlap_is_a_part_of_a_segment(overlap: int) -> None:
    with pytest.raises(UsageError, match=f"overlap.*got {overlap}"):
        memformer(overlap=overlap)


def test_the_decoder_reads_the_memory_into_which_the_previous_segment_is_written() -> None:
    for reads_memory in (False, True):
        model = memformer(decoder_reads_memory=reads_memory)
        without(*(block.memory_reader.attention.to_out for block in model.encoder))  # the encoder does not
        _, state = model(make_segment([5] * LANES), elsewhere(model))
        output, _ = model(make_segment([5, 5, 3, 5], seed=1), state)
        reset, _ = model(make_segment([5, 5, 3, 5], seed=1), model.reset_memory(state))
        assert torch.equal(output.token_losses, reset.token_losses) != reads_memory
        output.token_losses.sum().backward()
        assert bool(model.writer.to_value.weight.grad.any()) == reads_memory


def test_reading_no_memory_in_the_decoder_is_refused() -> None:
    with pytest.raises(UsageError, match=r"decoder_reads_memory needs slots, got slots=0: leave it out"):
        memformer(slots=0, decoder_reads_memory=True)


def test_a_reset_of_memory_keeps_the_segment_that_is_still_to_be_read() -> None:
    model = memformer()
    _, state = model(make_segment([5, 3, 5, 1]), elsewhere(model))
    reset = model.reset_memory(state)
    assert torch.equal(reset.memory, model.initial_state(LANES).memory)
    assert torch.equal(reset.previous, state.previous)
    assert not torch.equal(reset.memory, state.memory)


def test_a_slot_is_pulled_back_to_where_it_began_only_with_forgetting() -> None:
    for forgetting in (True, False):
        model = memformer(forgetting=forgetting)
        state, home = elsewhere(model), model.initial_state(LANES).memory
        after = model.advance(make_segment([5] * LANES), state).memory
        if forgetting:
            assert ((after - home).norm(dim=-1) < (state.memory - home).norm(dim=-1)).all()
        else:
            torch.testing.assert_close(after, state.memory, rtol=1e-12, atol=1e-14)


def masks_of(model: Memformer, segment: Segment, state: MemformerState) -> list[str]:
    """Under which mask each attention of a step is computed, layer by layer: the encoder's, then the decoder's."""
    with AttentionMasks() as masks:
        model(segment, state)
    return masks.seen


def test_a_mask_over_the_previous_segment_is_left_out_only_if_it_is_known_to_be_full() -> None:
    model, roomy = memformer(), memformer(segment_length=LENGTH + 1)
    first, second = full(2)
    for each, continues, expected in (
        (model, False, "mask"),
        (model, True, "none"),
        (roomy, True, "mask"),  # then no segment is full
    ):
        state = each.advance(first, each.initial_state(2))
        encoder, decoder = [expected, "none"] * 2, ["causal", expected] * 2
        assert masks_of(each, second._replace(continues=continues), state) == encoder + decoder


def test_a_segment_that_follows_one_that_is_not_full_is_refused_if_it_claims_to_continue() -> None:
    model, segment = memformer(), full(2)[1]
    short = model.advance(make_segment([5, 4]), model.initial_state(2))
    for state in (short, model.initial_state(2)):
        model(segment, state)
        for way in (model, model.advance, model.advance_and_encode):
            with pytest.raises(UsageError, match="follows a segment that is not full: leave it False"):
                way(segment._replace(continues=True), state)


@pytest.mark.parametrize("group", [2, 3])
def test_with_seeds_groups_of_decoders_equal_a_plain_loop_and_draw_nothing(group: int) -> None:
    def case() -> Case:
        model = memformer(dropout=0.2)
        segments = [each._replace(seeds=torch.tensor([t]), continues=t > 0) for t, each in enumerate(full(5))]
        return train_on(model, segments, model.initial_state(2))

    expected = outcome(plain_loop, case)
    assert_same(outcome_in_groups(group, case), expected)
    assert torch.equal(expected.stream, torch.Generator().manual_seed(0).get_state())


def shares(model: Memformer) -> Tensor:
    """The attention ``[B, H, M, 1 + L]`` of the first write: to the slot itself, and to the tokens."""
    seen: list[Tensor] = []
    for probe in (model.writer.retention, model.writer.writing):
        probe.register_forward_hook(lambda probe, args, value: seen.append(value.detach()))
    segment = make_segment([LENGTH] * LANES)
    model.advance(segment, elsewhere(model)._replace(previous=segment.tokens))
    return torch.cat((seen[0][..., None], seen[1]), dim=-1)


def test_the_lower_the_temperature_the_nearer_a_slot_is_to_all_or_nothing() -> None:
    largest = []
    for temperature in (1.0, 0.5, 0.25, 1e-4):
        model = memformer(temperature=temperature)
        model.load_state_dict(memformer().state_dict())
        largest.append(shares(model).max(-1).values)
    assert all((a < b).all() for a, b in pairwise(largest[:3]))
    assert largest[-1].min() > 0.99


@pytest.mark.parametrize(("writer_heads", "heads"), [(None, 2), (1, 1), (4, 4), (8, 8)])
def test_the_writer_has_heads_of_its_own(writer_heads: int | None, heads: int) -> None:
    model = memformer(writer_heads=writer_heads)
    assert shares(model).shape == (LANES, heads, 3, 1 + LENGTH)
    assert model.writer_heads == heads


def test_without_memory_there_is_nothing_that_reads_or_writes_it() -> None:
    ends = ("memory_norm", "memory_reader", "writer")
    names = [name for name, parameter in memformer(slots=0).named_parameters() if parameter.numel()]
    assert not [name for name in names if any(end in name.split(".") for end in ends)]
    assert any("writer" in name for name, _ in memformer().named_parameters())


def test_the_vocabulary_and_two_sizes_are_all_that_a_memformer_asks_for() -> None:
    model = Memformer(vocab_size=VOCAB, dim=8, heads=2)
    assert (model.ffn_dim, model.writer_heads, model.slots) == (32, 2, 64)
    assert (len(model.encoder), len(model.decoder)) == (model.encoder_layers, model.decoder_layers)
    assert losses_of(model, irregular(2))[1].shape == (LANES, LENGTH)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"heads": 3}, "heads must divide dim, got heads=3 and dim=8"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"heads": 8}, "heads of an even width, got width=1"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"writer_heads": 3}, "writer_heads must divide dim, got writer_heads=3 and dim=8"),
        ({"writer_heads": 0}, "writer_heads must divide dim, got writer_heads=0 and dim=8"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"temperature": -0.5}, "temperature must be above 0 and finite, got -0.5"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
        ({"slots": -1}, r"slots must be at least 0, got -1"),
        ({"encoder_layers": 0}, "encoder_layers must be at least 1, got 0"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
        ({"ffn_dim": 0}, "ffn_dim must be at least 1, got 0"),
        ({"segment_length": 0}, "segment_length must be at least 1, got 0"),
    ],
)
def test_a_bad_size_is_refused_with_its_name_and_value(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memformer(**bad)


def test_an_untrained_model_reads_nothing_from_memory() -> None:
    model = Memformer(vocab_size=VOCAB, dim=8, heads=2, slots=3, segment_length=LENGTH, dropout=0.0)
    segment, state = full(1)[0], model.initial_state(2)
    segment = segment._replace(document_start=torch.zeros(2, dtype=torch.bool))
    elsewhere = state._replace(memory=torch.randn_like(state.memory))
    assert torch.equal(model(segment, state)[0].token_losses, model(segment, elsewhere)[0].token_losses)
