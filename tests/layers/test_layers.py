"""Layers by hand: writing into a slot, forgetting, visibility, and losses."""

import math
from itertools import pairwise

import jaxtyping
import pytest
import torch
from models import LargestTensor, identities, shown
from torch import Tensor
from torch.nn import functional as F

from memformer_pl.contract import Segment
from memformer_pl.layers import (
    BiasedMemoryNorm,
    BlockConfig,
    CrossAttention,
    Positions,
    RotaryPositions,
    SlotReader,
    SlotWriter,
    TransformerBlock,
    output_from_logits,
)

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def slot_writer(*, dim: int = 8, heads: int = 2, temperature: float = 0.25, segment_length: int = 5) -> SlotWriter:
    return SlotWriter(dim=dim, heads=heads, temperature=temperature, segment_length=segment_length).double()


def sphere(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape).double(), dim=-1)


def all_tokens(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool)


def test_a_slot_that_sees_only_itself_does_not_change() -> None:
    memory, tokens = sphere(2, 3, 8), torch.randn(2, 5, 8).double()
    assert torch.equal(slot_writer()(memory, tokens, torch.zeros(2, 5, dtype=torch.bool)), memory)
    assert torch.equal(slot_writer()(memory, tokens[:, :0], torch.zeros(2, 0, dtype=torch.bool)), memory)


def test_a_slot_and_a_token_share_a_write_as_worked_out_by_hand() -> None:
    # Two entries, normalised, are (-1, 1): a slot scores 2 for itself. The token scores 2 - ln 3, a third of the odds.
    # So the slot keeps 3/4 of (0.6, 0.8) and takes 1/4 of (ln 3, 2).
    writer = slot_writer(dim=2, heads=1, temperature=2**-0.5)
    writer.norm.eps = 0.0
    identities(writer.to_query, writer.to_key)
    identities(writer.to_value, scale=1 / writer.value_scale)
    retention, token = shown(writer.retention), torch.tensor([[[math.log(3), 2.0]]]).double()
    written = writer(torch.tensor([[[0.6, 0.8]]]).double(), token, all_tokens(token))
    close(retention[0], torch.full((1, 1, 1), 0.75).double())
    close(written, torch.tensor([[[0.45 + math.log(3) / 4, 1.1]]]).double())


def test_each_head_writes_its_own_part_of_a_slot() -> None:
    writer, memory, tokens = slot_writer(), sphere(2, 3, 8), torch.randn(2, 5, 8).double()
    before = writer(memory, tokens, all_tokens(tokens))
    with torch.no_grad():
        writer.to_key.weight[:4] *= 0.5
    after = writer(memory, tokens, all_tokens(tokens))
    assert not (before[..., :4] == after[..., :4]).any()
    assert torch.equal(before[..., 4:], after[..., 4:])


def test_slots_do_not_see_each_other() -> None:
    writer, memory, tokens = slot_writer(), sphere(2, 3, 8), torch.randn(2, 5, 8).double()
    before = writer(memory, tokens, all_tokens(tokens))
    memory[:, 1] = sphere(2, 8)
    same = (writer(memory, tokens, all_tokens(tokens)) == before).all(-1)
    assert same.tolist() == [[True, False, True]] * 2


def test_absent_tokens_are_not_written() -> None:
    writer, memory, tokens = slot_writer(), sphere(2, 3, 8), torch.randn(2, 5, 8).double()
    token_mask = torch.arange(5) < torch.tensor([[2], [5]])
    written = writer(memory, tokens, token_mask)
    close(written[:1], writer(memory[:1], tokens[:1, :2], token_mask[:1, :2]), rtol=1e-12, atol=1e-14)
    assert not torch.equal(written[0], writer(memory, tokens, all_tokens(tokens))[0])


def test_without_a_mask_all_tokens_are_written() -> None:
    writer, memory, tokens = slot_writer(), sphere(2, 3, 8), torch.randn(2, 5, 8).double()
    assert torch.equal(writer(memory, tokens, None), writer(memory, tokens, all_tokens(tokens)))


def test_scores_are_slots_by_tokens_and_themselves_never_slots_by_slots() -> None:
    writer, memory, tokens = slot_writer(), sphere(2, 50, 8), torch.randn(2, 5, 8).double()
    retention, writing = shown(writer.retention), shown(writer.writing)
    with LargestTensor() as largest:
        writer(memory, tokens, all_tokens(tokens))
    assert retention[0].shape == (2, 2, 50)
    assert writing[0].shape == (2, 2, 50, 5)
    close(retention[0] + writing[0].sum(-1), torch.ones(2, 2, 50).double())
    assert largest.entries == 2 * 2 * 50 * (1 + 5)


def test_slots_of_an_untrained_writer_keep_most_of_themselves_in_every_head() -> None:
    writer = slot_writer(dim=64, heads=4, segment_length=32)
    retention, tokens = shown(writer.retention), torch.randn(8, 32, 64).double()
    writer(sphere(8, 16, 64), tokens, all_tokens(tokens))
    assert retention[0].mean((0, 2)).min() > 0.5


def test_a_longer_time_scale_keeps_more_in_every_head_and_pulls_less() -> None:
    tokens, memory, kept = torch.randn(8, 32, 64), sphere(8, 16, 64).float(), []
    for time_scale in (32.0, 256.0):
        torch.manual_seed(0)
        writer = SlotWriter(dim=64, heads=4, temperature=0.25, segment_length=32, time_scale=time_scale)
        retention = shown(writer.retention)
        writer(memory, tokens, all_tokens(tokens))
        kept.append(retention[0].mean((0, 2)))
        norm = BiasedMemoryNorm(slots=1000, dim=64, forgetting=True, time_scale=time_scale)
        torch.testing.assert_close(norm.bias.norm(dim=-1).mean(), torch.tensor(3.2 / time_scale), rtol=0.02, atol=0)
    assert (kept[1] > kept[0]).all()
    assert kept[1].min() > 0.75


