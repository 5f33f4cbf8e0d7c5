"""Documents are dealt out to lanes; lanes are cut into segments, and segments gathered into windows.

    T  segments of a window (the horizon)     B  lanes     L  tokens of a segment

What a lane reads, and when, is a pure function of the lengths of the documents, the number of lanes, the segment
length, the seed and the epoch. A rank takes its slice of the lanes: so every rank has the same number of windows, and
a run may be gone on with on another number of ranks.
"""

import heapq
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from memformer_pl.data.documents import PackedDocuments
from memformer_pl.recurrence import Segment


class Window(NamedTuple):
    """What is read between two optimizer steps."""

    segments: tuple[Segment, ...]
    """As many as the horizon. The last of an epoch may have no tokens in any lane."""
    documents: Int[Tensor, "T B"]
    """Which document of its split each lane reads in each segment; -1 for none."""


class Cut(NamedTuple):
    """Where the segments of a window lie."""

    documents: Int64[np.ndarray, "T B"]
    """-1 where a lane has run out."""
    firsts: Int64[np.ndarray, "T B"]
    """The first token of each segment, counted from the start of its document."""
    lengths: Int64[np.ndarray, "T B"]
    """Tokens of each segment; 0 where a lane has run out."""


class LanePlan:
    """Which document every lane reads in which segment of one epoch.

    Documents are assigned longest first, each to the lane with the least to read, so that lanes end at nearly the same
    time; then every lane is shuffled. Documents of equally many segments change lanes from epoch to epoch.

    Args:
        lengths: Tokens of each document; those without any are in no lane.
        lanes: Over all ranks.
        segment_length: Tokens of a segment. The last one of a document is ragged.
        order: Seed and epoch of the shuffle. None keeps every lane as it was assigned, longest first.
    """

    def __init__(
        self,
        lengths: Int64[np.ndarray, " documents"],
        *,
        lanes: int,
        segment_length: int,
        order: tuple[int, int] | None,
    ) -> None:
        self.lengths = lengths
        self.segment_length = segment_length
        counts = -(-lengths // segment_length)
        assigned = _assign(counts, lanes=lanes, random=None if order is None else np.random.default_rng(order))
        self.documents = np.concatenate(assigned)
        self.sizes = np.array([counts[lane].sum() for lane in assigned])
        # Lane b lies at b * segments on one line, each document where it begins: one search finds all of a window.
        firsts = np.concatenate([np.cumsum(counts[lane]) - counts[lane] for lane in assigned])
        self._begins = firsts + np.repeat(np.arange(lanes) * self.segments, [lane.size for lane in assigned])

    @property
    def segments(self) -> int:
        """Segments of the longest lane. The same in every epoch."""
        return int(self.sizes.max())

    @property
    def filled(self) -> float:
        """Share of all segments of all lanes in which there is something to read."""
        return float(self.sizes.mean() / max(self.segments, 1))

    def cut(self, times: range, lanes: range) -> Cut:
        """Where those lanes read in those segments of the epoch."""
        time_T1, lane_B = np.array(times)[:, None], np.array(lanes)
        line_TB = time_T1 + lane_B * self.segments
        slot_TB = np.searchsorted(self._begins, line_TB, side="right") - 1
        document_TB = self.documents[slot_TB]
        first_TB = (line_TB - self._begins[slot_TB]) * self.segment_length
        length_TB = np.minimum(self.lengths[document_TB] - first_TB, self.segment_length)
        reads_TB = time_T1 < self.sizes[lane_B]
        return Cut(
            np.where(reads_TB, document_TB, -1), np.where(reads_TB, first_TB, 0), np.where(reads_TB, length_TB, 0)
        )


class LaneLoader:
    """Windows of one rank, epoch after epoch.

    Its position is its own and part of its :meth:`state_dict`: a shuffling loader goes on where the last iteration
    stopped, be it at the end of an epoch, at ``limit_train_batches`` or in a run that was killed. Without shuffling
    every iteration is the same, from the first window to the last.

    Args:
        documents: A split.
        lanes: Over all ranks; a multiple of ``world_size``.
        segment_length: Tokens of a segment.
        horizon: Segments of a window.
        seed: Of the shuffle.
        shuffle: Whether every epoch has another order: True to train, False to evaluate.
        rank: Which slice of the lanes to read.
        world_size: In how many slices the lanes are cut.
    """

    def __init__(
        self,
        documents: PackedDocuments,
        *,
        lanes: int,
        segment_length: int,
        horizon: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        require_positive({"lanes": lanes, "segment_length": segment_length, "horizon": horizon})
        if lanes % world_size:
            raise ValueError(
                f"lanes are shared out among processes: world_size must divide them, got {lanes=} and {world_size=}"
            )
        self.documents = documents
        self.lanes = lanes
        self.segment_length = segment_length
        self.horizon = horizon
        self.seed = seed
        self.shuffle = shuffle
        each = lanes // world_size
        self.local_lanes = range(rank * each, (rank + 1) * each)
        self.epoch = 0
        self.window = 0
        self._plan = self._plan_epoch()

    @property
    def filled(self) -> float:
        """Share of all segments of all lanes in which there is something to read."""
        return self._plan.filled

    def __len__(self) -> int:
        """Windows of an epoch, the same on every rank and in every epoch."""
        return -(-self._plan.segments // self.horizon)

    def __iter__(self) -> Iterator[Window]:
        """The windows that are left of this epoch, or those of the next one where none are."""
        if not self.shuffle:
            self.window = 0
        elif self.window >= len(self):
            self.epoch, self.window = self.epoch + 1, 0
            self._plan = self._plan_epoch()
        while self.window < len(self):
            self.window += 1  # before it is handed out: a checkpoint that is written meanwhile counts it
            yield self._build(self.window - 1)

    def state_dict(self) -> dict[str, int | str]:
        """How many windows of which epoch were handed out, and the geometry that gives these numbers a meaning."""
        return {**self._geometry(), "epoch": self.epoch, "window": self.window}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Go on from where a loader with the same geometry was, on whichever number of ranks.

        Raises:
            ValueError: The geometry is another; says which value differs.
        """
        differing = [
            f"{name} (was {state.get(name)!r}, is {value!r})"
            for name, value in self._geometry().items()
            if state.get(name) != value
        ]
        if differing:
            raise ValueError(f"the checkpoint read its corpus otherwise, and cannot be resumed: {', '.join(differing)}")
        self.epoch, self.window = int(state["epoch"]), int(state["window"])
        self._plan = self._plan_epoch()

    def _geometry(self) -> dict[str, int | str]:
        return {
            "lanes": self.lanes,
            "segment_length": self.segment_length,
            "horizon": self.horizon,
            "seed": self.seed,
            "corpus": self.documents.fingerprint,
        }

    def _plan_epoch(self) -> LanePlan:
        order = (self.seed, self.epoch) if self.shuffle else None
        lengths = self.documents.lengths
        return LanePlan(lengths, lanes=self.lanes, segment_length=self.segment_length, order=order)

    def _build(self, window: int) -> Window:
        cut = self._plan.cut(range(window * self.horizon, (window + 1) * self.horizon), self.local_lanes)
        within_L = np.arange(self.segment_length)
        present_TBL = within_L < cut.lengths[:, :, None]
        begin_TB = self.documents.offsets[cut.documents] + cut.firsts
        place_TBL = np.where(present_TBL, begin_TB[:, :, None] + within_L, 0)
        token_TBL = np.where(present_TBL, self.documents.tokens[place_TBL], 0).astype(np.int64)
        start_TB = (cut.documents >= 0) & (cut.firsts == 0)
        stacked = (torch.from_numpy(array) for array in (token_TBL, present_TBL, start_TB))
        return Window(tuple(map(Segment, *stacked)), torch.from_numpy(cut.documents))


def _assign(
    counts: Int64[np.ndarray, " documents"], *, lanes: int, random: np.random.Generator | None
) -> list[Int64[np.ndarray, " _"]]:
    """The documents of every lane, in the order in which it reads them."""
    documents = np.arange(counts.size) if random is None else random.permutation(counts.size)
    documents = documents[counts[documents] > 0]
    documents = documents[np.argsort(-counts[documents], kind="stable")]
    assigned: list[list[int]] = [[] for _ in range(lanes)]
    loads = [(0, lane) for lane in range(lanes)]
    for document, count in zip(documents.tolist(), counts[documents].tolist(), strict=True):
        load, lane = loads[0]
        assigned[lane].append(document)
        heapq.heapreplace(loads, (load + count, lane))
    ordered = (np.array(lane, dtype=np.int64) for lane in assigned)
    return [lane if random is None else random.permutation(lane) for lane in ordered]


def require_positive(sizes: Mapping[str, int]) -> None:
    """Raise a ``ValueError`` that names the first size below 1, if there is one."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
