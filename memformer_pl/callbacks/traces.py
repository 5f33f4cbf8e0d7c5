"""What the probes of a model show while it reads, put in order by document: a trace for each.

A model is watched by the names of its probes and of the fields of its state, never by its class:

- probes ``retention`` ``[B, H, M]`` and ``writing`` ``[B, H, M, L]`` of a writer;
- a probe ``memory_reader.attention.weights`` ``[B, H, S, M]`` in each layer that reads memory;
- the field ``memory`` ``[B, M, D]``; and ``previous`` ``[B, L]``, -1 where there is no token, in a model that writes
  the previous segment and not the present one.

T  segments of a document that were written     B  lanes     L  tokens in a segment     M  slots     H  heads
N  layers that read memory     S  positions that read memory: what the model puts in front, and L tokens
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
    """What a model did with its memory in one document, a row for each segment that it wrote."""

    tokens: Int[np.ndarray, "T L"]
    """That were written; -1 where there is none."""
    retention: Float[np.ndarray, "T H M"]
    """The weight that a slot gave itself."""
    angle: Float[np.ndarray, "T M"]
    """Radians between a slot and where it began, on the sphere."""
    writing: Float[np.ndarray, "T H M L"]
    """The weight that a slot gave each token; no entries unless maps are kept."""
    reading: Float[np.ndarray, "T N H S M"]
    """The weight that each position gave each slot; no entries unless maps are kept."""


class Maps(NamedTuple):
    """Which attention is kept weight by weight."""

    layers: list[int]
    """Of those that read memory, counted from 0."""
    slots: list[int]


class Recorder:
    """Makes traces of documents while a model reads rollouts of them.

    Hooks are in place only between :meth:`start` and :meth:`stop`, and only in rollouts with a document that is still
    to be followed.

    Args:
        model: Is watched in whatever it reads between the two calls, one call of ``forward`` for each segment.
        segments: How many segments to follow of which document; others are not followed.
        finish: Is given each document's number and trace at the end, unless nothing was written.
        maps: What to keep of ``writing`` and ``reading``; by default nothing.
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
        watched = {"retention"} if maps is None else {"retention", "writing", *map(reading, maps.layers)}
        self._taps = {name: probe for name, probe in memory_probes(model).items() if name in watched}
        self._left = dict(segments) if slots_of(model) else {}
        self._rows: dict[int, list[Trace]] = {}
        self._hooks: list[RemovableHandle] = []
        self._seen: dict[str, Tensor] = {}
        self._documents: Iterator[list[int]] = iter(())
        if self._left:
            self._origin = initial_memory(model).float()

    def start(self, documents: Int[Tensor, "T B"]) -> None:
        """Watch the next rollout.

        Args:
            documents: Which document each lane reads in each of its segments; -1 for none.
        """
        rows = documents.tolist()
        if self._left.keys().isdisjoint(document for row in rows for document in row):
            return
        self._documents = iter(rows)
        self._hooks = [probe.register_forward_hook(partial(self._see, name)) for name, probe in self._taps.items()]
        self._hooks.append(self._model.register_forward_hook(self._read))

    def stop(self) -> None:
        """Look away."""
        while self._hooks:
            self._hooks.pop().remove()
        self._seen.clear()

    def _see(self, name: str, probe: Probe, args: tuple[Tensor], value: Tensor) -> None:
        self._seen[name] = value

    def _read(self, model: SegmentModel, args: tuple[Segment, State], output: tuple[Any, State]) -> None:
        documents = next(self._documents)
        lanes = [lane for lane, document in enumerate(documents) if document in self._left]
        if not lanes:
            return
        batch = self._rows_of(lanes, *args, output[1])
        for place, lane in enumerate(lanes):
            document, row = documents[lane], Trace(*(field[place] for field in batch))
            if (row.tokens >= 0).any():
                self._rows.setdefault(document, []).append(row)
            self._left[document] -= 1
            if not self._left[document]:
                del self._left[document]
                if rows := self._rows.pop(document, None):
                    self._finish(document, Trace(*(np.stack(field) for field in zip(*rows, strict=True))))

    @torch.no_grad()
    def _rows_of(self, lanes: list[int], segment: Segment, entering: State, next_state: State) -> Trace:
        """A row of the traces of those lanes, lanes first."""
        index = torch.tensor(lanes, device=segment.tokens.device)
        tokens = segment.tokens.masked_fill(~segment.token_mask, -1)
        if hasattr(entering, "previous"):
            tokens = entering.previous.masked_fill(segment.document_start[:, None], -1)
        memory: Tensor = next_state.memory  # type: ignore[attr-defined]  # memory_taps has asked for it
        cosine = F.cosine_similarity(memory[index].float(), self._origin, dim=-1)
        seen = {name: value[index].float().cpu() for name, value in self._seen.items()}
        writing, read = torch.empty(len(lanes), 0), torch.empty(len(lanes), 0)
        if self._maps is not None:
            slots = torch.tensor(self._maps.slots)
            writing = seen["writing"][:, :, slots].half()
            if self._maps.layers:
                layers = [seen[reading(layer)] for layer in self._maps.layers]
                read = torch.stack(layers, dim=1)[..., slots].half()
        fields = (tokens[index].cpu(), seen["retention"], cosine.clamp(-1, 1).arccos().cpu(), writing, read)
        return Trace(*(field.numpy() for field in fields))


def memory_probes(model: SegmentModel) -> dict[str, Probe]:
    """The probes of a model's writer and readers: ``retention``, ``writing``, and ``reading 0`` from the first layer up.

    Empty for a model that has no such writer, or no field ``memory``.
    """
    probes = {name: module for name, module in model.named_modules() if isinstance(module, Probe)}
    found = {name.rpartition(".")[2]: probe for name, probe in probes.items()}
    if not {"retention", "writing"} <= found.keys() or not hasattr(model.initial_state(1), "memory"):
        return {}
    readers = [probe for name, probe in probes.items() if name.endswith(READER)]
    return {
        "retention": found["retention"],
        "writing": found["writing"],
        **{reading(layer): probe for layer, probe in enumerate(readers)},
    }


def reading(layer: int) -> str:
    """The name of the probe of a layer that reads memory."""
    return f"reading {layer}"


@torch.no_grad()
def initial_memory(model: SegmentModel) -> Float[Tensor, "1 M D"]:
    """The memory of one lane at the start of a document; a model with :func:`memory_taps` has it."""
    memory: Tensor = model.initial_state(1).memory
    return memory


def slots_of(model: SegmentModel) -> int:
    """How many slots can be watched."""
    return initial_memory(model).shape[1] if memory_probes(model) else 0


def layers_of(model: SegmentModel) -> int:
    """How many layers can be watched reading memory."""
    return sum(name.startswith("reading") for name in memory_probes(model))


def choose(name: str, wanted: Collection[int] | None, there: int) -> list[int]:
    """What is wanted of the ``there`` that exist, by default all.

    Raises:
        OptionError: One of them does not exist.
    """
    if wanted is None:
        return list(range(there))
    for number in wanted:
        if not 0 <= number < there:
            known = f"they go from 0 to {there - 1}" if there else "there are none"
            raise OptionError(f"{name}: there is no number {number}, {known}")
    return list(wanted)
