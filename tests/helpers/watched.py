"""Runs of a validation with callbacks that watch memory, and traces of documents that a model reads."""

from pathlib import Path

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from models import LENGTH, VOCAB

from memformer_pl.callbacks.traces import Maps, Recorder, Trace
from memformer_pl.contract import SegmentModel
from memformer_pl.data import Bytes, Files, LaneLoader
from memformer_pl.data.datamodule import SegmentData
from memformer_pl.data.packing.documents import PackedDocuments
from memformer_pl.models import Memformer
from memformer_pl.training.task import SegmentTask

ALL_MAPS = Maps(layers=[0, 1], slots=[0, 1, 2])
"""Every layer and slot of ``models.memformer``."""


def data_of(texts: Path, cache: Path) -> SegmentData:
    sizes = {"segment_length": 8, "horizon": 2, "batch_size": 2, "validation": 0.4, "test": 0.0}
    return SegmentData(corpus=Files(paths=str(texts)), tokenizer=Bytes(), cache=cache, **sizes)


def validate(folder: Path, model: SegmentModel, data: SegmentData, *callbacks: object) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logger = TensorBoardLogger(folder, name=None, version="")
    trainer = Trainer(accelerator="cpu", logger=logger, callbacks=list(callbacks), **quiet)
    trainer.validate(SegmentTask(model=model), datamodule=data, verbose=False)
    return trainer


def random_documents(*lengths: int) -> PackedDocuments:
    random = np.random.default_rng(0)
    return PackedDocuments.from_arrays([random.integers(0, VOCAB, length) for length in lengths])


def record(
    model: Memformer, packed: PackedDocuments, segments: dict[int, int], *, lanes: int, maps: Maps | None = ALL_MAPS
) -> dict[int, Trace]:
    """Traces of documents that a model reads in a loader of so many lanes."""
    traces: dict[int, Trace] = {}
    recorder = Recorder(model, segments=segments, finish=traces.__setitem__, maps=maps)
    state = None
    with torch.no_grad():
        for rollout in LaneLoader(packed, batch_size=lanes, segment_length=LENGTH, horizon=3, shuffle=False):
            recorder.start(rollout.documents)
            for segment in rollout.segments:
                _, state = model(segment, state or model.initial_state(lanes))
            recorder.stop()
    return traces
