"""Compressive Transformer: its relation to Transformer-XL, compressed rows by hand, and its two losses."""

from typing import Any

import pytest
import torch
from models import LANES, VOCAB, compressive, full, irregular, losses_of, make_segment, transformer_xl
from torch import Tensor

from memformer_pl.contract import Segment
from memformer_pl.layers import Compressor
from memformer_pl.models import CompressiveTransformer
from memformer_pl.models.compressive import CompressiveState, attend_by_content

POOLINGS = ["max", "mean", "conv", "dilated_conv", "most_used"]


def auxiliaries(model: CompressiveTransformer, segments: list[Segment]) -> list[Tensor]:
    state, lost = model.initial_state(len(segments[0].document_start)), []
    for segment in segments:
        output, state = model(segment, state)
        lost.append(output.auxiliary_loss)
    return lost


def after(model: CompressiveTransformer, *segments: Segment) -> CompressiveState:
    state = model.initial_state(len(segments[0].document_start))
    for segment in segments:
        state = model.advance(segment, state)
    return state


def test_with_nothing_compressed_it_is_a_transformer_xl() -> None:
    model, xl = compressive(compressed_length=0), transformer_xl(memory_length=4)
    xl.load_state_dict(model.state_dict())
    for a, b in zip(losses_of(model, irregular(5)), losses_of(xl, irregular(5)), strict=True):
        assert torch.equal(a, b)


def test_with_blocks_of_one_row_it_is_a_transformer_xl_with_a_longer_cache() -> None:
    model, xl = compressive(compression=1, compressed_length=5), transformer_xl(memory_length=9)
    xl.load_state_dict({name: t for name, t in model.state_dict().items() if not name.startswith("compressors")})
    for segments in (irregular(5), full(4)):
        for a, b in zip(losses_of(model, segments), losses_of(xl, segments), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert max(auxiliaries(model, full(3))) < 1e-14


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("max", [3, 7]), ("mean", [2, 6]), ("conv", [2, 6]), ("dilated_conv", [2.5, 1.5]), ("most_used", [3, 5])],
)
def test_four_rows_become_two_as_worked_out_by_hand(pooling: str, expected: list[float]) -> None:
    # the dilated kernel begins one row early and takes the means of rows -1 and 2, 1 and 4, of which -1 and 4 are zero
    rows, usage = torch.tensor([[[1.0], [3.0], [5.0], [7.0]]]), torch.tensor([[0.1, 0.2, 0.4, 0.3]])
    compressor = Compressor(pooling=pooling, dim=1, rate=2)
    assert compressor(rows, usage).flatten().tolist() == expected
    assert compressor(torch.ones(3, 5, 1), torch.ones(3, 5)).shape == (3, 2, 1)


@pytest.mark.parametrize("rate", [2, 3, 4, 6])
def test_a_dilated_convolution_reads_every_row(rate: int) -> None:
    rows = torch.randn(1, 10 * rate, 1, requires_grad=True)
    Compressor(pooling="dilated_conv", dim=1, rate=rate)(rows)[:, 4:6].sum().backward()
    read = rows.grad[0, :, 0].nonzero()[:, 0] % rate
    assert sorted(set(read.tolist())) == list(range(rate))


def test_the_fifth_token_is_compressed_with_the_sixth() -> None:
    # n_s = 3, n_m = 6, n_cm = 6, c = 3, the paper's figure: nine tokens pushed after three segments, three evicted, one
    # compressed row; after eight segments six.
    model = compressive(memory_length=6, compressed_length=6, compression=3, segment_length=3)
    state, counts = model.initial_state(1), []
    for t in range(9):
        tokens = torch.full((1, 3), t)
        state = model.advance(Segment(tokens, tokens >= 0, torch.tensor([t == 0])), state)
        counts.append((int(state.filled), int(state.compressed_filled)))
    assert counts == [(3, 0), (6, 0), (6, 1), (6, 2), (6, 3), (6, 4), (6, 5), (6, 6), (6, 6)]


def test_whole_blocks_leave_the_cache_and_no_token_is_lost() -> None:
    model, state, read = compressive(compressed_length=50, compression=3), None, torch.zeros(LANES, dtype=torch.long)
    for t, lengths in enumerate([(5, 1, 5, 2), (5, 1, 0, 2), (4, 1, 5, 2), (1, 1, 5, 2), (1, 1, 2, 2)]):
        segment = make_segment(lengths, seed=t)
        state = model.advance(segment, model.initial_state(LANES) if state is None else state)
        read += segment.token_mask.sum(1)
        assert torch.equal(state.filled + 3 * state.compressed_filled, read)
        assert (state.filled <= 4).all()
    assert state.compressed_filled.tolist() == [4, 1, 5, 2]


def test_compressed_rows_are_made_of_the_oldest_of_each_lane() -> None:
    model = compressive(layers=1, compressor="mean")
    seen: list[Tensor] = []
    model.embedding.register_forward_hook(lambda table, args, x: seen.append(x.detach()))
    state = after(model, make_segment([5, 3, 5, 5]), make_segment([5, 4, 0, 1], seed=1))
    embedded = [
        torch.cat((seen[0][lane, :a], seen[1][lane, :b]))
        for lane, (a, b) in enumerate([(5, 5), (3, 4), (5, 0), (5, 1)])
    ]
    for lane, blocks in enumerate([3, 2, 1, 1]):
        means = embedded[lane][: 2 * blocks].unflatten(0, (blocks, 2)).mean(1)
        torch.testing.assert_close(state.compressed[lane, 0, 3 - blocks :], means)
        rest = embedded[lane][2 * blocks :]
        torch.testing.assert_close(state.cache[lane, 0, 4 - len(rest) :], rest)
    assert state.compressed_filled.tolist() == [3, 2, 1, 1]
    assert state.filled.tolist() == [4, 3, 3, 4]


