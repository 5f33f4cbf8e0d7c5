"""Stream documents into batches of segments without holding any document: each lane reads one after another."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from memformer_pl.contract import Segment
from memformer_pl.data.tokenizers.alignment import NO_TOKENS, Aligned


class SegmentBatch(NamedTuple):
    """The next segment of every lane that still has a document."""

    segment: Segment
    names: Sequence[str]
    """Name of the document in each lane."""
    parts: Sequence[Aligned]
    """Tokens of each lane's segment, with their bytes."""
    firsts: Sequence[int]
    """Position in its document of the first token of each lane's segment."""
    previous_lanes: Sequence[int]
    """Index that each lane had in the previous batch; a lane disappears when no document is left for it."""


def batch_segments(
    documents: Iterable[tuple[str, Iterable[Aligned]]], *, lanes: int, segment_length: int
) -> Iterator[SegmentBatch]:
    """Yield the segments of documents in batches; the next document goes to the lane that is free first.

    Args:
        documents: Name and tokens of each document; the tokens come in parts of any size.
        lanes: Documents that are read in parallel.
        segment_length: Tokens of a segment; the last segment of a document may be shorter.
    """
    waiting = iter(documents)
    active = [_lane(waiting, segment_length) for _ in range(lanes)]
    while True:
        read = [(index, lane, next(lane, None)) for index, lane in enumerate(active)]
        remaining = [(index, lane, part) for index, lane, part in read if part is not None]
        if not remaining:
            return
        previous_lanes, active = [index for index, _, _ in remaining], [lane for _, lane, _ in remaining]
        names, firsts, parts = zip(*(part for _, _, part in remaining), strict=True)
        segment = _segment([part.tokens for part in parts], firsts, segment_length)
        yield SegmentBatch(segment, names, parts, firsts, previous_lanes)


def _segment(tokens: Sequence[np.ndarray], firsts: Sequence[int], segment_length: int) -> Segment:
    token_BL = np.zeros((len(tokens), segment_length), dtype=np.int64)
    for row, lane_tokens in zip(token_BL, tokens, strict=True):
        row[: len(lane_tokens)] = lane_tokens
    token_mask_BL = torch.arange(segment_length) < torch.tensor([[len(lane_tokens)] for lane_tokens in tokens])
    continues = all(first > 0 for first in firsts)
    return Segment(torch.from_numpy(token_BL), token_mask_BL, torch.tensor(firsts) == 0, continues=continues)


def _lane(waiting: Iterator[tuple[str, Iterable[Aligned]]], segment_length: int) -> Iterator[tuple[str, int, Aligned]]:
    for name, parts in waiting:
        for number, segment in enumerate(_split(parts, segment_length)):
            yield name, number * segment_length, segment


def _split(parts: Iterable[Aligned], segment_length: int) -> Iterator[Aligned]:
    """Regroup the tokens of a document into segments."""
    rest = Aligned(NO_TOKENS, NO_TOKENS, b"")
    for part in parts:
        tokens, sizes = np.concatenate((rest.tokens, part.tokens)), np.concatenate((rest.sizes, part.sizes))
        content, start = rest.content + part.content, 0
        for first in range(0, len(tokens) - segment_length + 1, segment_length):
            last = first + segment_length
            end = start + int(sizes[first:last].sum())
            yield Aligned(tokens[first:last], sizes[first:last], content[start:end])
            start = end
        whole = len(tokens) // segment_length * segment_length
        rest = Aligned(tokens[whole:], sizes[whole:], content[start:])
    if len(rest.tokens):
        yield rest
