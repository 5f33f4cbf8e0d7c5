"""Gradients of losses with respect to earlier memories, by exact back-propagation over a long rollout.

T  segments of the rollout     B  lanes     L  tokens in a segment
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memformer_pl.contract import Segment, SegmentModel, State, as_state, carries_gradient, detach
from memformer_pl.data import PackedDocuments

SPAN, DOCUMENTS = 32, 8
"""Largest number of segments of a rollout, and of documents."""


def gradient_norms(
    model: SegmentModel,
    segments: Sequence[Segment],
    state: State,
    *,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Float[np.ndarray, "B T T"]:
    """Norm of d loss(t) / d state(t - n) for each lane, with a row for each t and a column for each n; NaN for n > t.

    ``loss(t)`` is the mean loss of segment t in nats per token, and ``state(t)`` the floating-point and complex fields
    of the state before segment t, so n = 0 is the memory that the segment itself reads. Holds the graph of all
    segments.

    Args:
        model: A model in evaluation mode.
        segments: Segments in each of which every lane follows the same document, and no document starts.
        state: State before the first segment.
        track: Wraps an iterable to show progress.
    """
    lanes, span = len(segments[0].document_start), len(segments)
    memories: list[list[Tensor]] = []
    losses: list[Tensor] = []
    with torch.enable_grad():
        state = as_state(state, (field.detach().requires_grad_(carries_gradient(field)) for field in state))
        for segment in segments:
            memories.append([field for field in state if carries_gradient(field)])
            output, state = model(segment, state)
            # lanes are independent, so the gradient of their sum has those of all
            losses.append((output.token_losses.sum(1) / segment.target_mask.sum(1).clamp(min=1)).sum())
        norms = np.full((lanes, span, span), np.nan)
        for t in track(range(span)):
            inputs = [field for fields in memories[: t + 1] for field in fields]
            grads = torch.autograd.grad(losses[t], inputs, retain_graph=True, allow_unused=True)
            zero = torch.zeros(lanes, device=losses[t].device)
            squares = [zero if grad is None else grad.abs().float().square().flatten(1).sum(1) for grad in grads]
            fields = len(memories[0])
            for n in range(t + 1):
                norms[:, t, n] = sum(squares[(t - n) * fields : (t - n + 1) * fields]).sqrt().cpu().numpy()  # type: ignore[union-attr]
    return norms


def rollout_of(
    documents: PackedDocuments, *, segment_length: int, device: torch.device
) -> tuple[list[Segment], Int[np.ndarray, " B"]]:
    """Build a rollout for :func:`through_time`, twice as long as the gradients reach.

    Returns:
        Whole segments from the start of each document, and the numbers of these documents: the first ``DOCUMENTS`` that
        have twice ``SPAN`` segments, or the longest ones if none has. No segments if all documents are too short.
    """
    whole = documents.lengths // segment_length
    span = min(SPAN, int(whole.max(initial=0)) // 2)
    chosen = np.flatnonzero(whole >= 2 * span)[:DOCUMENTS]
    texts = [documents.document(document)[: 2 * span * segment_length] for document in chosen.tolist()]
    tokens = torch.from_numpy(np.stack(texts).astype(np.int64)).to(device)
    token_mask = torch.ones(len(chosen), segment_length, dtype=torch.bool, device=device)
    parts = torch.split(tokens, segment_length, dim=1) if span else ()
    return [
        Segment(part, token_mask, torch.full_like(token_mask[:, 0], t == 0)) for t, part in enumerate(parts)
    ], chosen


def through_time(
    model: SegmentModel,
    documents: PackedDocuments,
    *,
    segment_length: int,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Float[np.ndarray, "B T T"]:
    """:func:`gradient_norms` over the second half of :func:`rollout_of`, after a first half without gradients.

    Empty if the model has no memory, or all documents are too short.
    """
    device = next(model.parameters()).device
    segments, chosen = rollout_of(documents, segment_length=segment_length, device=device)
    state = detach(model.initial_state(len(chosen)))
    if not segments or not model.has_memory():
        return np.empty((0, 0, 0))
    half = len(segments) // 2
    with torch.no_grad():
        for segment in segments[:half]:
            state = model.advance(segment, state)
    return gradient_norms(model, segments[half:], state, track=track)


def by_distance(norms: Float[np.ndarray, "B T T"]) -> Float[np.ndarray, "3 T"]:
    """Lower quartile, median and upper quartile over lanes and segments, for each distance."""
    return np.asarray(np.nanquantile(norms, (0.25, 0.5, 0.75), axis=(0, 1)))
