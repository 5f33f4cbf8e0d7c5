"""What memory is worth, by position in the document: the same model reads with memory as it is, and with less of it.

W  ways of reading     B  lanes     L  tokens in a segment     P  tenths of a document
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
    has_memory,
    select_lanes,
)
from memformer_pl.data import Rollout


class Costs(NamedTuple):
    """Bits that held-out documents take, by way of reading and by position."""

    bits: Float[np.ndarray, "W documents P"]
    tokens: Int[np.ndarray, "documents P"]
    shown: Mapping[int, Float[np.ndarray, "W segments L"]]
    """Bits of each token of some documents."""


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
    beside = as_state(state, (field.roll(1, 0) for field in state))
    return model(segment, model.with_memory(state, beside))[0], model.advance(segment, state)


WAYS: Mapping[str, Callable[[SegmentModel, Segment, State, Tensor], tuple[SegmentOutput, State]]] = {
    "on": _on,
    "reset": _reset,
    "frozen": _frozen,
    "shuffled": _shuffled,
}
"""``on``: memory as it is. ``reset``: forgotten before every segment. ``frozen``: from the middle of a document on it
is written no more. ``shuffled``: every segment is read with the memory of the lane beside, that is of another document,
while each lane goes on writing its own. What is still to be read is no memory, and is left as it is."""


def ways_for(model: SegmentModel, *, lanes: int) -> list[str]:
    """The ways that make a difference: only ``on`` without a memory; ``shuffled`` only where there is a lane beside."""
    if not has_memory(model.initial_state(1)):
        return ["on"]
    return [way for way in WAYS if way != "shuffled" or lanes > 1]


class Step(NamedTuple):
    """A segment that was read."""

    documents: Int[np.ndarray, " B"]
    """Which document each lane reads; -1 for none."""
    places: Int[np.ndarray, " B"]
    """Which of the document's segments this is."""
    segment: Segment
    output: SegmentOutput


def read(
    model: SegmentModel, rollouts: Iterable[Rollout], *, way: str, segments: Int[np.ndarray, " documents"]
) -> Iterator[Step]:
    """Every segment of a loader, read in one of ``WAYS``.

    Args:
        model: In evaluation mode.
        rollouts: Of one loader, from its first to its last.
        way: A key of ``WAYS``.
        segments: How many each document has.
    """
    device, state, places = next(model.parameters()).device, None, None
    for rollout in rollouts:
        for on_host, documents in zip(rollout.segments, rollout.documents.numpy(), strict=True):
            segment = Segment._make(field if field is None else field.to(device) for field in on_host)
            if state is None or places is None:
                state, places = detach(model.initial_state(len(documents))), np.zeros(len(documents), dtype=np.int64)
            places = np.where(on_host.document_start, 0, places)
            late = torch.from_numpy(2 * places >= segments[documents]).to(device)
            with torch.no_grad():
                output, state = WAYS[way](model, segment, state, late)
            yield Step(documents, places, segment, output)
            places = places + on_host.token_mask.any(1).numpy()


def costs(
    model: SegmentModel,
    rollouts: Mapping[str, Iterable[Rollout]],
    *,
    segments: Int[np.ndarray, " documents"],
    shown: Collection[int],
) -> Costs:
    """What documents cost.

    Args:
        model: In evaluation mode.
        rollouts: For each way all rollouts of the same loader, from its first to its last.
        segments: How many each document has.
        shown: Documents whose tokens are kept one by one.
    """
    bits, tokens = np.zeros((len(rollouts), len(segments), TENTHS)), np.zeros((len(segments), TENTHS), dtype=np.int64)
    rows: dict[int, list[list[np.ndarray]]] = {document: [[] for _ in rollouts] for document in shown}
    for place, (way, all_windows) in enumerate(rollouts.items()):
        for step in read(model, all_windows, way=way, segments=segments):
            reads = step.documents >= 0
            where = step.documents[reads], step.places[reads] * TENTHS // segments[step.documents[reads]]
            bits_BL = step.output.token_losses.double().cpu().numpy() / np.log(2)
            np.add.at(bits[place], where, bits_BL[reads].sum(1))
            if place == 0:
                np.add.at(tokens, where, step.segment.target_mask.sum(1).cpu().numpy()[reads])
            for lane, document in enumerate(step.documents.tolist()):
                if document in rows:
                    rows[document][place].append(bits_BL[lane].astype(np.float32))
    return Costs(bits, tokens, {document: np.array(own) for document, own in rows.items()})


def by_position(
    costs: Costs,
) -> tuple[Float[np.ndarray, "W P"], Float[np.ndarray, "W P"], Float[np.ndarray, "W P"]]:
    """Bits per token of each way in each tenth, and how many more than the first way: the mean over documents and its
    standard error (NaN for fewer than two). NaN in tenths without tokens, as where all documents are short."""
    tokens = np.where(costs.tokens > 0, costs.tokens, np.nan)
    pooled = costs.bits.sum(1) / np.where(costs.tokens.sum(0) > 0, costs.tokens.sum(0), np.nan)
    more = (costs.bits - costs.bits[0]) / tokens
    documents = (costs.tokens > 0).sum(0)
    mean = np.nansum(more, axis=1) / np.where(documents > 0, documents, np.nan)
    spread = np.nansum((more - mean[:, None]) ** 2, axis=1) / np.where(documents > 1, documents - 1, np.nan)
    return pooled, mean, np.sqrt(spread / np.maximum(documents, 1))
