"""How long slots keep their content: which of them retain, aggregate or read, and for how long.

Each attention head of the writer holds a part of every slot, and keeps or replaces it independently. So both *parts*
and *slots* are counted; the self-weight of a slot is the mean over its parts.

The paper (section 4, Figure 6) distinguishes three kinds of slot by the weight that a slot gives itself at one write,
with an example of each: 0.92, 0.34 and 0.07. It states no borders; ours lie halfway between the examples.

T  writes     H  heads     M  slots     P  tenths of a document     F  first writes     G  gaps between two writes
"""

from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from lightning import Trainer

from memformer_pl.callbacks import pictures
from memformer_pl.callbacks.traces import Recorder, Trace
from memformer_pl.callbacks.watching import Watching
from memformer_pl.contract import SegmentModel
from memformer_pl.data import LaneLoader
from memformer_pl.layers import BiasedMemoryNorm
from memformer_pl.training import distributed
from memformer_pl.training.task import SegmentTask

KINDS = ("retaining", "aggregating", "reading")
EXAMPLES = (0.92, 0.34, 0.07)
"""The self-weights of the paper's three examples."""
BORDERS = (0.205, 0.63)
"""A slot with a self-weight below the first is reading, from the second up retaining, otherwise aggregating."""
PAPER = {"retaining": (0.60, 0.80), "reading": (0.05, 0.10)}
"""Shares of kinds in the middle of documents according to the paper."""
TENTHS, FIRST = 10, 32
MIDDLE = slice(4, 6)
"""The tenths in the middle of a document."""
IDLE = 10.0
"""Degrees: a slot whose mean angle to its initial value is smaller holds almost nothing of a document."""
GAPS = 2 ** np.arange(12)
"""Numbers of writes over which survival is measured."""


class SlotStatistics(NamedTuple):
    """Sums over writes, to be added over documents and processes."""

    slots: Int[np.ndarray, "P M 3"]
    """Number of writes at which each slot was of each kind, by position in the document."""
    parts: Int[np.ndarray, "P H M 3"]
    """The same for the part of a slot that each head holds."""
    first: Int[np.ndarray, "F 2 3"]
    """Number of slots, and of parts, of each kind in the first writes of a document."""
    retention: Float[np.ndarray, "P H M"]
    """Sums of self-weights."""
    angle: Float[np.ndarray, "P M"]
    """Sums of angles in radians between a slot and its initial value."""
    survival: Float[np.ndarray, "G H M"]
    """Sums of the content of a part that survives a gap: the product of its self-weights over the gap."""
    spans: Int[np.ndarray, " G"]
    """Number of such products."""

    @classmethod
    def of(cls, trace: Trace) -> "SlotStatistics":
        """Sum over one document."""
        retention_THM = trace.retention.astype(np.float64)
        heads, slots = retention_THM.shape[1:]
        sums = cls.empty(heads=heads, slots=slots)
        tenth_T = np.arange(len(retention_THM)) * TENTHS // len(retention_THM)
        slot_TMC, part_THMC = (one_hot(kind_of(weight)) for weight in (retention_THM.mean(1), retention_THM))
        np.add.at(sums.slots, tenth_T, slot_TMC)
        np.add.at(sums.parts, tenth_T, part_THMC)
        np.add.at(sums.retention, tenth_T, retention_THM)
        np.add.at(sums.angle, tenth_T, trace.angle)
        first = np.stack((slot_TMC.sum(1), part_THMC.sum((1, 2))), axis=1)[:FIRST]
        sums.first[: len(first)] = first
        survival = retention_THM
        for index, gap in enumerate(GAPS):
            sums.survival[index], sums.spans[index] = survival.sum(0), len(survival)
            survival = survival[:-gap] * survival[gap:]
        return sums

    @classmethod
    def empty(cls, *, heads: int, slots: int) -> "SlotStatistics":
        """Sums over no document."""
        counts = {"slots": (TENTHS, slots, 3), "parts": (TENTHS, heads, slots, 3), "first": (FIRST, 2, 3)}
        sums = {"retention": (TENTHS, heads, slots), "angle": (TENTHS, slots), "survival": (len(GAPS), heads, slots)}
        return cls(
            **{name: np.zeros(shape, dtype=np.int64) for name, shape in counts.items()},
            **{name: np.zeros(shape) for name, shape in sums.items()},
            spans=np.zeros(len(GAPS), dtype=np.int64),
        )

    def plus(self, other: "SlotStatistics") -> "SlotStatistics":
        """Add the sums of both."""
        return SlotStatistics(*(a + b for a, b in zip(self, other, strict=True)))


