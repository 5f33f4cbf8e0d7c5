"""Attention weights: of tokens on memory, and of slots on tokens and on themselves."""

from collections.abc import Mapping, Sequence

import numpy as np
from lightning import LightningModule, Trainer

from memformer_pl.callbacks import pictures
from memformer_pl.callbacks.traces import Maps, Recorder, Trace, choose, layers_of, slots_of
from memformer_pl.callbacks.watching import Watching
from memformer_pl.contract import SegmentModel
from memformer_pl.data import LaneLoader, Tokenizer
from memformer_pl.errors import OptionError
from memformer_pl.training import distributed
from memformer_pl.training.task import SegmentTask


def map_arrays(
    traces: Mapping[int, Trace], tokenizer: Tokenizer, *, layers: Sequence[int], slots: Sequence[int]
) -> dict[str, np.ndarray]:
    """Arrange traces as arrays to save: the chosen ``documents``, ``layers`` and ``slots``, and for each document D

    - ``tokens_D`` ``[T, L]``, with -1 for no token, and ``text_D``, the same as text;
    - ``retention_D`` ``[T, H, M]``, the weight of each slot on itself;
    - ``writing_D`` ``[T, H, M, L]``, the weights of slots on tokens, which sum to 1 with the retention;
    - ``reading_D`` ``[T, N, H, S, M]``, the weights of positions on slots; the last L positions are the tokens.

    T counts the segments that were written, M the chosen slots, N the chosen layers.
    """
    arrays = {"documents": np.array(sorted(traces)), "layers": np.array(layers), "slots": np.array(slots)}
    for document, trace in sorted(traces.items()):
        arrays[f"tokens_{document}"] = trace.tokens
        arrays[f"text_{document}"] = text_of(trace.tokens, tokenizer)
        arrays[f"retention_{document}"] = trace.retention[:, :, list(slots)]
        arrays[f"writing_{document}"] = trace.writing
        arrays[f"reading_{document}"] = trace.reading
    return arrays


def text_of(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Decode each token separately; empty for no token. A null character is shown as its symbol."""
    numbers, indices = np.unique(tokens, return_inverse=True)
    texts = [tokenizer.decode([number]).replace("\0", "␀") if number >= 0 else "" for number in numbers]
    return np.array(texts, dtype=np.str_)[indices].reshape(tokens.shape)


class AttentionMaps(Watching):
    """Save in every validation how tokens attend to memory, and how slots attend to tokens and to themselves.

    Writes ``attention_maps/step=N.npz`` beside the logs; see :func:`map_arrays`. TensorBoard gets two pictures of the
    middle segment of each document, with black for the largest weight. ``writing`` has a tile for each head, with a row
    for each slot, and columns for the slot itself and the tokens. ``reading`` has a row of tiles for each layer and a
    column of tiles for each head, with a row for each position and a column for each slot.

    Args:
        documents: Numbers of validation documents; by default the longest one.
        layers: Numbers of layers that read memory, from 0; by default all.
        slots: Numbers of slots; by default all.
        segments: Number of segments to save of each document, from its start.
    """

    logs = ()
    """Prefixes of the metrics that a run can monitor: none."""

    name = "attention_maps"

    def __init__(
        self,
        *,
        documents: Sequence[int] | None = None,
        layers: Sequence[int] | None = None,
        slots: Sequence[int] | None = None,
        segments: int = 64,
    ) -> None:
        super().__init__(documents=documents)
        self.layers, self.slots, self.segments = layers, slots, segments

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the chosen documents, layers and slots exist."""
        super().setup(trainer, pl_module, stage)
        assert isinstance(pl_module, SegmentTask)
        chosen_maps(pl_module.model, layers=self.layers, slots=self.slots, segments=self.segments)

    def watch(self, model: SegmentModel, loader: LaneLoader) -> Recorder:
        """Record the chosen documents."""
        self._traces: dict[int, Trace] = {}
        self._maps = chosen_maps(model, layers=self.layers, slots=self.slots, segments=self.segments)
        counts = -(-loader.documents.lengths // loader.segment_length)
        segments = {document: min(int(counts[document]), self.segments) for document in self.documents}
        return Recorder(model, segments=segments, finish=self._traces.__setitem__, maps=self._maps)

    def conclude(self, trainer: Trainer, task: SegmentTask) -> Mapping[str, np.ndarray]:
        """Collect the traces of all processes, and log pictures of them."""
        traces = {document: trace for rank in distributed.gather(self._traces) for document, trace in rank.items()}
        if not traces or self._maps is None:
            return {}
        for document, trace in traces.items():
            show(trainer, f"{self.name}/document {document}", trace, self._maps)
        data = trainer.datamodule  # type: ignore[attr-defined]  # see setup
        return map_arrays(traces, data.tokenizer, layers=self._maps.layers, slots=self._maps.slots)


def chosen_maps(
    model: SegmentModel, *, layers: Sequence[int] | None, slots: Sequence[int] | None, segments: int
) -> Maps | None:
    """The chosen layers and slots of a model, by default all; None for a model without probes of a memory.

    Raises:
        OptionError: One of them does not exist, or ``segments`` is too small to include a write.
    """
    if segments < 2:
        raise OptionError(f"segments must be at least 2, one to write and one to read, got {segments}")
    if not slots_of(model):
        return None
    return Maps(choose("layers", layers, layers_of(model)), choose("slots", slots, slots_of(model)))


def show(trainer: Trainer, tag: str, trace: Trace, maps: Maps) -> None:
    """Log pictures of the middle segment of a trace."""
    middle = len(trace.tokens) // 2
    own_HM1 = trace.retention[middle][:, maps.slots, None]
    writing_HML = np.concatenate((own_HM1, trace.writing[middle].astype(np.float32)), axis=-1)
    pictures.show(trainer, f"{tag}, writing", pictures.picture(pictures.tiles([list(writing_HML)]), most=1.0))
    reading_NHSM = trace.reading[middle].astype(np.float32)
    if reading_NHSM.size:
        shown = pictures.picture(pictures.tiles([list(row) for row in reading_NHSM]), most=float(reading_NHSM.max()))
        pictures.show(trainer, f"{tag}, reading", shown)
