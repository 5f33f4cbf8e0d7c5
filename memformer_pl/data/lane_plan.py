"""Which document each lane reads, and when: a function of the lengths of the documents, the lanes and a seed.

T  segments of a rollout (the horizon)     B  lanes
"""

import heapq
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

LANE_STRIDE = 1 << 40
"""Upper bound on the segments of one lane."""

DEALT_AT_ONCE = 4096
"""Documents of a shuffled pass that are dealt out together: a few milliseconds within a training step."""


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

    Shuffled passes are dealt out as they are read, and the next one is shuffled in a thread meanwhile: with 10 million
    documents that takes a second.

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
        else:
            self._order, self._dealt = np.empty(0, dtype=np.int64), 0
            self._next_order = self._shuffle_ahead()

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
            self._deal(self._next_documents(), needed_from=times.start)
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

    def _next_documents(self) -> Int64[np.ndarray, " _"]:
        """The next documents of the shuffled passes."""
        if self._dealt >= self._order.size:
            self._order, self._dealt = self._next_order.result(), 0
            self.passes += 1
            self._next_order = self._shuffle_ahead()
        self._dealt += DEALT_AT_ONCE
        return self._order[self._dealt - DEALT_AT_ONCE : self._dealt]

    def _shuffle_ahead(self) -> "Future[Int64[np.ndarray, ' documents']]":
        """Begin to shuffle the pass after the present one in a thread, which numpy lets run beside others."""
        executor = ThreadPoolExecutor(max_workers=1)
        shuffled = executor.submit(self._shuffled, self.passes)
        executor.shutdown(wait=False)
        return shuffled

    def _shuffled(self, number: int) -> Int64[np.ndarray, " documents"]:
        """The order of a pass."""
        assert self.seed is not None
        order = np.random.default_rng((self.seed, number)).permutation(self.lengths.size)
        if self.shortest_first and number == 0:
            order = order[np.argsort(self._counts[order], kind="stable")]
        return order

    def _deal(self, documents: Int64[np.ndarray, " _"], *, needed_from: int) -> None:
        """Deal out documents in order, and drop those that end before ``needed_from``."""
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
