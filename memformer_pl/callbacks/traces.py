"""Record what a model does with its memory, from its probes, as one trace for each document.

A model is recorded by the names of its probes and state fields, never by its class:

- probes ``retention`` ``[B, H, M]`` and ``writing`` ``[B, H, M, L]`` of a writer;
- a probe ``memory_reader.attention.weights`` ``[B, H, S, M]`` in each layer that reads memory;
- a state field ``memory`` ``[B, M, D]``; and a field ``previous`` ``[B, L]``, with -1 for no token, in a model that
  writes the previous segment rather than the current one.

T  segments of a document that were written     B  lanes     L  tokens in a segment     M  slots     H  heads
N  layers that read memory     S  positions that read memory: those that the model prepends, then L tokens
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from memformer_pl.contract import Segment, SegmentModel, State
from memformer_pl.errors import OptionError
from memformer_pl.layers.probe import Probe

READER = "memory_reader.attention.weights"


class Trace(NamedTuple):
    """What a model did with its memory in one document, with a row for each segment that it wrote."""

    tokens: Int[np.ndarray, "T L"]
    """The tokens that were written; -1 for none."""
    retention: Float[np.ndarray, "T H M"]
    """Weight of a slot on itself."""
    angle: Float[np.ndarray, "T M"]
    """Angle in radians between a slot and its initial value."""
    writing: Float[np.ndarray, "T H M L"]
    """Weight of a slot on each token; empty unless maps are recorded."""
    reading: Float[np.ndarray, "T N H S M"]
    """Weight of each position on each slot; empty unless maps are recorded."""


class Maps(NamedTuple):
    """Which attention weights are recorded."""

    layers: list[int]
    """Numbers of layers that read memory, from 0."""
    slots: list[int]


class Recorder:
    """Record traces of documents while a model processes rollouts of them.

    Hooks are attached only between :meth:`start` and :meth:`stop`, and only in rollouts with a document that is not yet
    complete.

    Args:
        model: The model; between the two calls its ``forward`` must be called once for each segment.
        segments: Number of segments to record of each document; other documents are ignored.
        finish: Called with the number and the trace of each complete document, unless nothing was written.
        maps: What to record of ``writing`` and ``reading``; by default nothing.
    """

    def __init__(
        self,
        model: SegmentModel,
        *,
        segments: Mapping[int, int],
        finish: Callable[[int, Trace], None],
        maps: Maps | None = None,
    ) -> None:
        self._model, self._finish, self._maps = model, finish, maps
        names = {"retention"} if maps is None else {"retention", "writing", *map(reader_name, maps.layers)}
        self._probes = {name: probe for name, probe in memory_probes(model).items() if name in names}
        self._remaining = dict(segments) if slots_of(model) else {}
        self._rows: dict[int, list[Trace]] = {}
        self._hooks: list[RemovableHandle] = []
        self._values: dict[str, Tensor] = {}
        self._documents: Iterator[list[int]] = iter(())
        if self._remaining:
            self._initial = initial_memory(model).float()

    def start(self, documents: Int[Tensor, "T B"]) -> None:
        """Attach hooks for the next rollout.

        Args:
            documents: Document of each lane in each segment; -1 for none.
        """
        rows = documents.tolist()
        if self._remaining.keys().isdisjoint(document for row in rows for document in row):
            return
        self._documents = iter(rows)
        self._hooks = [
            probe.register_forward_hook(partial(self._on_probe, name)) for name, probe in self._probes.items()
        ]
        self._hooks.append(self._model.register_forward_hook(self._on_forward))

    def stop(self) -> None:
        """Remove the hooks."""
        while self._hooks:
            self._hooks.pop().remove()
        self._values.clear()

    def _on_probe(self, name: str, probe: Probe, args: tuple[Tensor], value: Tensor) -> None:
        self._values[name] = value

    def _on_forward(self, model: SegmentModel, args: tuple[Segment, State], output: tuple[Any, State]) -> None:
        documents = next(self._documents)
        lanes = [lane for lane, document in enumerate(documents) if document in self._remaining]
        if not lanes:
            return
        batch = self._rows_of(lanes, *args, output[1])
        for index, lane in enumerate(lanes):
            document, row = documents[lane], Trace(*(field[index] for field in batch))
            if (row.tokens >= 0).any():
                self._rows.setdefault(document, []).append(row)
            self._remaining[document] -= 1
            if not self._remaining[document]:
                del self._remaining[document]
                if rows := self._rows.pop(document, None):
                    self._finish(document, Trace(*(np.stack(field) for field in zip(*rows, strict=True))))

    @torch.no_grad()
    def _rows_of(self, lanes: list[int], segment: Segment, state: State, next_state: State) -> Trace:
        """The row of the current segment for each of the lanes, stacked."""
        index = torch.tensor(lanes, device=segment.tokens.device)
        tokens = segment.tokens.masked_fill(~segment.token_mask, -1)
        if hasattr(state, "previous"):
            tokens = state.previous.masked_fill(segment.document_start[:, None], -1)
        memory: Tensor = next_state.memory  # type: ignore[attr-defined]  # memory_probes has checked for it
        cosine = F.cosine_similarity(memory[index].float(), self._initial, dim=-1)
        values = {name: value[index].float().cpu() for name, value in self._values.items()}
        writing, reading = torch.empty(len(lanes), 0), torch.empty(len(lanes), 0)
        if self._maps is not None:
            slots = torch.tensor(self._maps.slots)
            writing = values["writing"][:, :, slots].half()
            if self._maps.layers:
                layers = [values[reader_name(layer)] for layer in self._maps.layers]
                reading = torch.stack(layers, dim=1)[..., slots].half()
        fields = (tokens[index].cpu(), values["retention"], cosine.clamp(-1, 1).arccos().cpu(), writing, reading)
        return Trace(*(field.numpy() for field in fields))


def memory_probes(model: SegmentModel) -> dict[str, Probe]:
    """The probes of a model's writer and readers: ``retention``, ``writing``, and ``reading 0`` etc. for each layer.

    Empty for a model without such a writer, or without a state field ``memory``.
    """
    probes = {name: module for name, module in model.named_modules() if isinstance(module, Probe)}
    found = {name.rpartition(".")[2]: probe for name, probe in probes.items()}
    if not {"retention", "writing"} <= found.keys() or not hasattr(model.initial_state(1), "memory"):
        return {}
    readers = [probe for name, probe in probes.items() if name.endswith(READER)]
    return {
        "retention": found["retention"],
        "writing": found["writing"],
        **{reader_name(layer): probe for layer, probe in enumerate(readers)},
    }


def reader_name(layer: int) -> str:
    """Name of the probe of a layer that reads memory."""
    return f"reading {layer}"


@torch.no_grad()
def initial_memory(model: SegmentModel) -> Float[Tensor, "1 M D"]:
    """Memory of one lane at the start of a document, for a model with :func:`memory_probes`."""
    memory: Tensor = model.initial_state(1).memory
    return memory


def slots_of(model: SegmentModel) -> int:
    """Number of slots that can be recorded."""
    return initial_memory(model).shape[1] if memory_probes(model) else 0


def layers_of(model: SegmentModel) -> int:
    """Number of layers whose attention to memory can be recorded."""
    return sum(name.startswith("reading") for name in memory_probes(model))


def choose(name: str, chosen: Collection[int] | None, count: int) -> list[int]:
    """Check that the chosen numbers are below ``count``; by default choose all.

    Raises:
        OptionError: One of them does not exist.
    """
    if chosen is None:
        return list(range(count))
    for number in chosen:
        if not 0 <= number < count:
            known = f"they go from 0 to {count - 1}" if count else "there are none"
            raise OptionError(f"{name}: there is no number {number}, {known}")
    return list(chosen)
