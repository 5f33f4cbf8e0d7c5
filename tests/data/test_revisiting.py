"""Lanes that read documents again: how documents are weighed, and what a loader deals out."""

from itertools import chain, islice

import numpy as np
import pytest

from memformer_pl.data.lanes import LaneLoader, Rollout
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.data.revisiting import Revisit
from memformer_pl.data.weighted_buffer import WeightedBuffer
from memformer_pl.errors import UsageError

LENGTHS = (3, 9, 1, 6, 4, 8, 12, 2, 5, 7)
LANES, GROUPS, HORIZON, LENGTH = 4, 2, 2, 3


def weighed(*weights: float) -> WeightedBuffer:
    """Documents with these weights."""
    buffer = WeightedBuffer(size=10, priority="loss")
    for key, weight in enumerate(weights):
        buffer.write(key, float(weight))
    return buffer


def test_documents_are_drawn_as_often_as_they_weigh() -> None:
    drawn = weighed(1, 3, 0, 4).draw(100_000, np.random.default_rng(0))
    shares, expected = np.bincount(drawn, minlength=4) / 100_000, np.array([0.125, 0.375, 0, 0.5])
    error = np.sqrt(expected * (1 - expected) / 100_000)
    assert shares[2] == 0
    assert (np.abs(shares - expected) <= 3 * error).all()
    assert (error[[0, 1, 3]] > 0.001).all()


def test_where_nothing_weighs_anything_all_are_equally_likely() -> None:
    drawn = weighed(0, 0, 0, 0).draw(100_000, np.random.default_rng(0))
    assert np.abs(np.bincount(drawn) / 100_000 - 0.25).max() < 3 * np.sqrt(0.25 * 0.75 / 100_000)


def test_a_loss_of_nine_tenths_and_then_four_tenths_weighs_a_half() -> None:
    buffer = WeightedBuffer(size=3, priority="loss_difference")
    buffer.write(7, 0.9)
    assert buffer.weights == {7: 1.0}  # the largest so far: none is known
    buffer.visit(7, 0.4)
    assert buffer.weights == {7: pytest.approx(0.5)}
    buffer.visit(7, 2.4)
    assert buffer.weights == {7: pytest.approx(2.0)}
    buffer.write(8, 0.1)
    assert buffer.weights == {7: pytest.approx(2.0), 8: pytest.approx(2.0)}
    buffer.visit(8, 0.1)
    assert buffer.weights[8] == 0


@pytest.mark.parametrize(("priority", "expected"), [("loss", 0.4), ("uniform", 1.0)])
def test_the_other_rules_weigh_by_the_last_loss_and_not_at_all(priority: str, expected: float) -> None:
    buffer = WeightedBuffer(size=3, priority=priority)
    buffer.write(7, 0.9)
    buffer.visit(7, 0.4)
    assert buffer.weights == {7: expected}


def test_the_oldest_leaves_first_and_a_visit_does_not_make_it_younger() -> None:
    buffer = WeightedBuffer(size=2, priority="uniform")
    for key in (0, 1):
        buffer.write(key, 1.0)
    buffer.visit(0, 1.0)
    buffer.write(2, 1.0)
    assert list(buffer.weights) == [1, 2]
    buffer.visit(0, 1.0)  # it has left
    buffer.write(1, 1.0)  # finished once more
    assert list(buffer.weights) == [2, 1]


def documents() -> PackedDocuments:
    return PackedDocuments.from_arrays([np.full(length, number) for number, length in enumerate(LENGTHS)])


def loader(revisit: Revisit | None, *, rank: int = 0, ranks: int = 1) -> LaneLoader:
    sizes = {"batch_size": LANES, "segment_length": LENGTH, "horizon": HORIZON, "interleave": GROUPS}
    return LaneLoader(documents(), **sizes, seed=5, revisit=revisit, rank=rank, world_size=ranks)


HALF = Revisit(share=0.5, size=4, longest=12)


def losses_of(rollout: Rollout) -> np.ndarray:
    """Losses that depend on the document and on the group, for the lanes of one rank; every token is a target."""
    targets = np.stack([segment.token_mask.sum(1).numpy() for segment in rollout.segments]).astype(float)
    nats = targets * (1 + rollout.documents.numpy() * (1 + rollout.group))
    return np.stack((nats, targets), axis=1)


