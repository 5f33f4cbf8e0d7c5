"""Memformer and memory replay back-propagation: models that read long documents segment by segment.

Every name is imported at its first use, so that the command line starts fast and only ``SegmentTask`` and
``SegmentData`` import Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memformer_pl.contract import Segment, SegmentModel, SegmentOutput
    from memformer_pl.data.datamodule import SegmentData
    from memformer_pl.gradients import GRADIENTS, replay_backward
    from memformer_pl.inference import Sampling, Session
    from memformer_pl.models import Memformer
    from memformer_pl.training.task import SegmentTask

__all__ = [
    "GRADIENTS",
    "Memformer",
    "Sampling",
    "Segment",
    "SegmentData",
    "SegmentModel",
    "SegmentOutput",
    "SegmentTask",
    "Session",
    "replay_backward",
]

_FROM = {
    "GRADIENTS": "gradients",
    "Memformer": "models",
    "Sampling": "inference",
    "Segment": "contract",
    "SegmentData": "data.datamodule",
    "SegmentModel": "contract",
    "SegmentOutput": "contract",
    "SegmentTask": "training.task",
    "Session": "inference",
    "replay_backward": "gradients",
}


def __getattr__(name: str) -> object:
    if name in _FROM:
        return getattr(import_module(f"memformer_pl.{_FROM[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