@pytest.mark.parametrize("time_scale", [0.5, -1.0, float("inf"), float("nan")])
def test_a_time_scale_in_which_nothing_is_kept_or_that_has_no_end_is_refused(time_scale: float) -> None:
    with pytest.raises(ValueError, match=f"time_scale must be at least 1 segment and finite, got {time_scale}"):
        BiasedMemoryNorm(slots=2, dim=8, forgetting=True, time_scale=time_scale)
    with pytest.raises(ValueError, match=f"time_scale must be at least 1 segment and finite, got {time_scale}"):
        SlotWriter(dim=8, heads=2, temperature=0.25, segment_length=4, time_scale=time_scale)


def forgetting_norm(vectors: Tensor, *, forgetting: bool = True) -> BiasedMemoryNorm:
    """A memory norm with these forgetting vectors."""
    norm = BiasedMemoryNorm(slots=len(vectors), dim=vectors.shape[-1], forgetting=forgetting).double()
    with torch.no_grad():
        norm.anchors.copy_(vectors * (norm.anchors / norm.bias).mean())
    return norm


def test_a_slot_moves_by_its_forgetting_vector_and_back_onto_the_sphere() -> None:
    # (1, 0) + (0, 1) is (1, 1); (1, 0) + (-0.4, 0.8) is (0.6, 0.8), of length 1 already
    norm = forgetting_norm(torch.tensor([[0.0, 1.0], [-0.4, 0.8]]).double())
    slots = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).double()
    close(norm(slots), torch.tensor([[[0.5**0.5, 0.5**0.5], [0.6, 0.8]]]).double())


def test_slots_stay_on_the_unit_sphere() -> None:
    norm = BiasedMemoryNorm(slots=3, dim=8, forgetting=True).double()
    close(norm(5 * torch.randn(2, 3, 8).double()).norm(dim=-1), torch.ones(2, 3).double())


def test_the_direction_of_its_forgetting_vector_is_where_a_slot_stays() -> None:
    norm = BiasedMemoryNorm(slots=3, dim=8, forgetting=True).double()
    initial = norm.initial(2)
    close(initial, (norm.bias / norm.bias.norm(dim=-1, keepdim=True)).expand(2, 3, 8))
    close(norm(initial), initial)


def test_a_slot_drifts_there_at_every_step_and_the_faster_the_longer_its_vector() -> None:
    direction = sphere(8)
    norm = forgetting_norm(torch.stack((0.1 * direction, 0.2 * direction, 0.4 * direction)))
    slots = sphere(8).expand(1, 3, 8)
    away = [(slots - norm.initial(1)).norm(dim=-1)[0]]
    for _ in range(200):
        slots = norm(slots)
        away.append((slots - norm.initial(1)).norm(dim=-1)[0])
    for before, after in pairwise(away[:21]):
        assert (after < before).all()
        assert after[0] > after[1] > after[2]
    assert away[-1].max() < 1e-6


def test_without_forgetting_a_slot_stays_where_it_is() -> None:
    norm = BiasedMemoryNorm(slots=3, dim=8, forgetting=False).double()
    slots = sphere(2, 3, 8)
    close(norm(3 * slots), slots)


def test_a_reader_takes_slots_as_a_set() -> None:
    reader, x, memory = SlotReader(dim=8, heads=2).double(), torch.randn(2, 3, 8).double(), sphere(2, 5, 8)
    close(reader(x, memory[:, torch.tensor([3, 1, 4, 0, 2])]), reader(x, memory), rtol=1e-12, atol=1e-14)
    assert not torch.equal(reader(x, memory[:, 1:]), reader(x, memory))


def test_an_encoder_layer_reads_in_both_directions_and_memory_only_where_told() -> None:
    sizes = BlockConfig(dim=8, heads=2, ffn_dim=12, dropout=0.0)
    at = Positions(rotation=RotaryPositions(width=4, first=0, last=2).span(0, 3))
    x, memory = torch.randn(1, 3, 8), torch.randn(1, 2, 8)
    for reads_memory in (False, True):
        layer = TransformerBlock(sizes, reads_memory=reads_memory)
        before = layer(x, at, memory)
        assert torch.equal(layer(x, at, -memory), before) is not reads_memory
        for n in range(3):
            changed = x.clone()
            changed[:, n] += torch.randn(8)
            assert (layer(changed, at, memory) != before).any(-1).all()


def test_an_output_by_hand() -> None:
    # Odds of 1 : 3 on token 1 of two; the absent one has no loss and is not correct.
    logits = torch.tensor([0.0, math.log(3)]).expand(1, 3, 2)
    segment = Segment(torch.tensor([[1, 0, 1]]), torch.tensor([[True, True, False]]), torch.tensor([True]))
    output = output_from_logits(logits, segment)
    close(output.token_losses, torch.tensor([[math.log(4 / 3), math.log(4), 0.0]]))
    assert output.correct.tolist() == [[True, False, False]]
    assert output.auxiliary_loss == 0


def test_shapes_are_checked_in_the_tests_of_modules() -> None:
    attention = CrossAttention(dim=8, heads=2)
    source = attention.keys_values(torch.randn(2, 3, 8))
    with pytest.raises(jaxtyping.TypeCheckError, match="x"):
        attention(torch.randn(1, 3, 8), source)
