"""Deal documents out to lanes, and cut the lanes into segments and rollouts.

    T  segments of a rollout (the horizon)     B  lanes     L  tokens of a segment

In training, lanes never end: one pass through the corpus follows another. Groups of lanes can take turns, so that
consecutive rollouts read different documents. Otherwise the weights learn the few documents that every rollout
continues, and memory has nothing left to do (``README.md``).

Which document a lane reads, and when, depends only on the lengths of the documents, the number of lanes, the segment
length and the seed; only lanes that revisit documents draw theirs by their losses (``revisiting.py``). A rank reads its
slice of the lanes of every group, so every rank has the same number of rollouts, and a run can be resumed on another
number of ranks.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from memformer_pl.contract import Segment
from memformer_pl.data.lane_plan import LanePlan, Placement
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.data.revisiting import Revisit, Revisits
from memformer_pl.errors import LARGEST, UsageError, require_sizes

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
        revisit: Let some of the lanes read documents again; needs ``shuffle``. An epoch is then one pass of the other
            lanes, and the losses of every rollout must be given to :meth:`hear`.
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
        revisit: Revisit | None = None,
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
        if revisit is not None and revisit.share and not shuffle:
            raise UsageError(f"lanes can revisit documents only in training: {revisit=} needs shuffle=True")
        if batch_size % world_size:
            raise UsageError(
                f"batch_size must be a multiple of the number of processes, got {batch_size=} and {world_size=}"
            )
        self.documents = documents
        self.batch_size, self.interleave, self.world_size = batch_size, interleave, world_size
        self.segment_length, self.horizon = segment_length, horizon
        self.seed, self.shuffle, self.shortest_first = seed, shuffle, shortest_first
        self.reset = reset
        self.revisit = revisit if revisit is not None and revisit.share else None
        self._epoch: int | None = None
        self._repeats = False
        lanes = batch_size // world_size
        self._lanes = range(rank * lanes, (rank + 1) * lanes)
        self._begin()

    def __len__(self) -> int:
        """Rollouts of an epoch, the same on every rank."""
        if self.shuffle:
            return -(-self._plan.total // (self._reading * self.horizon))
        return -(-self._plan.longest // self.horizon)

    def __iter__(self) -> Iterator[Rollout]:
        """Yield the rollouts that are left of this epoch, or those of the next epoch if none are left."""
        epoch = len(self) if self._epoch is None else self._epoch
        if not self.shuffle or (self._repeats and self.rollouts_done >= epoch):
            self._rewind()
        end = (self.rollouts_done // epoch + 1) * epoch if epoch else 0
        while self.rollouts_done < end:
            self.rollouts_done += 1  # before the yield: a checkpoint written during this step must count the rollout
            yield self._build(self.rollouts_done - 1)

    def limit(self, rollouts: int, *, repeat: bool = False, anew: bool = False) -> None:
        """Read ``rollouts`` in every iteration: the next ones, or with ``repeat`` the same first ones each time.

        An iteration that stopped part of the way is continued, unless what is repeated begins ``anew``.

        Raises:
            UsageError: Lanes that revisit documents are to repeat rollouts, which depend on what was read before.
        """
        if repeat and self.revisits is not None:
            raise UsageError("lanes that revisit documents cannot repeat rollouts (overfit_batches): leave out one")
        self._epoch, self._repeats = rollouts, repeat
        if repeat and anew:
            self._rewind()

    def state_dict(self) -> dict[str, int | str]:
        """The number of rollouts that were yielded, and the geometry that gives this number a meaning."""
        return {**self._geometry(), "rollout": self.rollouts_done}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Continue from where a loader with the same geometry was, on any number of ranks.

        Raises:
            UsageError: The geometry differs; names each value that does.
        """
        now, was = self._geometry(), {name: value for name, value in state.items() if name != "rollout"}
        changed = [name for name in dict.fromkeys((*now, *was)) if now.get(name) != was.get(name)]
        differing = [f"{name} (was {was.get(name)!r}, is {now.get(name)!r})" for name in changed]
        if differing:
            raise UsageError(f"cannot resume: data settings differ from the checkpoint: {', '.join(differing)}")
        self._rewind()
        self.rollouts_done = int(state["rollout"])

    def hear(self, losses: Float64[np.ndarray, "T 2 B"]) -> None:
        """Take the losses of the earliest rollout whose losses are not known, if lanes revisit documents.

        Rollout k needs those up to rollout k - 2.

        Args:
            losses: Nats and targets of each segment and lane, of the lanes of all ranks.
        """
        assert self.revisits is not None
        self.revisits.hear(losses)

    def _rewind(self) -> None:
        if self.shuffle:  # a plan cannot go back
            self._begin()
        self.rollouts_done = 0

    def _geometry(self) -> dict[str, int | str]:
        revisit = {} if self.revisit is None else {"revisit": repr(self.revisit)}
        return {
            "batch_size": self.batch_size,
            "segment_length": self.segment_length,
            "horizon": self.horizon,
            "interleave": self.interleave,
            "seed": self.seed,
            "shortest_first": self.shortest_first,
            "corpus": self.documents.fingerprint,
            **revisit,
        }

    def _begin(self) -> None:
        """Begin with the first rollout."""
        self.rollouts_done, lengths, length = 0, self.documents.lengths, self.segment_length
        sizes = {"batch_size": self.batch_size, "interleave": self.interleave, "segment_length": length}
        self.revisits = (
            None if self.revisit is None else Revisits(self.revisit, lengths=lengths, **sizes, seed=self.seed)
        )
        self._reading = self.batch_size - (0 if self.revisits is None else int(self.revisits.revisiting.sum()))
        self._plan = LanePlan(
            lengths,
            lanes=self._reading * self.interleave,
            segment_length=length,
            seed=self.seed if self.shuffle else None,
            shortest_first=self.shortest_first,
            in_order=self.reset == "never",
        )

    def _place(self, rollout: int, times: range, group: int) -> Placement:
        """What the lanes of this rank read in a rollout."""
        if self.revisits is None:
            first = group * self.batch_size
            return self._plan.place(times, range(first + self._lanes.start, first + self._lanes.stop))
        others = self._plan.place(times, range(group * self._reading, (group + 1) * self._reading))
        placed = self.revisits.place(rollout, group=group, others=others)
        return Placement(*(field[:, self._lanes.start : self._lanes.stop] for field in placed))

    def _build(self, rollout: int) -> Rollout:
        turn, group = divmod(rollout, self.interleave)
        times = range(turn * self.horizon, (turn + 1) * self.horizon)
        placed = self._place(rollout, times, group)
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
