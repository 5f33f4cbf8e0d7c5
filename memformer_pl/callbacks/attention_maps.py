"""Where attention goes: what tokens read from memory, and what slots read from tokens and from themselves."""

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
    """What an event saves: ``documents``, ``layers`` and ``slots`` that were chosen, and of each document D

    - ``tokens_D`` ``[T, L]``, -1 where there is none, and ``text_D``, the same as text;
    - ``retention_D`` ``[T, H, M]``, the weight of each slot on itself;
    - ``writing_D`` ``[T, H, M, L]``, its weights on tokens: with the one on itself they sum to 1;
    - ``reading_D`` ``[T, N, H, S, M]``, the weights of each position on slots. The last L positions are the tokens.

    T counts segments that were written, M the chosen slots, N the chosen layers.
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
    """The text of each token by itself; nothing where there is none. A null is shown as its symbol."""
    numbers, places = np.unique(tokens, return_inverse=True)
    texts = [tokenizer.decode([number]).replace("\0", "␀") if number >= 0 else "" for number in numbers]
    return np.array(texts, dtype=np.str_)[places].reshape(tokens.shape)


class AttentionMaps(Watching):
    """Keep in every validation what tokens read from memory, and what slots read from tokens and from themselves.

    Writes ``attention_maps/step=N.npz`` beside the logs, see :func:`map_arrays`. TensorBoard gets two pictures of the
    middle of what was kept of each document, black for the largest weight: ``writing``, a tile for each head, slots
    down, themselves and then tokens to the right; ``reading``, layers down and heads to the right, positions down and
    slots to the right in each tile.

    Args:
        documents: Held-out documents; by default the longest.
        layers: Those that read memory, counted from 0; by default all.
        slots: By default all.
        segments: How many segments to keep of each document, from its beginning.
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
        """Refuse what does not exist: a document, a layer, a slot."""
        super().setup(trainer, pl_module, stage)
        assert isinstance(pl_module, SegmentTask)
        chosen_maps(pl_module.model, layers=self.layers, slots=self.slots, segments=self.segments)

    def watch(self, model: SegmentModel, loader: LaneLoader) -> Recorder:
        """Follow the chosen documents."""
        self._traces: dict[int, Trace] = {}
        self._maps = chosen_maps(model, layers=self.layers, slots=self.slots, segments=self.segments)
        counts = -(-loader.documents.lengths // loader.segment_length)
        segments = {document: min(int(counts[document]), self.segments) for document in self.documents}
        return Recorder(model, segments=segments, finish=self._traces.__setitem__, maps=self._maps)

    def conclude(self, trainer: Trainer, task: SegmentTask) -> Mapping[str, np.ndarray]:
        """What was kept by all processes."""
        traces = {document: trace for some in distributed.gather(self._traces) for document, trace in some.items()}
        if not traces or self._maps is None:
            return {}
        for document, trace in traces.items():
            show(trainer, f"{self.name}/document {document}", trace, self._maps)
        data = trainer.datamodule  # type: ignore[attr-defined]  # see setup
        return map_arrays(traces, data.tokenizer, layers=self._maps.layers, slots=self._maps.slots)


def chosen_maps(
    model: SegmentModel, *, layers: Sequence[int] | None, slots: Sequence[int] | None, segments: int
) -> Maps | None:
    """The chosen layers and slots of a model, by default all; None for one without probes of a memory.

    Raises:
        OptionError: One of them does not exist; or of too few segments of a document to see a write.
    """
    if segments < 2:
        raise OptionError(f"segments must be at least 2, one to write and one to read, got {segments}")
    if not slots_of(model):
        return None
    return Maps(choose("layers", layers, layers_of(model)), choose("slots", slots, slots_of(model)))


def show(trainer: Trainer, tag: str, trace: Trace, maps: Maps) -> None:
    """Put the middle of a trace into TensorBoard."""
    middle = len(trace.tokens) // 2
    own_HM1 = trace.retention[middle][:, maps.slots, None]
    writing_HML = np.concatenate((own_HM1, trace.writing[middle].astype(np.float32)), axis=-1)
    pictures.show(trainer, f"{tag}, writing", pictures.picture(pictures.tiles([list(writing_HML)]), most=1.0))
    reading_NHSM = trace.reading[middle].astype(np.float32)
    if reading_NHSM.size:
        shown = pictures.picture(pictures.tiles([list(row) for row in reading_NHSM]), most=float(reading_NHSM.max()))
        pictures.show(trainer, f"{tag}, reading", shown)