def read(given: LaneLoader, count: int) -> list[Rollout]:
    """The next rollouts, across epochs, whose losses are heard at once."""
    rollouts: list[Rollout] = []
    while len(rollouts) < count:
        for rollout in islice(given, count - len(rollouts)):
            given.hear(losses_of(rollout))
            rollouts.append(rollout)
    return rollouts


def same(a: Rollout, b: Rollout) -> bool:
    return all(
        bool((x == y).all())
        for x, y in zip(
            (a.documents, a.firsts, *a.segments[0][:2]), (b.documents, b.firsts, *b.segments[0][:2]), strict=True
        )
    )


def test_half_of_the_lanes_read_whole_documents_again_that_the_others_have_finished() -> None:
    rollouts = read(loader(HALF), 60)
    started, finished = [], {group: [[] for _ in range(LANES)] for group in range(GROUPS)}
    for rollout in rollouts:
        for segment, documents_B, firsts_B in zip(rollout.segments, rollout.documents, rollout.firsts, strict=True):
            for lane in range(LANES):
                number, first, count = int(documents_B[lane]), int(firsts_B[lane]), int(segment.token_mask[lane].sum())
                before = finished[rollout.group][lane]
                if number < 0:
                    assert lane in (1, 3)
                    assert not before
                    assert not count
                    continue
                assert bool(segment.document_start[lane]) == (first == 0)
                assert first == 0 or before[-1][:2] == (number, first)
                before.append((number, first + count, len(started)))
                if first == 0 and lane in (1, 3):
                    started.append(number)
    assert len(started) > 30
    assert len(set(started)) > 5


def test_what_is_drawn_was_finished_at_least_two_rollouts_before() -> None:
    done_by_rollout: list[set[int]] = []
    done: set[int] = set()
    for number, rollout in enumerate(read(loader(HALF), 12)):
        for documents_B, firsts_B in zip(rollout.documents, rollout.firsts, strict=True):
            for lane in (1, 3):
                if documents_B[lane] >= 0 and firsts_B[lane] == 0:
                    assert int(documents_B[lane]) in done_by_rollout[number - 2]
            for lane in (0, 2):
                index = int(documents_B[lane])
                if int(firsts_B[lane]) + LENGTH >= LENGTHS[index]:
                    done.add(index)
        done_by_rollout.append(set(done))


