"""What watches a run."""

from memformer_pl.callbacks.closing_report import ClosingReport
from memformer_pl.callbacks.last_checkpoint import LastCheckpoint
from memformer_pl.callbacks.progress import SegmentProgressBar

__all__ = ["ClosingReport", "LastCheckpoint", "SegmentProgressBar"]
