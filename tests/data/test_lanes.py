"""Every token is read once in a pass, in the order of its document, in one lane, on any number of ranks."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer_pl.contract import Segment
from memformer_pl.data import lane_plan
from memformer_pl.data.lane_plan import LanePlan
from memformer_pl.data.lanes import LaneLoader, Rollout
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.data.streaming import batch_segments
from memformer_pl.data.tokenizers.alignment import Aligned


class Geometry(NamedTuple):
    lengths: list[int]
    lanes: int
    world_size: int
    segment_length: int
    horizon: int
    seed: int
    shuffle: bool
    interleave: int = 1
    shortest_first: bool = False

    @property
    def documents(self) -> PackedDocuments:
        return numbered(self.lengths)

    def loader(self, rank: int = 0, world_size: int = 1) -> LaneLoader:
        return LaneLoader(
            self.documents,
            batch_size=self.lanes,
            segment_length=self.segment_length,
            horizon=self.horizon,
            interleave=self.interleave,
            seed=self.seed,
            shuffle=self.shuffle,
            shortest_first=self.shortest_first,
            rank=rank,
            world_size=world_size,
        )

    def ranks(self) -> list[LaneLoader]:
        return [self.loader(rank, self.world_size) for rank in range(self.world_size)]


def numbered(lengths: Iterable[int]) -> PackedDocuments:
    """Documents in which no token number occurs twice."""
    ends = np.cumsum([0, *lengths])
    return PackedDocuments.from_arrays([np.arange(start, end) for start, end in pairwise(ends)])


@st.composite
def geometries(draw: st.DrawFn, shuffle: bool | None = None) -> Geometry:
    world_size = draw(st.integers(1, 3))
    shuffles = draw(st.booleans()) if shuffle is None else shuffle
    return Geometry(
        lengths=draw(st.lists(st.integers(0, 30), max_size=12)),
        lanes=world_size * draw(st.integers(1, 4)),
        world_size=world_size,
        segment_length=draw(st.integers(1, 9)),
        horizon=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 3)),
        shuffle=shuffles,
        interleave=draw(st.integers(1, 3)) if shuffles else 1,
        shortest_first=draw(st.booleans()),
    )


def joined_segment(parts: Sequence[Segment]) -> Segment:
    tokens, token_mask, starts, loss_mask = (
        torch.cat(field) for field in zip(*(part[:4] for part in parts), strict=True)
    )
    return Segment(tokens, token_mask, starts, loss_mask, all(part.continues for part in parts))


def joined(ranks: Iterable[Rollout]) -> Rollout:
    """Join the lanes of all ranks to one rollout."""
    ranks = list(ranks)
    segments = zip(*(rollout.segments for rollout in ranks), strict=True)
    parts_joined = tuple(map(joined_segment, segments))
    (group,) = {rollout.group for rollout in ranks}
    documents, firsts = (
        torch.cat([getattr(rollout, name) for rollout in ranks], dim=1) for name in Rollout._fields[1:3]
    )
    return Rollout(parts_joined, documents, firsts, group)


def assert_equal(ours: list[Rollout], theirs: list[Rollout]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def documents_read(rollouts: list[Rollout], segment_length: int) -> list[tuple[int, list[int]]]:
    """Every document that some lane reads, with the tokens read of it, in the order in which they start; checks each
    segment.
    """
    read: list[tuple[tuple[int, int, int], int, list[int]]] = []
    times: dict[int, int] = defaultdict(int)
    current: dict[tuple[int, int], tuple[int, list[int]]] = {}
    for rollout in rollouts:
        for segment, documents in zip(rollout.segments, rollout.documents.tolist(), strict=True):
            for lane, document in enumerate(documents):
                mask = segment.token_mask[lane]
                assert torch.equal(mask, mask.sort(descending=True).values), "tokens stand at the left"
                assert bool(mask.any()) == (document >= 0)
                if segment.document_start[lane]:
                    current[rollout.group, lane] = document, []
                    read.append(((times[rollout.group], rollout.group, lane), *current[rollout.group, lane]))
                if document >= 0:
                    begun, tokens = current[rollout.group, lane]
                    assert document == begun, "a lane finishes a document before the next one"
                    assert len(tokens) % segment_length == 0, "only the last segment is ragged"
                    tokens += segment.tokens[lane][mask].tolist()
            times[rollout.group] += 1
    return [(document, tokens) for _, document, tokens in sorted(read, key=lambda entry: entry[0])]


@settings(deadline=None)
@given(geometries(shuffle=False))
def test_evaluation_reads_every_token_once_in_the_order_of_its_document(geometry: Geometry) -> None:
    rollouts = [joined(ranks) for ranks in zip(*geometry.ranks(), strict=True)]
    packed = geometry.documents
    expected = [(index, packed.document(index).tolist()) for index in range(len(packed)) if packed.lengths[index]]
    assert sorted(documents_read(rollouts, geometry.segment_length)) == expected


@settings(deadline=None)
@given(geometries(shuffle=True))
def test_training_reads_every_token_once_in_each_pass_and_leaves_no_lane_idle(geometry: Geometry) -> None:
    packed = geometry.documents
    filled = np.flatnonzero(packed.lengths).tolist()
    ranks = geometry.ranks()
    rollouts = [joined(each) for _ in range(3) for each in zip(*ranks, strict=True)]
    rollouts = rollouts[
        : len(rollouts) // geometry.interleave * geometry.interleave
    ]  # every group has read equally many rollouts
    assert all(bool((rollout.documents >= 0).all()) for rollout in rollouts)
    read = documents_read(rollouts, geometry.segment_length)
    for first in range(0, len(read), max(len(filled), 1)):
        of_pass = [document for document, _ in read[first : first + len(filled)]]
        assert len(set(of_pass)) == len(of_pass), "no document starts again before all have started"
    for document, tokens in read:
        assert tokens == packed.document(document).tolist()[: len(tokens)]
    complete = [document for document, tokens in read if len(tokens) == packed.lengths[document]]
    assert len(read) - len(complete) <= geometry.lanes * geometry.interleave, "only documents being read are incomplete"


@settings(deadline=None)
@given(geometries())
def test_every_rank_has_the_same_number_of_rollouts_and_len_agrees(geometry: Geometry) -> None:
    counts = {len(loader) for loader in geometry.ranks()} | {len(list(loader)) for loader in geometry.ranks()}
    assert len(counts) == 1


@settings(deadline=None)
@given(geometries())
def test_ranks_together_read_what_one_process_reads(geometry: Geometry) -> None:
    together = [joined(ranks) for ranks in zip(*geometry.ranks(), strict=True)]
    assert_equal(together, list(geometry.loader()))


@settings(deadline=None)
@given(geometries(shuffle=True), st.integers(0, 12))
def test_a_resumed_run_reads_the_remaining_rollouts_also_on_another_number_of_ranks(
    geometry: Geometry, rollouts: int
) -> None:
    uninterrupted, killed = geometry.loader(), geometry.loader()
    everything = [rollout for _ in range(2) for rollout in uninterrupted]
    done = list(islice(killed, rollouts))
    resumed = geometry.ranks()
    for loader in resumed:
        loader.load_state_dict(killed.state_dict())
    rest = []
    while len(done) + len(rest) < len(everything):
        rest += [joined(ranks) for ranks in zip(*resumed, strict=True)]
    assert_equal([*done, *rest][: len(everything)], everything)


def test_an_iteration_that_stopped_early_is_continued() -> None:
    geometry = Geometry([7] * 9, 2, 1, 2, 2, seed=0, shuffle=True)
    stopping, through = geometry.loader(), geometry.loader()
    assert_equal([*islice(stopping, 3), *stopping], list(through))
    assert stopping.state_dict() == through.state_dict()


def test_repeated_rollouts_are_the_first_ones_and_a_stopped_iteration_is_continued() -> None:
    geometry = Geometry([7, 3, 12, 5], 2, 1, 2, 2, seed=0, shuffle=True, interleave=2)
    first, loader = list(islice(geometry.loader(), 3)), geometry.loader()

    def same(rollouts: list[Rollout], expected: list[Rollout]) -> bool:
        return [r.documents.tolist() + r.firsts.tolist() for r in rollouts] == [
            r.documents.tolist() + r.firsts.tolist() for r in expected
        ]

    list(islice(loader, 2))
    loader.limit(3, repeat=True)
    assert same(list(loader), first[2:])  # it was stopped after two
    assert same(list(loader), first)
    assert same(list(islice(loader, 1)), first[:1])
    resumed = geometry.loader()
    resumed.load_state_dict(loader.state_dict())
    resumed.limit(3, repeat=True)
    assert same(list(resumed), first[1:])
    loader.limit(3, repeat=True, anew=True)
    assert same(list(loader), first)
    loader.limit(len(loader))
    assert same(list(islice(loader, 1)), list(islice(geometry.loader(), 3, 4)))


def test_limited_iterations_have_as_many_rollouts_each_and_go_on_where_the_last_one_stopped() -> None:
    geometry = Geometry([7, 3, 12, 5], 2, 1, 2, 2, seed=0, shuffle=True, interleave=2)
    loader, whole = geometry.loader(), geometry.loader()
    limit = len(whole) - 1  # does not divide an epoch
    loader.limit(limit)
    read = [list(loader) for _ in range(3)]
    assert [len(rollouts) for rollouts in read] == [limit] * 3
    expected = [rollout for _ in range(3) for rollout in whole]
    for rollout, other in zip((rollout for rollouts in read for rollout in rollouts), expected, strict=False):
        assert torch.equal(rollout.documents, other.documents)
        assert torch.equal(rollout.firsts, other.firsts)


def test_a_plan_without_end_drops_the_documents_that_have_ended() -> None:
    """The plan holds only the documents being read, and those dealt out in advance: fewer than two passes."""
    random = np.random.default_rng(0)
    lengths, lanes = random.integers(1, 60, size=40), 6
    plan = LanePlan(lengths, lanes=lanes, segment_length=5, seed=0)
    for time in range(0, 20_000, 4):
        plan.place(range(time, time + 4), range(lanes))
        assert len(plan._begins) <= lanes + 2 * len(lengths)
    assert plan.passes > 300


@pytest.mark.parametrize("shortest_first", [False, True])
def test_the_plan_does_not_depend_on_how_many_documents_are_dealt_out_at_once(
    monkeypatch: pytest.MonkeyPatch, shortest_first: bool
) -> None:
    lengths = np.random.default_rng(0).integers(0, 60, size=500)
    found = []
    for at_once in (1, 7, 10_000):
        monkeypatch.setattr(lane_plan, "DEALT_AT_ONCE", at_once)
        plan = LanePlan(lengths, lanes=6, segment_length=5, seed=0, shortest_first=shortest_first)
        found.append([plan.place(range(time, time + 4), range(6)) for time in range(0, 3000, 4)])
        assert plan.passes > 2
        assert len(plan._begins) <= 6 * 12 + at_once
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


def test_without_shuffling_every_iteration_begins_at_the_first_rollout() -> None:
    loader = Geometry([7] * 9, 2, 1, 2, 2, seed=0, shuffle=False).loader()
    stopped = list(islice(loader, 3))
    assert_equal(stopped, list(loader)[:3])


def test_passes_and_seeds_have_different_orders_and_every_epoch_has_equally_many_rollouts() -> None:
    geometry = Geometry([*range(1, 40)], 4, 1, 3, 2, seed=0, shuffle=True)
    loader = geometry.loader()
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == len(loader)
    orders = [first, second, list(geometry._replace(seed=1).loader())]
    assert len({str([rollout.documents.tolist() for rollout in order]) for order in orders}) == 3


def test_only_the_first_pass_goes_from_the_shortest_documents_to_the_longest() -> None:
    # one lane and rollouts of one segment, so the rollouts have the order of the documents
    lengths = [9, 1, 4, 7, 2, 3, 8]
    loader = Geometry(lengths, 1, 1, 3, 1, seed=0, shuffle=True, shortest_first=True).loader()
    segments = [-(-lengths[int(rollout.documents)] // 3) for _ in range(3) for rollout in loader]
    assert segments[:14] == [1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    assert segments[14:28] != segments[:14] != segments[28:]
    assert sorted(segments[14:28]) == sorted(segments[:14])


def test_lanes_end_at_nearly_the_same_time_in_evaluation() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, size=300)
    plan = LanePlan(lengths, lanes=8, segment_length=10, seed=None)
    assert plan.total == np.ceil(lengths / 10).sum()
    assert plan.longest - plan.total / 8 <= 1


def test_a_document_longer_than_a_lanes_share_leaves_no_other_lane_idle_in_training() -> None:
    geometry = Geometry([400, *[10] * 20], 4, 1, 5, 2, seed=0, shuffle=True)
    assert all(bool((rollout.documents >= 0).all()) for rollout in geometry.loader())


def test_groups_of_lanes_take_turns_and_each_continues_where_it_was() -> None:
    geometry = Geometry([40] * 6, 2, 1, 4, 2, seed=0, shuffle=True, interleave=3)
    loader = geometry.loader()
    rollouts = list(islice(loader, 6))
    assert [rollout.group for rollout in rollouts] == [0, 1, 2, 0, 1, 2]
    assert len({int(document) for rollout in rollouts[:3] for document in rollout.documents[0]}) == 6
    for before, after in zip(rollouts[:3], rollouts[3:], strict=True):
        assert torch.equal(before.documents, after.documents)
        assert torch.equal(before.segments[-1].tokens[:, -1] + 1, after.segments[0].tokens[:, 0])


def test_lanes_cannot_take_turns_without_shuffling() -> None:
    with pytest.raises(ValueError, match="interleave=2 needs shuffle=True"):
        Geometry([7] * 9, 2, 1, 2, 2, seed=0, shuffle=False, interleave=2).loader()


def test_segments_by_hand() -> None:
    loader = Geometry([0, 5, 2], 2, 1, 3, 3, seed=0, shuffle=False).loader()
    (rollout,) = loader
    assert rollout.documents.tolist() == [[1, 2], [1, -1], [-1, -1]]
    assert [segment.tokens.tolist() for segment in rollout.segments] == [
        [[0, 1, 2], [5, 6, 0]],
        [[3, 4, 0], [0, 0, 0]],
        [[0, 0, 0], [0, 0, 0]],
    ]
    assert [segment.token_mask.sum(1).tolist() for segment in rollout.segments] == [[3, 2], [2, 0], [0, 0]]
    assert [segment.document_start.tolist() for segment in rollout.segments] == [
        [True, True],
        [False, False],
        [False, False],
    ]
    assert rollout.segments[0].tokens.dtype == torch.int64


@settings(deadline=None)
@given(geometries())
def test_a_segment_continues_where_every_lane_reads_on_in_a_document_after_a_full_segment(geometry: Geometry) -> None:
    last: dict[tuple[int, int], tuple[int, int]] = {}
    for rollout in islice(geometry.loader(), 40):
        for segment, documents in zip(rollout.segments, rollout.documents.tolist(), strict=True):
            lengths, continues = segment.token_mask.sum(1).tolist(), []
            for lane, (document, length) in enumerate(zip(documents, lengths, strict=True)):
                before, key = last.get((rollout.group, lane), (-1, 0)), (rollout.group, lane)
                starts = bool(segment.document_start[lane])
                continues.append(bool(length) and not starts and before == (document, geometry.segment_length))
                last[key] = document, length
            assert segment.continues is all(continues)


def test_a_stream_continues_where_every_lane_reads_on_in_a_document() -> None:
    def tokens(count: int) -> list[Aligned]:
        return [Aligned(np.arange(count), np.ones(count, dtype=np.int64), bytes(count))]

    documents = [("a", tokens(11)), ("b", tokens(9)), ("c", tokens(2)), ("d", tokens(17))]
    batches = list(batch_segments(documents, lanes=2, segment_length=4))
    assert [batch.segment.continues for batch in batches] == [all(first > 0 for first in b.firsts) for b in batches]
    assert {batch.segment.continues for batch in batches} == {True, False}


def test_a_rollout_moves_with_all_its_fields_and_stays_where_it_is_there() -> None:
    rollout = next(iter(Geometry([13, 9, 4], 2, 1, 4, 3, 0, True).loader()))
    assert rollout.to(torch.device("cpu")) is rollout
    moved = rollout.to(torch.device("meta"))
    tensors = [moved.documents, moved.firsts, *(field for segment in moved.segments for field in segment[:4])]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    shapes = [[tuple(field.shape) for field in segment[:4]] for segment in rollout.segments]
    assert [[tuple(field.shape) for field in segment[:4]] for segment in moved.segments] == shapes


def test_a_function_gets_every_field_of_a_rollout_once() -> None:
    rollout = next(iter(Geometry([13, 9, 4], 2, 1, 4, 3, 0, True).loader()))
    seeded = rollout._replace(segments=tuple(s._replace(seeds=torch.tensor([7])) for s in rollout.segments))
    without = rollout._replace(segments=tuple(s._replace(loss_mask=None) for s in rollout.segments))
    for before, fields in ((rollout, 4), (seeded, 5), (without, 3)):
        seen: list[torch.Tensor] = []
        copy = before.map(lambda tensor, seen=seen: seen.append(tensor) or tensor.clone())
        assert len(seen) == fields + 2
        torch.testing.assert_close(copy, before, rtol=0, atol=0)
        assert type(copy.segments[0]) is Segment


def test_a_split_without_documents_has_no_rollouts() -> None:
    loader = Geometry([], 2, 1, 3, 3, seed=0, shuffle=True).loader()
    assert len(loader) == 0
    assert list(loader) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("batch_size", {"lanes": 4}),
        ("segment_length", {"segment_length": 5}),
        ("horizon", {"horizon": 3}),
        ("interleave", {"interleave": 2}),
        ("seed", {"seed": 1}),
        ("shortest_first", {"shortest_first": True}),
        ("corpus", {"lengths": [7, 8, 10]}),
    ],
)
def test_resuming_with_another_geometry_or_corpus_says_which_value_differs(
    name: str, change: dict[str, object]
) -> None:
    geometry = Geometry([7, 8, 9], 2, 1, 4, 2, seed=0, shuffle=True)
    other = geometry._replace(**change)
    ours, theirs = geometry.loader().state_dict()[name], other.loader().state_dict()[name]
    with pytest.raises(ValueError, match="cannot resume") as error:
        other.loader().load_state_dict(geometry.loader().state_dict())
    assert f"{name} (was {ours!r}, is {theirs!r})" in str(error.value)
    assert str(error.value).count("(was ") == 1


def test_a_batch_size_that_is_not_a_multiple_of_the_number_of_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="got batch_size=4 and world_size=3"):
        LaneLoader(numbered([5]), batch_size=4, segment_length=2, horizon=1, world_size=3)


@pytest.mark.parametrize("name", ["batch_size", "segment_length", "horizon", "interleave"])
def test_sizes_below_one_are_refused(name: str) -> None:
    sizes = {"batch_size": 1, "segment_length": 1, "horizon": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        LaneLoader(numbered([5]), **sizes)


def unreset(lengths: list[int], *, lanes: int, world_size: int = 1, rank: int = 0) -> LaneLoader:
    """A loader with three tokens per segment that never resets."""
    return LaneLoader(
        numbered(lengths),
        batch_size=lanes,
        segment_length=3,
        horizon=2,
        shuffle=False,
        reset="never",
        rank=rank,
        world_size=world_size,
    )


def test_without_resets_a_lane_reads_the_split_in_order_and_starts_once() -> None:
    rollouts = list(unreset([4, 0, 1, 7, 3], lanes=1))
    documents = torch.cat([rollout.documents for rollout in rollouts])[:, 0].tolist()
    assert documents == [0, 0, 2, 3, 3, 3, 4, -1]
    starts = [bool(segment.document_start) for rollout in rollouts for segment in rollout.segments]
    assert starts == [True, *[False] * 7]
    tokens = [segment.tokens[segment.token_mask].tolist() for rollout in rollouts for segment in rollout.segments]
    assert tokens == [[0, 1, 2], [3], [4], [5, 6, 7], [8, 9, 10], [11], [12, 13, 14], []]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 30), max_size=12), lanes=st.integers(1, 4))
def test_without_resets_each_lane_has_a_stretch_of_the_split(lengths: list[int], lanes: int) -> None:
    tokens: list[list[int]] = [[] for _ in range(lanes)]
    starts = [0] * lanes
    for rollout in unreset(lengths, lanes=lanes):
        for segment in rollout.segments:
            for lane in range(lanes):
                tokens[lane] += segment.tokens[lane][segment.token_mask[lane]].tolist()
                starts[lane] += bool(segment.document_start[lane])
    assert [token for lane in tokens for token in lane] == list(range(sum(lengths)))
    assert starts == [int(bool(lane)) for lane in tokens]
    counts = [-(-length // 3) for length in lengths]
    even = sum(counts) / lanes
    assert all(len(lane) <= 3 * (even + max(counts, default=0) + 1) for lane in tokens)


def test_without_resets_a_rank_reads_its_lanes() -> None:
    lengths = [5, 9, 2, 14, 1]
    (whole, *ranks) = [unreset(lengths, lanes=4), *(unreset(lengths, lanes=4, world_size=2, rank=r) for r in range(2))]
    for both, first, second in zip(whole, *ranks, strict=True):
        for segment, a, b in zip(both.segments, first.segments, second.segments, strict=True):
            torch.testing.assert_close(joined_segment([a, b]), segment, rtol=0, atol=0)


def test_training_cannot_skip_resets() -> None:
    with pytest.raises(ValueError, match="reset must be 'documents', or 'never' with shuffle=False"):
        LaneLoader(numbered([5]), batch_size=1, segment_length=2, horizon=1, reset="never")
