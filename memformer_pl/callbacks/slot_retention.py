"""How long slots keep what they hold: which of them retain, aggregate and read, and for how long.

A writer's attention head holds a part of each slot, and keeps or replaces it by itself. So there are figures of *parts*
and of *slots*; the self-weight of a slot is the mean of its parts'.

The paper (section 4 of it, Figure 6) tells three kinds of slot by where their attention goes at one step, and gives an
example of each: 0.92 on itself, 0.34, and 0.07. It states no borders; ours lie halfway between the examples.

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
"""A slot that gives itself less than the first is reading, at least the second retaining, otherwise aggregating."""
PAPER = {"retaining": (0.60, 0.80), "reading": (0.05, 0.10)}
"""Shares of kinds in the middle of a document, as the paper states them."""
TENTHS, FIRST = 10, 32
MIDDLE = slice(4, 6)
"""The tenths that are the middle of a document."""
IDLE = 10.0
"""Degrees: a slot that stays nearer to where it began, on the average, holds next to nothing of a document."""
GAPS = 2 ** np.arange(12)
"""Numbers of writes over which survival is counted."""


class SlotStatistics(NamedTuple):
    """Sums over writes, which add up over documents and processes."""

    slots: Int[np.ndarray, "P M 3"]
    """How often each slot was of each kind, by position in the document."""
    parts: Int[np.ndarray, "P H M 3"]
    """Likewise each head's part of a slot."""
    first: Int[np.ndarray, "F 2 3"]
    """How often slots, and parts, were of each kind in the first writes of a document."""
    retention: Float[np.ndarray, "P H M"]
    """Self-weights."""
    angle: Float[np.ndarray, "P M"]
    """Radians between a slot and where it began."""
    survival: Float[np.ndarray, "G H M"]
    """What is left of a part's content after so many writes: the product of its self-weights."""
    spans: Int[np.ndarray, " G"]
    """How many such products there were."""

    @classmethod
    def of(cls, trace: Trace) -> "SlotStatistics":
        """The sums of one document."""
        retention_THM = trace.retention.astype(np.float64)
        heads, slots = retention_THM.shape[1:]
        none = cls.empty(heads=heads, slots=slots)
        tenth_T = np.arange(len(retention_THM)) * TENTHS // len(retention_THM)
        slot_TMC, part_THMC = (one_hot(kind_of(weight)) for weight in (retention_THM.mean(1), retention_THM))
        np.add.at(none.slots, tenth_T, slot_TMC)
        np.add.at(none.parts, tenth_T, part_THMC)
        np.add.at(none.retention, tenth_T, retention_THM)
        np.add.at(none.angle, tenth_T, trace.angle)
        first = np.stack((slot_TMC.sum(1), part_THMC.sum((1, 2))), axis=1)[:FIRST]
        none.first[: len(first)] = first
        left = retention_THM
        for place, gap in enumerate(GAPS):
            none.survival[place], none.spans[place] = left.sum(0), len(left)
            left = left[:-gap] * left[gap:]
        return none

    @classmethod
    def empty(cls, *, heads: int, slots: int) -> "SlotStatistics":
        """Those of no document."""
        counts = {"slots": (TENTHS, slots, 3), "parts": (TENTHS, heads, slots, 3), "first": (FIRST, 2, 3)}
        sums = {"retention": (TENTHS, heads, slots), "angle": (TENTHS, slots), "survival": (len(GAPS), heads, slots)}
        return cls(
            **{name: np.zeros(shape, dtype=np.int64) for name, shape in counts.items()},
            **{name: np.zeros(shape) for name, shape in sums.items()},
            spans=np.zeros(len(GAPS), dtype=np.int64),
        )

    def plus(self, other: "SlotStatistics") -> "SlotStatistics":
        """The sums of both."""
        return SlotStatistics(*(a + b for a, b in zip(self, other, strict=True)))


class SlotCounter:
    """Adds up documents, and keeps the traces of some.

    Args:
        keep: Documents whose traces are kept.
    """

    def __init__(self, keep: Collection[int]) -> None:
        self.statistics: SlotStatistics | None = None
        self.traces: dict[int, Trace] = {}
        self._keep = keep

    def add(self, document: int, trace: Trace) -> None:
        """Count a document."""
        one = SlotStatistics.of(trace)
        self.statistics = one if self.statistics is None else self.statistics.plus(one)
        if document in self._keep:
            self.traces[document] = trace


def kind_of(self_weight: Float[np.ndarray, "*_"]) -> Int[np.ndarray, "*_"]:
    """Which of ``KINDS`` a slot or part is at a step, by the weight that it gives itself."""
    return np.asarray(2 - np.digitize(self_weight, BORDERS))


def one_hot(kind: Int[np.ndarray, "*_"]) -> Int[np.ndarray, "*_ 3"]:
    """A 1 for each kind, in a last axis."""
    return np.asarray(np.eye(3, dtype=np.int64)[kind])


def shares(counts: Int[np.ndarray, "*_ 3"]) -> Float[np.ndarray, "*_ 3"]:
    """How often which kind, of all; NaN where nothing was counted."""
    total = counts.sum(-1, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), np.nan)


