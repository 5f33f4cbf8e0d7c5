"""How much a loss depends on memories further and further back: exact back-propagation, over more segments than a
rollout of training has.

T  segments of the rollout     B  lanes     L  tokens in a segment
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memformer_pl.contract import Segment, SegmentModel, State, as_state, carries_gradient, detach, has_memory
from memformer_pl.data import PackedDocuments

SPAN, DOCUMENTS = 32, 8
"""The most segments of a rollout, and the most documents."""


def gradient_norms(
    model: SegmentModel,
    segments: Sequence[Segment],
    state: State,
    *,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Float[np.ndarray, "B T T"]:
    """The norm of d loss(t) / d state(t - n) in each lane, with t down and n to the right; NaN where n > t.

    ``loss(t)`` is the mean of a segment's tokens in nats, ``state(t)`` all numbers of a lane, integers aside, with
    which segment t is entered: so n = 0 is the memory that the segment itself meets. Holds the graph of all segments.

    Args:
        model: In evaluation mode.
        segments: All lanes read one document in them, which starts in none of them.
        state: The one that the first segment is entered with.
        track: Shows progress over an iterable.
    """
    lanes, span = len(segments[0].document_start), len(segments)
    entering: list[list[Tensor]] = []
    losses: list[Tensor] = []
    with torch.enable_grad():
        state = as_state(state, (field.detach().requires_grad_(carries_gradient(field)) for field in state))
        for segment in segments:
            entering.append([field for field in state if carries_gradient(field)])
            output, state = model(segment, state)
            # lanes do not depend on each other, so one sum has the gradients of all
            losses.append((output.token_losses.sum(1) / segment.target_mask.sum(1).clamp(min=1)).sum())
        norms = np.full((lanes, span, span), np.nan)
        for t in track(range(span)):
            memories = [field for fields in entering[: t + 1] for field in fields]
            grads = torch.autograd.grad(losses[t], memories, retain_graph=True, allow_unused=True)
            none = torch.zeros(lanes, device=losses[t].device)
            squares = [none if grad is None else grad.abs().float().square().flatten(1).sum(1) for grad in grads]
            each = len(entering[0])
            for n in range(t + 1):
                norms[:, t, n] = sum(squares[(t - n) * each : (t - n + 1) * each]).sqrt().cpu().numpy()  # type: ignore[union-attr]
    return norms


def window_of(
    documents: PackedDocuments, *, segment_length: int, device: torch.device
) -> tuple[list[Segment], Int[np.ndarray, " B"]]:
    """Twice as many segments as the gradient is taken over: the first half is read without a graph.

    Returns:
        Whole segments from the beginning of each document, and which documents these are: the first ``DOCUMENTS`` that
        are long enough for twice ``SPAN``, or the longest where none is. No segments where all documents are too short.
    """
    whole = documents.lengths // segment_length
    span = min(SPAN, int(whole.max(initial=0)) // 2)
    chosen = np.flatnonzero(whole >= 2 * span)[:DOCUMENTS]
    texts = [documents.document(document)[: 2 * span * segment_length] for document in chosen.tolist()]
    tokens = torch.from_numpy(np.stack(texts).astype(np.int64)).to(device)
    present = torch.ones(len(chosen), segment_length, dtype=torch.bool, device=device)
    parts = torch.split(tokens, segment_length, dim=1) if span else ()
    return [Segment(part, present, torch.full_like(present[:, 0], t == 0)) for t, part in enumerate(parts)], chosen


def through_time(
    model: SegmentModel,
    documents: PackedDocuments,
    *,
    segment_length: int,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Float[np.ndarray, "B T T"]:
    """:func:`gradient_norms` over the second half of :func:`window_of`; empty where there is nothing to take it of."""
    device = next(model.parameters()).device
    segments, chosen = window_of(documents, segment_length=segment_length, device=device)
    state = detach(model.initial_state(len(chosen)))
    if not segments or not has_memory(state):
        return np.empty((0, 0, 0))
    half = len(segments) // 2
    with torch.no_grad():
        for segment in segments[:half]:
            state = model.advance(segment, state)
    return gradient_norms(model, segments[half:], state, track=track)


def by_distance(norms: Float[np.ndarray, "B T T"]) -> Float[np.ndarray, "3 T"]:
    """The lower quartile, median and upper quartile over lanes and segments, for each distance."""
    return np.asarray(np.nanquantile(norms, (0.25, 0.5, 0.75), axis=(0, 1)))
