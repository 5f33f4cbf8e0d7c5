"""Memformer and memory replay back-propagation: models that read long documents segment by segment.

Every name is loaded when it is first asked for: the command line answers at once, and only ``SegmentTask`` and
``SegmentData`` need Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memformer_pl.data.datamodule import SegmentData
    from memformer_pl.gradients.rollout import GRADIENTS
    from memformer_pl.models import Memformer
    from memformer_pl.contract import SegmentOutput, Segment, SegmentModel, State
    from memformer_pl.gradients.replay import replay_backward
    from memformer_pl.inference.sampling import Sampling
    from memformer_pl.inference.session import Session
    from memformer_pl.training.task import SegmentTask

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

_FROM = {
    "GRADIENTS": "gradients",
    "Memformer": "models",
    "Reading": "recurrence",
    "Sampling": "sampling",
    "Segment": "recurrence",
    "SegmentData": "data.module",
    "SegmentModel": "recurrence",
    "SegmentTask": "task",
    "Session": "session",
    "State": "recurrence",
    "replay_backward": "replay",
}


def __getattr__(name: str) -> object:
    if name in _FROM:
        return getattr(import_module(f"memformer_pl.{_FROM[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
