"""Callbacks: progress, checkpoints, records, reports, and what memory does while a model trains."""

from memformer_pl.callbacks.accuracy_by_distance import AccuracyByDistance
from memformer_pl.callbacks.attention_maps import AttentionMaps
from memformer_pl.callbacks.closing_report import ClosingReport
from memformer_pl.callbacks.initial_weights import InitialWeights
from memformer_pl.callbacks.last_checkpoint import LastCheckpoint
from memformer_pl.callbacks.model_summary import SegmentModelSummary
from memformer_pl.callbacks.progress import ProgressLines, SegmentProgressBar
from memformer_pl.callbacks.rows_hit import RowsHit
from memformer_pl.callbacks.run_record import RunRecord
from memformer_pl.callbacks.slot_retention import SlotRetention

__all__ = [
    "AccuracyByDistance",
    "AttentionMaps",
    "ClosingReport",
    "InitialWeights",
    "LastCheckpoint",
    "ProgressLines",
    "RowsHit",
    "RunRecord",
    "SegmentModelSummary",
    "SegmentProgressBar",
    "SlotRetention",
]