def test_lanes_that_do_not_revisit_read_every_document_once_in_an_epoch() -> None:
    given = loader(HALF)
    assert len(given) == -(-sum(-(-length // LENGTH) for length in LENGTHS) // (2 * HORIZON))
    tokens = np.zeros(len(LENGTHS), dtype=int)
    for rollout in read(given, 2 * len(given)):
        for segment, documents_B in zip(rollout.segments, rollout.documents, strict=True):
            for lane in (0, 2):
                tokens[int(documents_B[lane])] += int(segment.token_mask[lane].sum())
    assert (tokens >= LENGTHS).all()


def test_two_ranks_read_together_what_one_reads() -> None:
    one, two = loader(HALF), [loader(HALF, rank=rank, ranks=2) for rank in range(2)]
    iterators = [iter(given) for given in (one, *two)]
    for _ in range(len(one)):
        whole, *parts = map(next, iterators)
        assert all(
            (whole.documents[:, 2 * rank : 2 * rank + 2] == part.documents).all() for rank, part in enumerate(parts)
        )
        losses = np.concatenate([losses_of(part) for part in parts], axis=2)
        assert (losses == losses_of(whole)).all()
        for given in (one, *two):
            given.hear(losses)


@pytest.mark.parametrize("heard", ["at once", "a rollout late"])
@pytest.mark.parametrize("rollouts", [1, 2, 5, 6])
def test_a_loader_goes_on_where_another_was_however_late_the_losses_came(rollouts: int, heard: str) -> None:
    whole = read(loader(HALF), 15)
    first = loader(HALF)
    late = []
    for rollout in islice(first, rollouts):
        late.append(losses_of(rollout))
        if heard == "at once" or len(late) > 1:
            first.hear(late.pop(0))
    for losses in late:  # a checkpoint waits for them
        first.hear(losses)
    second = loader(HALF)
    second.load_state_dict(first.state_dict())
    assert second.revisits is not None
    assert first.revisits is not None
    second.revisits.load_state_dict(first.revisits.state_dict())
    assert all(map(same, read(second, 15 - rollouts), whole[rollouts:]))
    assert second.revisits.weights


def test_other_losses_lead_to_other_draws() -> None:
    """Else the tests above would show little."""
    by_loss = Revisit(share=0.5, size=4, priority="loss", longest=12)
    drawn = []
    for factor in (1.0, 0.0):
        given, found = loader(by_loss), []
        for rollout in chain(given, given):
            given.hear(losses_of(rollout) * [[factor], [1.0]])
            found += rollout.documents[:, 1::2].flatten().tolist()
        drawn.append(found)
    assert drawn[0] != drawn[1]


def test_a_visit_whose_loss_is_not_finite_does_not_count() -> None:
    given = loader(HALF)
    assert given.revisits is not None
    for rollout in islice(given, 4):
        losses = losses_of(rollout)
        losses[:, 0] = np.nan
        given.hear(losses)
    assert given.revisits.weights == {}


def test_losses_that_were_not_heard_are_asked_for() -> None:
    given = iter(loader(HALF))
    for _ in range(2):
        next(given)
    with pytest.raises(UsageError, match=r"rollout 2 cannot be drawn: .* call loader\.hear after each rollout"):
        next(given)
    asked = loader(HALF)
    for _ in range(2):
        next(iter(asked))
    for _ in range(2):  # not once only
        with pytest.raises(UsageError, match="cannot be drawn"):
            next(iter(asked))
    with pytest.raises(UsageError, match="call hear once for each"):
        loader(HALF).hear(np.zeros((HORIZON, 2, LANES)))


def test_a_run_that_was_killed_in_a_rollout_goes_on_without_its_losses() -> None:
    first, second = loader(HALF), loader(HALF)
    for number, rollout in enumerate(islice(first, 4)):
        if number < 3:
            first.hear(losses_of(rollout))
    assert first.revisits is not None
    second.load_state_dict(first.state_dict())
    assert second.revisits is not None
    second.revisits.load_state_dict(first.revisits.state_dict())
    assert len(read(second, 20)) == 20
    assert all(np.isfinite(weight) for weight in second.revisits.weights.values())


def test_a_share_of_nothing_is_a_loader_without_the_option() -> None:
    plain, none = loader(None), loader(Revisit(share=0.0))
    assert all(map(same, plain, none))
    assert none.state_dict() == plain.state_dict()
    assert none.revisits is None


def test_a_checkpoint_of_other_options_is_refused() -> None:
    for saved, current in ((None, HALF), (HALF, None), (HALF, Revisit(share=0.5, size=5, longest=12))):
        with pytest.raises(UsageError, match=r"data settings differ from the checkpoint: revisit \(was "):
            loader(current).load_state_dict(loader(saved).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.0}, "revisit.share must be at least 0 and below 1, got 1.0"),
        ({"share": -0.1}, "revisit.share must be at least 0 and below 1, got -0.1"),
        ({"size": 0}, "revisit.size must be at least 1, got 0"),
        ({"priority": "best"}, "priority must be one of loss_difference, loss, uniform, got 'best'"),
        ({"share": 0.3}, "revisit.share 0.3 of batch_size 4 is 1.2 lanes: choose a share that gives a whole number"),
        ({"share": 0.5, "size": 3}, "at least the number of lanes that revisit, 2 in each of 2 groups, got 3"),
        ({"longest": 11}, "a training document has 12 tokens, more than revisit.longest 11"),
    ],
)
def test_options_that_do_not_fit_are_refused(no_type_checks: None, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loader(Revisit(**{"longest": 12, **options}))


def test_lanes_revisit_in_training_only_and_repeat_nothing() -> None:
    sizes = {"batch_size": 2, "segment_length": LENGTH, "horizon": HORIZON}
    for reset in ("documents", "never"):
        with pytest.raises(UsageError, match="lanes can revisit documents only in training"):
            LaneLoader(documents(), **sizes, shuffle=False, reset=reset, revisit=HALF)
    with pytest.raises(UsageError, match="cannot repeat rollouts"):
        loader(HALF).limit(2, repeat=True)
