"""Deal documents out to lanes, and cut the lanes into segments and rollouts.

    T  segments of a rollout (the horizon)     B  lanes     L  tokens of a segment

In training, lanes never end: one pass through the corpus follows another. Groups of lanes can take turns, so that
consecutive rollouts read different documents. Otherwise the weights learn the few documents that every rollout
continues, and memory has nothing left to do (``README.md``).

Which document a lane reads, and when, depends only on the lengths of the documents, the number of lanes, the segment
length and the seed. A rank reads its slice of the lanes of every group, so every rank has the same number of rollouts,
and a run can be resumed on another number of ranks.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from memformer_pl.contract import Segment
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.errors import LARGEST, UsageError, require_sizes

LANE_STRIDE = 1 << 40
"""Upper bound on the segments of one lane."""
LARGEST_ROLLOUT = 1 << 28
"""Most tokens of a rollout: at 8 bytes each, 2 GiB."""


class Rollout(NamedTuple):
    """The segments that are read between two optimizer steps."""

    segments: tuple[Segment, ...]
    """One for each step of the horizon. In evaluation the last ones may have no tokens in any lane."""
    documents: Int[Tensor, "T B"]
    """Index in its split of the document that each lane reads in each segment; -1 for none."""
    firsts: Int[Tensor, "T B"]
    """Position in its document of the first token of each segment."""
    group: int
    """Which group of lanes this is; each group carries its own state."""

    def to(self, device: torch.device) -> "Rollout":
        """The rollout on a device, by one copy for each field. Lightning calls this.

        A GPU reads from pinned memory, so that the host need not wait for the copies.
        """
        if self.documents.device == device:
            return self
        pin = device.type == "cuda" and self.documents.is_cpu
        return self.map(lambda tensor: (tensor.pin_memory() if pin else tensor).to(device, non_blocking=pin))

    def with_seeds(self) -> "Rollout":
        """The rollout with a seed for each segment, from the default stream of its device."""
        seeds = torch.randint(2**62, (len(self.segments), 1), device=self.documents.device).unbind()
        pairs = zip(self.segments, seeds, strict=True)
        return self._replace(segments=tuple(segment._replace(seeds=seed) for segment, seed in pairs))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Rollout":
        """Apply a function to every field; it gets the field of all segments as one tensor, segments first."""
        segments: list[Any] = list(self.segments)
        for name in Segment._fields:
            fields = [getattr(segment, name) for segment in segments]
            if all(isinstance(field, Tensor) for field in fields):
                parts = function(torch.stack(fields)).unbind()
                segments = [segment._replace(**{name: part}) for segment, part in zip(segments, parts, strict=True)]
        return Rollout(tuple(segments), function(self.documents), function(self.firsts), self.group)


class Placement(NamedTuple):
    """Where in the corpus the segments of a rollout lie."""

    documents: Int64[np.ndarray, "T B"]
    """-1 where a lane has ended."""
    firsts: Int64[np.ndarray, "T B"]
    """Position in its document of the first token of each segment."""
    lengths: Int64[np.ndarray, "T B"]
    """Tokens of each segment; 0 where a lane has ended."""


class LanePlan:
    """Which document every lane reads in which segment: the next document goes to the lane that is free first.

    Args:
        lengths: Tokens of each document. Empty documents are skipped.
        lanes: Number of lanes over all groups and ranks.
        segment_length: Tokens of a segment; the last segment of a document may be shorter.
        seed: Seed of the shuffled passes through the corpus, which never end. None for a single pass, longest document
            first, so that the lanes end at nearly the same time.
        shortest_first: Whether the first of the shuffled passes goes from the shortest documents to the longest.
        in_order: Whether each lane of a single pass reads a contiguous stretch of the corpus in order; the stretches
            have nearly the same length.
    """

    def __init__(
        self,
        lengths: Int64[np.ndarray, " documents"],
        *,
        lanes: int,
        segment_length: int,
        seed: int | None,
        shortest_first: bool = False,
        in_order: bool = False,
    ) -> None:
        self.lengths = lengths
        self.segment_length = segment_length
        self.seed = seed
        self.shortest_first = shortest_first
        self.passes = 0
        self._counts = -(-lengths // segment_length)
        self._free = [(0, lane) for lane in range(lanes)]
        # All lanes lie on one number line, LANE_STRIDE apart: a binary search finds the documents of a rollout.
        self._begins, self._documents = np.empty((2, 0), dtype=np.int64)
        if in_order:
            self._deal_stretches(lanes)
        elif seed is None:
            self._deal(np.argsort(-self._counts, kind="stable"), needed_from=0)

    @property
    def total(self) -> int:
        """Segments of all documents."""
        return int(self._counts.sum())

    @property
    def longest(self) -> int:
        """Segments of the longest lane, counting the documents that have been dealt out."""
        return max(end for end, _ in self._free)

    def place(self, times: range, lanes: range) -> Placement:
        """Return what those lanes read in those segments. ``times`` must not go back."""
        while self.seed is not None and self._free[0][0] < times.stop:
            order = np.random.default_rng((self.seed, self.passes)).permutation(self.lengths.size)
            if self.shortest_first and self.passes == 0:
                order = order[np.argsort(self._counts[order], kind="stable")]
            self._deal(order, needed_from=times.start)
        lane_B = np.array(lanes) * LANE_STRIDE
        key_TB = np.array(times)[:, None] + lane_B
        index_TB = np.searchsorted(self._begins, key_TB, side="right") - 1
        document_TB, since_TB = self._documents[index_TB], key_TB - self._begins[index_TB]
        reads_TB = (index_TB >= 0) & (since_TB < self._counts[document_TB])
        first_TB = since_TB * self.segment_length
        length_TB = np.minimum(self.lengths[document_TB] - first_TB, self.segment_length)
        return Placement(
            np.where(reads_TB, document_TB, -1), np.where(reads_TB, first_TB, 0), np.where(reads_TB, length_TB, 0)
        )

    def _deal(self, documents: Int64[np.ndarray, " _"], *, needed_from: int) -> None:
        """Deal out a pass through the corpus, and drop documents that end before ``needed_from``."""
        documents = documents[self._counts[documents] > 0]
        begins = np.empty_like(documents)
        for index, count in enumerate(self._counts[documents].tolist()):
            free, lane = self._free[0]
            begins[index] = lane * LANE_STRIDE + free
            heapq.heapreplace(self._free, (free + count, lane))
        needed = self._begins % LANE_STRIDE + self._counts[self._documents] > needed_from
        begins = np.concatenate((self._begins[needed], begins))
        order = np.argsort(begins)
        self._begins, self._documents = begins[order], np.concatenate((self._documents[needed], documents))[order]
        self.passes += 1

    def _deal_stretches(self, lanes: int) -> None:
        """Deal out the corpus in order: a document goes to the lane in whose share of all segments it begins."""
        documents = np.flatnonzero(self._counts > 0)
        counts = self._counts[documents]
        begins = np.cumsum(counts) - counts
        lane_of = begins * lanes // max(self.total, 1)
        first_of = np.searchsorted(lane_of, np.arange(lanes))
        starts = np.append(begins, self.total)[first_of]
        self._begins, self._documents = lane_of * LANE_STRIDE + begins - starts[lane_of], documents
        self._free = list(zip(np.diff(np.append(starts, self.total)).tolist(), range(lanes), strict=True))


class LaneLoader:
    """Yields the rollouts of one rank.

    With ``shuffle`` the loader never ends. An epoch is as many rollouts as one pass through the corpus takes, and the
    next epoch continues in the middle of documents. The position is part of :meth:`state_dict`: the loader continues
    where the last iteration stopped, whether at the end of an epoch, at ``limit_train_batches`` or in a run that was
    killed. Without ``shuffle`` every iteration is the same single pass.

    With ``reset="never"`` each lane reads a contiguous stretch of the split, document after document in order, and only
    its first segment starts from the initial state: with one lane, the whole split is one stream. Segments still end
    where documents end.

    Args:
        documents: A split.
        batch_size: Lanes of a rollout over all ranks; a multiple of ``world_size``.
        segment_length: Tokens of a segment.
        horizon: Segments of a rollout.
        interleave: Groups of ``batch_size`` lanes that take turns, one rollout each. Above 1 it needs ``shuffle``.
        seed: Seed of the shuffle.
        shuffle: Whether every pass has a new order: True to train, False to evaluate.
        shortest_first: Whether the first pass goes from the shortest documents to the longest, shuffling documents with
            equally many segments. Ignored without ``shuffle``.
        reset: When a lane begins from the initial state: at the start of every document, or never except at its very
            first segment. ``"never"`` needs ``shuffle=False``.
        rank: Index of the slice of lanes to read.
        world_size: Number of slices.

    Raises:
        UsageError: A size is out of range, or two options exclude each other.
    """

    def __init__(
        self,
        documents: PackedDocuments,
        *,
        batch_size: int,
        segment_length: int,
        horizon: int,
        interleave: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        shortest_first: bool = False,
        reset: Literal["documents", "never"] = "documents",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        require_rollout_size(
            batch_size=batch_size, interleave=interleave, horizon=horizon, segment_length=segment_length
        )
        if interleave > 1 and not shuffle:
            raise UsageError(f"lanes can take turns only in training: {interleave=} needs shuffle=True")
        if reset not in ("documents", "never") or (reset == "never" and shuffle):
            raise UsageError(f"reset must be 'documents', or 'never' with shuffle=False, got {reset=} and {shuffle=}")
        if batch_size % world_size:
            raise UsageError(
                f"batch_size must be a multiple of the number of processes, got {batch_size=} and {world_size=}"
            )
        self.documents = documents
        self.batch_size, self.interleave, self.world_size = batch_size, interleave, world_size
        self.segment_length, self.horizon = segment_length, horizon
        self.seed, self.shuffle, self.shortest_first = seed, shuffle, shortest_first
        self.reset = reset
        self._repeated: int | None = None
        lanes = batch_size // world_size
        self._lanes = range(rank * lanes, (rank + 1) * lanes)
        self.rollouts_done = 0
        self._plan = self._begin_plan()

    def __len__(self) -> int:
        """Rollouts of an epoch, the same on every rank."""
        if self.shuffle:
            return -(-self._plan.total // (self.batch_size * self.horizon))
        return -(-self._plan.longest // self.horizon)

    def __iter__(self) -> Iterator[Rollout]:
        """Yield the rollouts that are left of this epoch, or those of the next epoch if none are left."""
        if not self.shuffle or (self._repeated is not None and self.rollouts_done >= self._repeated):
            self._rewind()
        end = self._repeated or ((self.rollouts_done // len(self) + 1) * len(self) if len(self) else 0)
        while self.rollouts_done < end:
            self.rollouts_done += 1  # before the yield: a checkpoint written during this step must count the rollout
            yield self._build(self.rollouts_done - 1)

    def repeat(self, rollouts: int | None, *, anew: bool = False) -> None:
        """Read the same first ``rollouts`` in every iteration; None turns this off.

        An iteration that stopped part of the way is continued, unless ``anew`` is true.
        """
        self._repeated = rollouts
        if anew and rollouts is not None:
            self._rewind()

    def state_dict(self) -> dict[str, int | str]:
        """The number of rollouts that were yielded, and the geometry that gives this number a meaning."""
        return {**self._geometry(), "rollout": self.rollouts_done}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Continue from where a loader with the same geometry was, on any number of ranks.

        Raises:
            UsageError: The geometry differs; names each value that does.
        """
        changed = {name: value for name, value in self._geometry().items() if state.get(name) != value}
        differing = [f"{name} (was {state.get(name)!r}, is {value!r})" for name, value in changed.items()]
        if differing:
            raise UsageError(f"cannot resume: data settings differ from the checkpoint: {', '.join(differing)}")
        self._rewind()
        self.rollouts_done = int(state["rollout"])

    def _rewind(self) -> None:
        self.rollouts_done = 0
        if self.shuffle:  # a plan cannot go back
            self._plan = self._begin_plan()

    def _geometry(self) -> dict[str, int | str]:
        return {
            "batch_size": self.batch_size,
            "segment_length": self.segment_length,
            "horizon": self.horizon,
            "interleave": self.interleave,
            "seed": self.seed,
            "shortest_first": self.shortest_first,
            "corpus": self.documents.fingerprint,
        }

    def _begin_plan(self) -> LanePlan:
        lanes, seed = self.batch_size * self.interleave, self.seed if self.shuffle else None
        return LanePlan(
            self.documents.lengths,
            lanes=lanes,
            segment_length=self.segment_length,
            seed=seed,
            shortest_first=self.shortest_first,
            in_order=self.reset == "never",
        )

    def _build(self, rollout: int) -> Rollout:
        turn, group = divmod(rollout, self.interleave)
        times = range(turn * self.horizon, (turn + 1) * self.horizon)
        first = group * self.batch_size
        placed = self._plan.place(times, range(first + self._lanes.start, first + self._lanes.stop))
        within_L = np.arange(self.segment_length)
        token_mask_TBL = within_L < placed.lengths[:, :, None]
        begin_TB = self.documents.offsets[placed.documents] + placed.firsts
        index_TBL = np.where(token_mask_TBL, begin_TB[:, :, None] + within_L, 0)
        token_TBL = np.where(token_mask_TBL, self.documents.tokens[index_TBL], 0).astype(np.int64)
        start_TB = (placed.documents >= 0) & (placed.firsts == 0)
        if self.reset == "never":
            start_TB &= np.array(times)[:, None] == 0
        loss_mask_TBL = token_mask_TBL & (
            placed.firsts[:, :, None] + within_L >= self.documents.prompt_lengths[placed.documents][:, :, None]
        )
        if self.documents.answers.size:
            everything_TB = ~self.documents.has_answers[placed.documents]
            loss_mask_TBL &= everything_TB[:, :, None] | self.documents.are_answers(index_TBL)
        stacked = (torch.from_numpy(array) for array in (token_TBL, token_mask_TBL, start_TB, loss_mask_TBL))
        # only the last segment of a document may be short: where one precedes in the document, it is full
        continues = [bool(row.all()) for row in placed.firsts > 0]
        segments = tuple(map(Segment, *stacked, continues))
        return Rollout(segments, torch.from_numpy(placed.documents), torch.from_numpy(placed.firsts), group)


def require_rollout_size(*, batch_size: int, interleave: int, horizon: int, segment_length: int) -> None:
    """Raise a ``UsageError`` if a size of a rollout is out of range, or if the sizes are too large together."""
    require_sizes(batch_size=batch_size, segment_length=segment_length, horizon=horizon, interleave=interleave)
    require_sizes(most=LARGEST, **{"batch_size * interleave": batch_size * interleave})
    tokens = batch_size * horizon * segment_length
    require_sizes(most=LARGEST_ROLLOUT, **{"batch_size * horizon * segment_length": tokens})


def require_lane_loader(loader: object) -> LaneLoader:
    """Return the loader if it is a :class:`LaneLoader`, which knows the document that each lane reads.

    Raises:
        TypeError: The loader is of another class.
    """
    if not isinstance(loader, LaneLoader):
        raise TypeError(f"expected a LaneLoader, as SegmentData makes it, got a {type(loader).__name__}")
    return loader