def middle_shares(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """The shares of kinds among ``slots`` and among ``parts`` in the middle of documents."""
    counts = {"slots": arrays["slots"][MIDDLE].sum((0, 1)), "parts": arrays["parts"][MIDDLE].sum((0, 1, 2))}
    return {name: dict(zip(KINDS, shares(count).tolist(), strict=True)) for name, count in counts.items()}


def half_life(survival: Float[np.ndarray, "G ..."], spans: Int[np.ndarray, " G"]) -> Float[np.ndarray, "*_"]:
    """Writes after which half of the content is left, on the average over the writes after which it is asked.

    Between the gaps that were counted, and beyond the longest, content is taken to decay exponentially. Infinite where
    nothing was ever lost. Forgetting, which pulls a slot back besides, is not in it.

    Args:
        survival: Sums of what was left, for each of ``GAPS``; of parts, or the mean of a slot's parts.
        spans: How many summands.
    """
    counted = int((spans > 0).sum())
    gaps = np.concatenate(([0], GAPS[:counted])).astype(np.float64)
    mean = survival[:counted] / spans[:counted].reshape(-1, *[1] * (survival.ndim - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.concatenate((np.zeros((1, *mean.shape[1:])), 0.0 - np.log2(mean)))  # 0 - 0 has no sign
        # the last gap over which less than half is lost, and the one after it, or two at the end of what was counted
        before = np.clip((bits < 1).cumprod(0).sum(0) - 1, 0, counted - 1)
        low, high = (np.take_along_axis(bits, (before + step)[None], 0)[0] for step in (0, 1))
        halved = gaps[before] + (gaps[before + 1] - gaps[before]) * (1 - low) / (high - low)
        beyond = gaps[-1] / bits[-1]
        return np.asarray(np.where((bits < 1).all(0), beyond, halved))


def prevailing(slots: Int[np.ndarray, "P M 3"]) -> Int[np.ndarray, " M"]:
    """The kind that each slot was most often."""
    kinds: Int[np.ndarray, " M"] = slots.sum(0).argmax(-1)
    return kinds


def bias_norms(model: SegmentModel) -> Float[np.ndarray, " M"]:
    """The length of each slot's forgetting vector ``v``; empty for a model whose slots do not forget."""
    for module in model.modules():
        if isinstance(module, BiasedMemoryNorm) and module.forgetting:
            norms: Float[np.ndarray, " M"] = module.bias.detach().norm(dim=-1).float().cpu().numpy()
            return norms
    return np.empty(0, dtype=np.float32)


def by_kind(values: Float[np.ndarray, " values"], kinds: Int[np.ndarray, " M"]) -> Float[np.ndarray, "3"]:
    """The mean over the slots of each kind; NaN for a kind without any, and where there are no values."""
    chosen = [values[kinds == kind] if values.size else values for kind in range(3)]
    return np.array([some.mean() if some.size else np.nan for some in chosen])


def mean_angle(arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, " M"]:
    """Degrees from where it began at which each slot is, on the average over writes."""
    return np.asarray(np.degrees(arrays["angle"].sum(0) / np.maximum(arrays["slots"].sum((0, 2)), 1)))


def slot_arrays(statistics: SlotStatistics, traces: dict[int, Trace], model: SegmentModel) -> dict[str, np.ndarray]:
    """What an event saves: the sums by their names, ``half_life`` ``[M]`` and ``part_half_life`` ``[H, M]`` in writes,
    ``norms`` ``[M]`` of ``v`` (or empty), and ``retention_D`` ``[T, H, M]`` of each chosen document D."""
    survival, spans = statistics.survival, statistics.spans
    return {
        **statistics._asdict(),
        "half_life": half_life(survival.mean(1), spans),
        "part_half_life": half_life(survival, spans),
        "norms": bias_norms(model),
        **{f"retention_{document}": trace.retention for document, trace in sorted(traces.items())},
    }


def summary(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The figures of an event: shares of kinds in the middle of documents, median half-life, mean angle.

    Those that are not finite are left out.
    """
    figures = {
        **{f"{name}/{kind}": share for name, own in middle_shares(arrays).items() for kind, share in own.items()},
        "slots/half_life": np.median(arrays["half_life"]),
        "slots/degrees_from_start": mean_angle(arrays).mean(),
    }
    return {name: float(value) for name, value in figures.items() if np.isfinite(value)}


class SlotRetention(Watching):
    """Count in every validation how long slots keep what they hold, and which of them retain, aggregate and read.

    Writes ``slot_retention/step=N.npz`` beside the logs, see :func:`slot_arrays`. TensorBoard gets the shares of kinds
    in the middle of documents, the median half-life of slots in writes while it is finite, how far they are from where
    they began, and a picture of each chosen document: slots down, writes to the right, black for one written anew.

    Args:
        documents: Held-out documents whose self-weights are kept step by step; by default the longest.
    """

    name = "slot_retention"
    logs = ("slots/", "parts/")
    """How the figures begin that a run can monitor."""

    def __init__(self, *, documents: Sequence[int] | None = None) -> None:
        super().__init__(documents=documents)

    def watch(self, model: SegmentModel, loader: LaneLoader) -> Recorder:
        """Follow all documents."""
        self._counter = SlotCounter(self.documents)
        counts = -(-loader.documents.lengths // loader.segment_length)
        return Recorder(model, segments=dict(enumerate(counts.tolist())), finish=self._counter.add)

    def conclude(self, trainer: Trainer, task: SegmentTask) -> Mapping[str, np.ndarray]:
        """What was counted over all processes."""
        counted = [one for one in distributed.gather(self._counter.statistics) if one is not None]
        traces = {
            document: trace for some in distributed.gather(self._counter.traces) for document, trace in some.items()
        }
        if not counted:
            return {}
        statistics = reduce(SlotStatistics.plus, counted)
        arrays = slot_arrays(statistics, traces, task.model)
        task.log_dict(summary(arrays), sync_dist=True)
        for document, trace in traces.items():
            written = 1 - trace.retention.mean(1).T
            pictures.show(trainer, f"{self.name}/document {document}", pictures.picture(written, most=1.0))
        return arrays