class SlotCounter:
    """Sum the statistics of documents, and keep some of their traces.

    Args:
        keep: Documents whose traces are kept.
    """

    def __init__(self, keep: Collection[int]) -> None:
        self.statistics: SlotStatistics | None = None
        self.traces: dict[int, Trace] = {}
        self._keep = keep

    def add(self, document: int, trace: Trace) -> None:
        """Add a document."""
        statistics = SlotStatistics.of(trace)
        self.statistics = statistics if self.statistics is None else self.statistics.plus(statistics)
        if document in self._keep:
            self.traces[document] = trace


def kind_of(self_weight: Float[np.ndarray, "*_"]) -> Int[np.ndarray, "*_"]:
    """Index in ``KINDS`` of a slot or part at a write, from its self-weight."""
    return np.asarray(2 - np.digitize(self_weight, BORDERS))


def one_hot(kind: Int[np.ndarray, "*_"]) -> Int[np.ndarray, "*_ 3"]:
    """One-hot encode kinds in a new last axis."""
    return np.asarray(np.eye(3, dtype=np.int64)[kind])


def shares(counts: Int[np.ndarray, "*_ 3"]) -> Float[np.ndarray, "*_ 3"]:
    """Share of each kind; NaN where nothing was counted."""
    total = counts.sum(-1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), np.nan)


