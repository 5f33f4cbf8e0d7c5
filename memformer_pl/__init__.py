"""Memformer and memory replay back-propagation: models that read long documents segment by segment.

``SegmentTask`` and ``SegmentData`` need Lightning, which is loaded when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from memformer_pl.gradients import GRADIENTS
from memformer_pl.models import Memformer
from memformer_pl.recurrence import Reading, Segment, SegmentModel, State
from memformer_pl.replay import replay_backward
from memformer_pl.sampling import Sampling
from memformer_pl.session import Session

if TYPE_CHECKING:
    from memformer_pl.data.module import SegmentData
    from memformer_pl.task import SegmentTask

__all__ = [
    "GRADIENTS",
    "Memformer",
    "Reading",
    "Sampling",
    "Segment",
    "SegmentData",
    "SegmentModel",
    "SegmentTask",
    "Session",
    "State",
    "replay_backward",
]

_WITH_LIGHTNING = {"SegmentData": "memformer_pl.data.module", "SegmentTask": "memformer_pl.task"}


def __getattr__(name: str) -> object:
    if name in _WITH_LIGHTNING:
        return getattr(import_module(_WITH_LIGHTNING[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
