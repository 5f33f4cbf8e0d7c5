"""Read whole documents again: some lanes draw theirs from a buffer of those that the other lanes have finished.

    T  segments of a rollout (the horizon)     B  lanes of a group, of all ranks     R  those of them that revisit

The draws of a rollout depend on losses, but on no clock: they come from a generator of their own, one for each number
of a rollout, and see the losses of all rollouts but the latest :data:`UNHEARD`. These have arrived on the host by then
(``training/stepping.py``). Every rank has the same buffer and computes the same draws, for the lanes of all ranks.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from memformer_pl.data.lane_plan import Placement
from memformer_pl.data.weighted_buffer import WeightedBuffer
from memformer_pl.errors import UsageError, require_sizes

UNHEARD = 1
"""Number of rollouts right before one that its draws do not see: those up to number k - 2 are seen by number k."""
STREAM = 1
"""Tells the generators of the draws from those of the shuffled passes, which have the same seed."""


@dataclass(frozen=True, kw_only=True)
class Revisit:
    """Let a share of the lanes of every group read whole documents again, drawn by weight from a buffer.

    A document enters the buffer when one of the other lanes has finished it. A lane that revisits starts every document
    from the initial state. The weight of a document follows from its mean loss over its targets, summed while it is
    read, in training: dropout and the steps in between change it. A visit whose loss is not finite does not count. In
    the first rollouts, before a document is finished, these lanes read nothing.

    Source: Transformer with Memory Replay (Liu and Mozafari, arXiv 2205.09869): a buffer of fixed size whose examples
    are drawn by weight, one of two rules being the difference of losses. Ours: documents instead of the corrupted
    sentences of a generator, hence any sequence model; and all numbers, since the paper's are not known to us.

    Args:
        share: Share of the lanes of a group, from 0 up to but not including 1; with 0 nothing is read again. It must
            give a whole number of lanes.
        size: Documents of the buffer: the latest that were finished. At least as many as there are lanes that revisit.
        priority: What the weight of a document is. ``loss_difference``: by how much its mean loss differs from that of
            the visit before; after its first visit, the largest weight that any document ever had, at first 1.
            ``loss``: its mean loss at the last visit. ``uniform``: 1. A document of weight 0 is not drawn again.
        longest: Most tokens of a training document. A lane reads a document to its end, so long ones would hold few in
            the lanes that revisit, and keep losses that are old.

    Raises:
        UsageError: A value is out of range.
    """

    share: float = 0.25
    size: int = 1024
    priority: Literal["loss_difference", "loss", "uniform"] = "loss_difference"
    longest: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UsageError(f"revisit.share must be at least 0 and below 1, got {self.share}")
        require_sizes(**{"revisit.size": self.size, "revisit.longest": self.longest})
        WeightedBuffer(size=self.size, priority=self.priority)  # refuses an unknown priority

    def lanes(self, *, batch_size: int, interleave: int) -> int:
        """The number of lanes of each group that revisit.

        Raises:
            UsageError: The share gives no whole number, or the buffer is smaller than the number of all such lanes.
        """
        lanes = round(self.share * batch_size)
        if not math.isclose(lanes, self.share * batch_size):
            raise UsageError(
                f"revisit.share {self.share} of batch_size {batch_size} is {self.share * batch_size:g} lanes: choose a "
                "share that gives a whole number of lanes"
            )
        if self.size < lanes * interleave:
            raise UsageError(
                f"revisit.size must be at least the number of lanes that revisit, {lanes} in each of {interleave} "
                f"groups, got {self.size}"
            )
        return lanes


class _Read(NamedTuple):
    """A rollout whose losses the buffer has not seen yet."""

    group: int
    documents: Int64[np.ndarray, "T B"]
    ends: Bool[np.ndarray, "T B"]
    """Where a document ends with this segment."""
    losses: Float64[np.ndarray, "T 2 B"] | None
    """Nats and targets; None as long as they have not been heard."""


class Revisits:
    """What the lanes that revisit read, and the buffer that they draw from. The same on every rank.

    Args:
        revisit: Options.
        lengths: Tokens of each document.
        batch_size: Lanes of a group, of all ranks.
        interleave: Groups.
        segment_length: Tokens of a segment.
        seed: Seed of the draws.

    Raises:
        UsageError: The share gives no whole number of lanes, or a size or a document is out of range.
    """

    def __init__(
        self,
        revisit: Revisit,
        *,
        lengths: Int64[np.ndarray, " documents"],
        batch_size: int,
        interleave: int,
        segment_length: int,
        seed: int,
    ) -> None:
        count = revisit.lanes(batch_size=batch_size, interleave=interleave)
        if lengths.size and (longest := int(lengths.max())) > revisit.longest:
            raise UsageError(
                f"a training document has {longest} tokens, more than revisit.longest {revisit.longest}: raise it if "
                "lanes shall revisit documents of this length, or leave data.revisit out"
            )
        self.revisit = revisit
        lanes = np.arange(batch_size)
        # spread evenly, so that the same lanes revisit on any number of ranks, and nearly as many on each
        self.revisiting: Bool[np.ndarray, " B"] = (lanes + 1) * count // batch_size > lanes * count // batch_size
        self._lengths, self._segment_length, self._seed = lengths, segment_length, seed
        self._buffer = WeightedBuffer(size=revisit.size, priority=revisit.priority)
        self._outstanding: deque[_Read] = deque()
        self._sums = np.zeros((interleave, 2, batch_size))  # nats and targets so far of the document in each lane
        self._documents = np.full((interleave, count), -1)  # of the lanes that revisit
        self._firsts = np.zeros((interleave, count), dtype=np.int64)

    @property
    def weights(self) -> dict[int, float]:
        """The weight of each document in the buffer, oldest first."""
        return self._buffer.weights

    def place(self, rollout: int, *, group: int, others: Placement) -> Placement:
        """Return what all lanes of a group read in a rollout. Call it once for each, in order.

        Args:
            rollout: Number of the rollout.
            group: Its group of lanes.
            others: What the lanes read that do not revisit.

        Raises:
            UsageError: The losses of a rollout that the draws depend on have not been heard.
        """
        while len(self._outstanding) > UNHEARD:
            self._weigh(self._outstanding[0], before=rollout)
            self._outstanding.popleft()
        drawn = self._draw(rollout, group, times=len(others.documents))
        placed = Placement(*(np.empty((len(others.documents), len(self.revisiting)), dtype=np.int64) for _ in drawn))
        for field, ours, theirs in zip(placed, drawn, others, strict=True):
            field[:, self.revisiting], field[:, ~self.revisiting] = ours, theirs
        document_TB, first_TB, length_TB = placed
        ends_TB = (document_TB >= 0) & (first_TB + length_TB == self._lengths[document_TB])
        self._outstanding.append(_Read(group, document_TB, ends_TB, None))
        return placed

    def hear(self, losses: Float64[np.ndarray, "T 2 B"]) -> None:
        """Take the losses of the earliest rollout that was placed and whose losses have not been heard.

        Args:
            losses: Nats and targets of each segment and lane, of all ranks.

        Raises:
            UsageError: There is no such rollout.
        """
        waiting = next((index for index, read in enumerate(self._outstanding) if read.losses is None), None)
        if waiting is None:
            raise UsageError("the losses of every rollout have been heard: call hear once for each")
        self._outstanding[waiting] = self._outstanding[waiting]._replace(losses=losses)

    def state_dict(self) -> dict[str, Any]:
        """The buffer, the documents that are being read, and the losses that no draw has seen, as plain tensors."""
        arrays = {"sums": self._sums, "documents": self._documents, "firsts": self._firsts}
        outstanding = [
            {
                "group": read.group,
                "documents": torch.from_numpy(read.documents),
                "ends": torch.from_numpy(read.ends),
                "losses": None if read.losses is None else torch.tensor(read.losses),
            }
            for read in self._outstanding
        ]
        kept = {name: torch.tensor(array) for name, array in arrays.items()}
        return {**kept, "buffer": self._buffer.state_dict(), "outstanding": outstanding}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where another run with the same data settings was."""
        self._buffer.load_state_dict(state["buffer"])
        self._sums, self._documents, self._firsts = (
            state[name].numpy().copy() for name in ("sums", "documents", "firsts")
        )
        self._outstanding.clear()
        for read in state["outstanding"]:
            documents, losses = read["documents"].numpy(), read["losses"]
            # a rollout in which the run was killed is not read again: the visits in it do not count
            known = np.full((len(documents), 2, documents.shape[1]), np.nan) if losses is None else losses.numpy()
            self._outstanding.append(_Read(read["group"], documents, read["ends"].numpy(), known))

    def _draw(self, rollout: int, group: int, *, times: int) -> Placement:
        """What the lanes that revisit read: the rest of a document, then others from the buffer."""
        random = np.random.default_rng((self._seed, rollout, STREAM))
        document_R, first_R = self._documents[group], self._firsts[group]
        placed = []
        for _ in range(times):
            idle_R = document_R < 0
            if len(self._buffer) and idle_R.any():
                document_R[idle_R] = self._buffer.draw(int(idle_R.sum()), random)
            left_R = np.where(document_R >= 0, self._lengths[document_R] - first_R, 0)
            length_R = left_R.clip(max=self._segment_length)
            placed.append((document_R.copy(), first_R.copy(), length_R))
            first_R += length_R
            ended_R = left_R == length_R
            document_R[ended_R], first_R[ended_R] = -1, 0
        return Placement(*map(np.stack, zip(*placed, strict=True)))

    def _weigh(self, read: _Read, *, before: int) -> None:
        """Sum the losses of a rollout by document, and weigh the documents that end in it."""
        if read.losses is None:
            raise UsageError(
                f"rollout {before} cannot be drawn: the losses of an earlier one are not known. SegmentTask reports "
                "them; in a loop of your own, call loader.hear after each rollout, or leave out revisit"
            )
        sums = self._sums[read.group]
        for document_B, ends_B, loss_2B in zip(read.documents, read.ends, read.losses, strict=True):
            sums += loss_2B
            for lane in np.flatnonzero(ends_B):
                nats, targets = sums[:, lane]
                if targets > 0 and math.isfinite(nats):
                    enter = self._buffer.visit if self.revisiting[lane] else self._buffer.write
                    enter(int(document_B[lane]), float(nats / targets))
            sums[:, ends_B] = 0