def middle_shares(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Shares of kinds among ``slots`` and among ``parts`` in the middle of documents."""
    counts = {"slots": arrays["slots"][MIDDLE].sum((0, 1)), "parts": arrays["parts"][MIDDLE].sum((0, 1, 2))}
    return {name: dict(zip(KINDS, shares(count).tolist(), strict=True)) for name, count in counts.items()}


def half_life(survival: Float[np.ndarray, "G ..."], spans: Int[np.ndarray, " G"]) -> Float[np.ndarray, "*_"]:
    """Number of writes after which half of the content survives, on average over all starting points.

    Content is assumed to decay exponentially between the measured gaps, and beyond the longest. The result is infinite
    if nothing was ever lost. Forgetting, which also pulls a slot towards its initial value, is not included.

    Args:
        survival: Sums of the surviving content for each of ``GAPS``; of parts, or the mean over the parts of a slot.
        spans: Number of summands.
    """
    counted = int((spans > 0).sum())
    gaps = np.concatenate(([0], GAPS[:counted])).astype(np.float64)
    mean = survival[:counted] / spans[:counted].reshape(-1, *[1] * (survival.ndim - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.concatenate((np.zeros((1, *mean.shape[1:])), 0.0 - np.log2(mean)))  # avoids -0.0
        # the last gap over which less than half is lost and the next one, or the last two that were measured
        before = np.clip((bits < 1).cumprod(0).sum(0) - 1, 0, counted - 1)
        low, high = (np.take_along_axis(bits, (before + step)[None], 0)[0] for step in (0, 1))
        halved = gaps[before] + (gaps[before + 1] - gaps[before]) * (1 - low) / (high - low)
        beyond = gaps[-1] / bits[-1]
        return np.asarray(np.where((bits < 1).all(0), beyond, halved))


def prevailing(slots: Int[np.ndarray, "P M 3"]) -> Int[np.ndarray, " M"]:
    """Most frequent kind of each slot."""
    kinds: Int[np.ndarray, " M"] = slots.sum(0).argmax(-1)
    return kinds


def bias_norms(model: SegmentModel) -> Float[np.ndarray, " M"]:
    """Length of each slot's forgetting vector ``v``; empty for a model whose slots do not forget."""
    for module in model.modules():
        if isinstance(module, BiasedMemoryNorm) and module.forgetting:
            norms: Float[np.ndarray, " M"] = module.bias.detach().norm(dim=-1).float().cpu().numpy()
            return norms
    return np.empty(0, dtype=np.float32)


def by_kind(values: Float[np.ndarray, " values"], kinds: Int[np.ndarray, " M"]) -> Float[np.ndarray, "3"]:
    """Mean over the slots of each kind; NaN for a kind without slots, or if there are no values."""
    chosen = [values[kinds == kind] if values.size else values for kind in range(3)]
    return np.array([of_kind.mean() if of_kind.size else np.nan for of_kind in chosen])


def mean_angle(arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, " M"]:
    """Mean angle in degrees between each slot and its initial value, over writes."""
    return np.asarray(np.degrees(arrays["angle"].sum(0) / np.maximum(arrays["slots"].sum((0, 2)), 1)))


def slot_arrays(statistics: SlotStatistics, traces: dict[int, Trace], model: SegmentModel) -> dict[str, np.ndarray]:
    """Arrange statistics as arrays to save: the sums, ``half_life`` ``[M]`` and ``part_half_life`` ``[H, M]`` in
    writes, ``norms`` ``[M]`` of ``v`` (or empty), and ``retention_D`` ``[T, H, M]`` of each chosen document D."""
    survival, spans = statistics.survival, statistics.spans
    return {
        **statistics._asdict(),
        "half_life": half_life(survival.mean(1), spans),
        "part_half_life": half_life(survival, spans),
        "norms": bias_norms(model),
        **{f"retention_{document}": trace.retention for document, trace in sorted(traces.items())},
    }


def summary(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Metrics to log: shares of kinds in the middle of documents, median half-life, mean angle; only finite ones."""
    kinds = middle_shares(arrays)
    metrics = {
        **{f"{name}/{kind}": share for name, found in kinds.items() for kind, share in found.items()},
        "slots/half_life": np.median(arrays["half_life"]),
        "slots/degrees_from_start": mean_angle(arrays).mean(),
    }
    return {name: float(value) for name, value in metrics.items() if np.isfinite(value)}


class SlotRetention(Watching):
    """Measure in every validation how long slots keep their content, and which of them retain, aggregate or read.

    Writes ``slot_retention/step=N.npz`` beside the logs; see :func:`slot_arrays`. Logs the shares of kinds in the
    middle of documents, the median half-life of slots in writes while it is finite, and the mean angle to their initial
    values. TensorBoard also gets a picture of each chosen document, with a row for each slot and a column for each
    write: white for a slot that is kept, black for one that is replaced.

    Args:
        documents: Numbers of validation documents whose self-weights are saved; by default the longest one.
    """

    name = "slot_retention"
    logs = ("slots/", "parts/")
    """Prefixes of the metrics that this callback logs."""

    def __init__(self, *, documents: Sequence[int] | None = None) -> None:
        super().__init__(documents=documents)

    def watch(self, model: SegmentModel, loader: LaneLoader) -> Recorder:
        """Record all documents."""
        self._counter = SlotCounter(self.documents)
        counts = -(-loader.documents.lengths // loader.segment_length)
        return Recorder(model, segments=dict(enumerate(counts.tolist())), finish=self._counter.add)

    def conclude(self, trainer: Trainer, task: SegmentTask) -> Mapping[str, np.ndarray]:
        """Sum the statistics of all processes, and log them."""
        of_ranks = [statistics for statistics in distributed.gather(self._counter.statistics) if statistics is not None]
        traces = {
            document: trace for rank in distributed.gather(self._counter.traces) for document, trace in rank.items()
        }
        if not of_ranks:
            return {}
        statistics = reduce(SlotStatistics.plus, of_ranks)
        arrays = slot_arrays(statistics, traces, task.model)
        task.log_dict(summary(arrays), sync_dist=True)
        for document, trace in traces.items():
            replaced = 1 - trace.retention.mean(1).T
            pictures.show(trainer, f"{self.name}/document {document}", pictures.picture(replaced, most=1.0))
        return arrays
