"""What memory is worth, by position in the document: the same model with its memory as it is, reset, frozen or swapped.

W  ways to treat memory     B  lanes     L  tokens in a segment     P  tenths of a document
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memformer_pl.callbacks.slot_retention import TENTHS
from memformer_pl.contract import (
    Segment,
    SegmentModel,
    SegmentOutput,
    State,
    as_state,
    detach,
    select_lanes,
)
from memformer_pl.data import Rollout


class Costs(NamedTuple):
    """Bits of validation documents, by way and by position."""

    bits: Float[np.ndarray, "W documents P"]
    tokens: Int[np.ndarray, "documents P"]
    shown: Mapping[int, Float[np.ndarray, "W segments L"]]
    """Bits of each token of the shown documents."""


def _on(model: SegmentModel, segment: Segment, state: State, late: Tensor) -> tuple[SegmentOutput, State]:
    output, next_state = model(segment, state)
    return output, next_state


def _reset(model: SegmentModel, segment: Segment, state: State, late: Tensor) -> tuple[SegmentOutput, State]:
    output, next_state = model(segment, model.reset_memory(state))
    return output, next_state


def _frozen(model: SegmentModel, segment: Segment, state: State, late: Tensor) -> tuple[SegmentOutput, State]:
    output, next_state = model(segment, state)
    return output, select_lanes(late, model.with_memory(next_state, state), next_state)


def _shuffled(model: SegmentModel, segment: Segment, state: State, late: Tensor) -> tuple[SegmentOutput, State]:
    neighbour = as_state(state, (field.roll(1, 0) for field in state))
    return model(segment, model.with_memory(state, neighbour))[0], model.advance(segment, state)


WAYS: Mapping[str, Callable[[SegmentModel, Segment, State, Tensor], tuple[SegmentOutput, State]]] = {
    "on": _on,
    "reset": _reset,
    "frozen": _frozen,
    "shuffled": _shuffled,
}
"""``on``: memory as it is. ``reset``: reset before every segment. ``frozen``: not written after the middle of a
document. ``shuffled``: every segment is read with the memory of the neighbouring lane, which follows another document,
while each lane keeps writing its own. Only memory is changed: the segment that Memformer has yet to encode stays."""


def ways_for(model: SegmentModel, *, lanes: int) -> list[str]:
    """The ways that differ: only ``on`` for a model without memory; ``shuffled`` only with more than one lane."""
    if not model.has_memory():
        return ["on"]
    return [way for way in WAYS if way != "shuffled" or lanes > 1]


class Step(NamedTuple):
    """A segment and the output of the model."""

    documents: Int[np.ndarray, " B"]
    """Document of each lane; -1 for none."""
    positions: Int[np.ndarray, " B"]
    """Number of the segment in its document, from 0."""
    segment: Segment
    output: SegmentOutput


def read(
    model: SegmentModel, rollouts: Iterable[Rollout], *, way: str, segments: Int[np.ndarray, " documents"]
) -> Iterator[Step]:
    """Run a model over all segments of a loader in one of ``WAYS``.

    Args:
        model: A model in evaluation mode.
        rollouts: The rollouts of one loader, in order.
        way: A key of ``WAYS``.
        segments: Number of segments of each document.
    """
    device, state, positions = next(model.parameters()).device, None, None
    for rollout in rollouts:
        for on_host, documents in zip(rollout.segments, rollout.documents.numpy(), strict=True):
            segment = on_host.to(device)
            if state is None or positions is None:
                state, positions = detach(model.initial_state(len(documents))), np.zeros(len(documents), dtype=np.int64)
            positions = np.where(on_host.document_start, 0, positions)
            late = torch.from_numpy(2 * positions >= segments[documents]).to(device)
            with torch.no_grad():
                output, state = WAYS[way](model, segment, state, late)
                state = model.compact(state)
            yield Step(documents, positions, segment, output)
            positions = positions + on_host.token_mask.any(1).numpy()


def costs(
    model: SegmentModel,
    rollouts: Mapping[str, Iterable[Rollout]],
    *,
    segments: Int[np.ndarray, " documents"],
    shown: Collection[int],
) -> Costs:
    """Measure the bits of documents in several ways.

    Args:
        model: A model in evaluation mode.
        rollouts: For each way, all rollouts of the same loader, in order.
        segments: Number of segments of each document.
        shown: Documents of which the bits of each token are kept.
    """
    bits, tokens = np.zeros((len(rollouts), len(segments), TENTHS)), np.zeros((len(segments), TENTHS), dtype=np.int64)
    rows: dict[int, list[list[np.ndarray]]] = {document: [[] for _ in rollouts] for document in shown}
    for w, (way, rollouts_of_way) in enumerate(rollouts.items()):
        for step in read(model, rollouts_of_way, way=way, segments=segments):
            active = step.documents >= 0
            documents = step.documents[active]
            where = documents, step.positions[active] * TENTHS // segments[documents]
            bits_BL = step.output.token_losses.double().cpu().numpy() / np.log(2)
            np.add.at(bits[w], where, bits_BL[active].sum(1))
            if w == 0:
                np.add.at(tokens, where, step.segment.target_mask.sum(1).cpu().numpy()[active])
            for lane, document in enumerate(step.documents.tolist()):
                if document in rows:
                    rows[document][w].append(bits_BL[lane].astype(np.float32))
    return Costs(bits, tokens, {document: np.array(of_ways) for document, of_ways in rows.items()})


def by_position(
    costs: Costs,
) -> tuple[Float[np.ndarray, "W P"], Float[np.ndarray, "W P"], Float[np.ndarray, "W P"]]:
    """Bits per token of each way in each tenth of documents, and the difference to the first way.

    Returns:
        Bits per token over all documents together; the mean over documents of the difference; its standard error, NaN
        for fewer than two documents. NaN in tenths without tokens, which short documents may have.
    """
    tokens = np.where(costs.tokens > 0, costs.tokens, np.nan)
    pooled = costs.bits.sum(1) / np.where(costs.tokens.sum(0) > 0, costs.tokens.sum(0), np.nan)
    more = (costs.bits - costs.bits[0]) / tokens
    documents = (costs.tokens > 0).sum(0)
    mean = np.nansum(more, axis=1) / np.where(documents > 0, documents, np.nan)
    spread = np.nansum((more - mean[:, None]) ** 2, axis=1) / np.where(documents > 1, documents - 1, np.nan)
    return pooled, mean, np.sqrt(spread / np.maximum(documents, 1))