def test_compression_learns_from_attention_reconstruction_alone_and_nothing_else_does() -> None:
    model, state = compressive(), None
    losses = lost = torch.zeros(())
    for segment in full(3):
        output, state = model(segment, model.initial_state(2) if state is None else state)
        losses, lost = losses + output.token_losses.sum(), lost + output.auxiliary_loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    by_losses = torch.autograd.grad(losses, parameters, allow_unused=True, retain_graph=True)
    by_auxiliary = torch.autograd.grad(lost, parameters, allow_unused=True)
    assert lost > 0
    for name, loss_grad, lost_grad in zip(names, by_losses, by_auxiliary, strict=True):
        compresses = name.startswith("compressors")
        assert (loss_grad is None) == compresses
        assert (lost_grad is not None and bool(lost_grad.any())) == compresses


def lost_by_hand(model: CompressiveTransformer, xs: Tensor, rows: Tensor) -> list[Tensor]:
    """What each token of a lane loses by reading means of two of the old rows, in a single layer."""
    norm, attention, distances = model.blocks[0].self_norm, model.blocks[0].self_attention, []
    for x in xs:
        reads = []
        for source in (rows, rows.unflatten(0, (-1, 2)).mean(1)):
            query = attention.to_query(norm(x)).unflatten(0, (2, 4))
            key, value = attention.to_key_value(norm(source)).unflatten(1, (2, 2, 4)).unbind(1)
            weights = (torch.einsum("hk,shk->hs", query, key) / 2).softmax(-1)
            reads.append(torch.einsum("hs,shk->hk", weights, value))
        distances.append((reads[0] - reads[1]).square().mean().sqrt())
    return distances


def test_the_loss_of_reconstruction_is_the_mean_over_the_tokens_of_lanes_in_which_something_is_compressed() -> None:
    # one layer, so that what enters it are embeddings; and an untrained convolution, which is a mean
    model, seen = compressive(layers=1), []
    model.embedding.register_forward_hook(lambda table, args, x: seen.append(x.detach()))
    lost = auxiliaries(model, [make_segment([5, 3]), make_segment([4, 2])])
    first, second = seen
    torch.testing.assert_close(lost[0], torch.stack(lost_by_hand(model, first[0], first[0, :2])).mean())
    of_lanes = (second[0, :4], torch.cat((first[0, 2:], second[0, :1]))), (second[1, :2], first[1, :2])
    distances = [distance for xs, rows in of_lanes for distance in lost_by_hand(model, xs, rows)]
    torch.testing.assert_close(lost[1], torch.stack(distances).mean())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_other_lanes_hold_does_not_matter(pooling: str) -> None:
    model, segments = compressive(compressor=pooling, layers=1, memory_length=2, compressed_length=1), irregular(9)
    together = losses_of(model, segments)
    for lane in range(LANES):
        alone, lengths = [], [int(segment.token_mask[lane].sum()) for segment in segments]
        for segment, n in zip(segments, lengths, strict=True):
            tokens, token_mask, starts = (field[lane : lane + 1] for field in segment[:3])
            alone.append(Segment(tokens[:, : n or 1], token_mask[:, : n or 1], starts))
        for a, b, n in zip(losses_of(model, alone), together, lengths, strict=True):
            torch.testing.assert_close(a[0, :n], b[lane, :n], rtol=1e-10, atol=0)


def test_of_rows_that_are_all_alike_nothing_is_lost() -> None:
    row = torch.randn(1, 1, 8).double()
    model, x = compressive(), torch.randn(1, 3, 8).double()
    exists = torch.ones(1, 4, dtype=torch.bool)
    read = attend_by_content(model.blocks[0], x, row.expand(1, 4, 8), exists)
    torch.testing.assert_close(read, attend_by_content(model.blocks[0], x, row.expand(1, 2, 8), exists[:, :2]))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_token_still_matters_after_it_has_left_the_cache(pooling: str) -> None:
    # one layer and a cache of four: a Transformer-XL has forgotten the first segment in the third
    for model, knows in (
        (compressive(layers=1, compressor=pooling, compressed_length=6), True),
        (transformer_xl(layers=1, memory_length=4), False),
    ):
        segments = full(3)
        before = losses_of(model, segments)[2]
        segments[0].tokens[:] = (segments[0].tokens + 1) % VOCAB
        assert torch.equal(losses_of(model, segments)[2], before) is not knows


def test_pooling_without_weights_has_no_loss() -> None:
    assert all(lost == 0 for lost in auxiliaries(compressive(compressor="mean"), full(3)))
    assert all(lost > 0 for lost in auxiliaries(compressive(compressor="conv"), full(3)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"compressed_length": -1}, r"compressed_length must be at least 0, got -1"),
        ({"compression": 5}, "memory_length must be at least compression, got memory_length=4 and compression=5"),
        ({"compression": 0}, "compression must be at least 1, got 0"),
        ({"compression": -3, "compressed_length": 0}, "compression must be at least 1, got -3"),
        ({"compressor": "median", "compressed_length": 0}, "compressor must be one of .*, got 'median'"),
    ],
)
def test_a_bad_size_is_refused_with_its_name_and_value(no_type_checks: None, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compressive(**bad)
