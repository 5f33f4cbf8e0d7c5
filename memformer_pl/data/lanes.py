"""Documents are dealt out to lanes; lanes are cut into segments, and segments gathered into rollouts.

    T  segments of a rollout (the horizon)     B  lanes     L  tokens of a segment

In training lanes run on without end, from one pass through the corpus into the next. Groups of lanes can take turns,
so that one rollout has other documents than the next: a model whose every rollout goes on with the same few documents
learns them by its weights, and memory is left nothing to do (``experiments/README.md``).

What a lane reads, and when, is a pure function of the lengths of the documents, the number of lanes, the segment
length and the seed. A rank takes its slice of the lanes of every group: so every rank has the same number of rollouts,
and a run may be gone on with on another number of ranks.
"""

import heapq
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from memformer_pl.contract import Segment
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.errors import LARGEST, UsageError, require_sizes

LINE = 1 << 40
"""Segments that a lane may have."""
LARGEST_ROLLOUT = 1 << 28
"""Tokens of a rollout: at 8 bytes each they take 2 GiB."""


class Rollout(NamedTuple):
    """What is read between two optimizer steps."""

    segments: tuple[Segment, ...]
    """As many as the horizon. In evaluation the last ones may have no tokens in any lane."""
    documents: Int[Tensor, "T B"]
    """Which document of its split each lane reads in each segment; -1 for none."""
    firsts: Int[Tensor, "T B"]
    """The first token of each segment, counted from the start of its document."""
    group: int
    """Which lanes these are: a state is carried for each group of lanes by itself."""


class Placement(NamedTuple):
    """Where the segments of a rollout lie."""

    documents: Int64[np.ndarray, "T B"]
    """-1 where a lane has run out."""
    firsts: Int64[np.ndarray, "T B"]
    """The first token of each segment, counted from the start of its document."""
    lengths: Int64[np.ndarray, "T B"]
    """Tokens of each segment; 0 where a lane has run out."""


class LanePlan:
    """Which document every lane reads in which segment: the next document goes to the lane that is free first.

    Args:
        lengths: Tokens of each document; those without any are in no lane.
        lanes: Over all groups and ranks.
        segment_length: Tokens of a segment. The last one of a document is ragged.
        seed: Shuffles every pass through the corpus by itself; the passes have no end. None for one pass, longest
            document first, so that lanes end at nearly the same time.
        shortest_first: Whether the first pass of a shuffled plan goes from the shortest documents to the longest.
        in_order: Of a single pass, each lane reads a stretch of the corpus, all of nearly the same length, in order.
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
        # All lanes lie on one line, each document where it begins: one search finds the places of a rollout.
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
        """Segments of the longest lane, as far as documents are dealt out."""
        return max(end for end, _ in self._free)

    def place(self, times: range, lanes: range) -> Placement:
        """Where those lanes read in those segments. ``times`` must not go back."""
        while self.seed is not None and self._free[0][0] < times.stop:
            order = np.random.default_rng((self.seed, self.passes)).permutation(self.lengths.size)
            if self.shortest_first and self.passes == 0:
                order = order[np.argsort(self._counts[order], kind="stable")]
            self._deal(order, needed_from=times.start)
        lane_B = np.array(lanes) * LINE
        line_TB = np.array(times)[:, None] + lane_B
        place_TB = np.searchsorted(self._begins, line_TB, side="right") - 1
        document_TB, since_TB = self._documents[place_TB], line_TB - self._begins[place_TB]
        reads_TB = (place_TB >= 0) & (since_TB < self._counts[document_TB])
        first_TB = since_TB * self.segment_length
        length_TB = np.minimum(self.lengths[document_TB] - first_TB, self.segment_length)
        return Placement(
            np.where(reads_TB, document_TB, -1), np.where(reads_TB, first_TB, 0), np.where(reads_TB, length_TB, 0)
        )

    def _deal(self, documents: Int64[np.ndarray, " _"], *, needed_from: int) -> None:
        """Deal out a pass through the corpus, and forget documents that end before ``needed_from``."""
        documents = documents[self._counts[documents] > 0]
        begins = np.empty_like(documents)
        for place, count in enumerate(self._counts[documents].tolist()):
            free, lane = self._free[0]
            begins[place] = lane * LINE + free
            heapq.heapreplace(self._free, (free + count, lane))
        needed = self._begins % LINE + self._counts[self._documents] > needed_from
        begins = np.concatenate((self._begins[needed], begins))
        order = np.argsort(begins)
        self._begins, self._documents = begins[order], np.concatenate((self._documents[needed], documents))[order]
        self.passes += 1

    def _deal_stretches(self, lanes: int) -> None:
        """Deal out the corpus in order: a document is in the lane in whose share of all segments it begins."""
        documents = np.flatnonzero(self._counts > 0)
        counts = self._counts[documents]
        begins = np.cumsum(counts) - counts
        lane_of = begins * lanes // max(self.total, 1)
        first_of = np.searchsorted(lane_of, np.arange(lanes))
        starts = np.append(begins, self.total)[first_of]
        self._begins, self._documents = lane_of * LINE + begins - starts[lane_of], documents
        self._free = list(zip(np.diff(np.append(starts, self.total)).tolist(), range(lanes), strict=True))


class LaneLoader:
    """Windows of one rank.

    Shuffling, it has no end: an epoch is as many rollouts as one pass through the corpus takes, and the next one goes
    on in the middle of documents. Its position is its own and part of its :meth:`state_dict`: it goes on where the
    last iteration stopped, be it at the end of an epoch, at ``limit_train_batches`` or in a run that was killed.
    Without shuffling every iteration is the same, one pass from the first rollout to the last.

    Where nothing is ever reset, each lane reads a stretch of the split, document after document in their order, and
    only its first segment starts anew: with one lane, the whole split is one stream. Segments still end with documents.

    Args:
        documents: A split.
        batch_size: Of a rollout, over all ranks; a multiple of ``world_size``.
        segment_length: Tokens of a segment.
        horizon: Segments of a rollout.
        interleave: Groups of so many lanes that take turns, one rollout each. Needs ``shuffle``.
        seed: Of the shuffle.
        shuffle: Whether every pass has another order: True to train, False to evaluate.
        shortest_first: Whether the first of these passes goes from the shortest documents to the longest, those of as
            many segments shuffled. Of no effect without ``shuffle``.
        reset: When a lane begins from the initial state: where a document starts, or never but at the very first. The
            latter needs ``shuffle=False``.
        rank: Which slice of the lanes to read.
        world_size: In how many slices the lanes are cut.
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
            raise UsageError(f"lanes take turns only where they have no end: {interleave=} needs shuffle=True")
        if reset not in ("documents", "never") or (reset == "never" and shuffle):
            raise UsageError(
                f"reset must be documents, or never where nothing is shuffled, got {reset=} and {shuffle=}"
            )
        if batch_size % world_size:
            raise UsageError(
                f"batch_size is split among processes: world_size must divide it, got {batch_size=} and {world_size=}"
            )
        self.documents = documents
        self.batch_size, self.interleave, self.world_size = batch_size, interleave, world_size
        self.segment_length, self.horizon = segment_length, horizon
        self.seed, self.shuffle, self.shortest_first = seed, shuffle, shortest_first
        self.reset = reset
        self._repeated: int | None = None
        each = batch_size // world_size
        self._own = range(rank * each, (rank + 1) * each)
        self.rollouts_done = 0
        self._plan = self._begin_plan()

    def __len__(self) -> int:
        """Windows of an epoch, the same on every rank."""
        if self.shuffle:
            return -(-self._plan.total // (self.batch_size * self.horizon))
        return -(-self._plan.longest // self.horizon)

    def __iter__(self) -> Iterator[Rollout]:
        """The rollouts that are left of this epoch, or those of the next one where none are."""
        if not self.shuffle or (self._repeated is not None and self.rollouts_done >= self._repeated):
            self._rewind()
        end = self._repeated or ((self.rollouts_done // len(self) + 1) * len(self) if len(self) else 0)
        while self.rollouts_done < end:
            self.rollouts_done += 1  # before it is handed out: a checkpoint that is written meanwhile counts it
            yield self._build(self.rollouts_done - 1)

    def repeat(self, rollouts: int | None, *, anew: bool = False) -> None:
        """Read the same first ``rollouts`` in every iteration, or with None go on in the corpus, as without.

        An iteration that was stopped among them is gone on with, unless it is to begin ``anew``.
        """
        self._repeated = rollouts
        if anew and rollouts is not None:
            self._rewind()

    def state_dict(self) -> dict[str, int | str]:
        """How many rollouts were handed out, and the geometry that gives this number a meaning."""
        return {**self._geometry(), "rollout": self.rollouts_done}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Go on from where a loader with the same geometry was, on whichever number of ranks.

        Raises:
            UsageError: The geometry is another; says which value differs.
        """
        own = {name: value for name, value in self._geometry().items() if state.get(name) != value}
        differing = [f"{name} (was {state.get(name)!r}, is {value!r})" for name, value in own.items()]
        if differing:
            raise UsageError(f"cannot resume: data settings differ from the checkpoint: {', '.join(differing)}")
        self._rewind()
        self.rollouts_done = int(state["rollout"])

    def _rewind(self) -> None:
        self.rollouts_done = 0
        if self.shuffle:  # a plan does not go back
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
        placed = self._plan.place(times, range(first + self._own.start, first + self._own.stop))
        within_L = np.arange(self.segment_length)
        token_mask_TBL = within_L < placed.lengths[:, :, None]
        begin_TB = self.documents.offsets[placed.documents] + placed.firsts
        place_TBL = np.where(token_mask_TBL, begin_TB[:, :, None] + within_L, 0)
        token_TBL = np.where(token_mask_TBL, self.documents.tokens[place_TBL], 0).astype(np.int64)
        start_TB = (placed.documents >= 0) & (placed.firsts == 0)
        if self.reset == "never":
            start_TB &= np.array(times)[:, None] == 0
        loss_mask_TBL = token_mask_TBL & (
            placed.firsts[:, :, None] + within_L >= self.documents.prompt_lengths[placed.documents][:, :, None]
        )
        stacked = (torch.from_numpy(array) for array in (token_TBL, token_mask_TBL, start_TB, loss_mask_TBL))
        segments = tuple(map(Segment, *stacked))
        return Rollout(segments, torch.from_numpy(placed.documents), torch.from_numpy(placed.firsts), group)


def require_rollout_size(*, batch_size: int, interleave: int, horizon: int, segment_length: int) -> None:
    """Raise a ``UsageError`` if a size of a rollout is impossible, or if they are too large together."""
    require_sizes(batch_size=batch_size, segment_length=segment_length, horizon=horizon, interleave=interleave)
    require_sizes(most=LARGEST, **{"batch_size * interleave": batch_size * interleave})
    tokens = batch_size * horizon * segment_length
    require_sizes(most=LARGEST_ROLLOUT, **{"batch_size * horizon * segment_length": tokens})


def require_lane_loader(loader: object) -> LaneLoader:
    """The loader itself.

    Raises:
        TypeError: It is not a loader of lanes, so nobody knows which document a lane reads.
    """
    if not isinstance(loader, LaneLoader):
        raise TypeError(f"rollouts come from a LaneLoader, as SegmentData makes them; got a {type(loader).__name__}")
    return loader
