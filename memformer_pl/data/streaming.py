"""Documents that are streamed, several at a time: each lane reads one after the other, none is held."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from memformer_pl.contract import Segment
from memformer_pl.data.tokenizers.alignment import NO_TOKENS, Aligned


class Step(NamedTuple):
    """A segment of each document that is being read."""

    segment: Segment
    names: Sequence[str]
    """Of the document that each lane reads."""
    parts: Sequence[Aligned]
    """The tokens of each lane's segment, and their bytes."""
    firsts: Sequence[int]
    """The first token of each lane's segment, counted from the start of its document."""
    kept: Sequence[int]
    """The places that these lanes had in the step before: a lane goes once there is no document left for it."""


def steps(documents: Iterable[tuple[str, Iterable[Aligned]]], *, lanes: int, length: int) -> Iterator[Step]:
    """Segments of documents; the next document goes to the lane that is free first.

    Args:
        documents: Name and tokens of each, the tokens in parts of any size.
        lanes: Documents that are read side by side.
        length: Tokens of a segment, the last one of a document aside.
    """
    waiting = iter(documents)
    lanes_left = [_lane(waiting, length) for _ in range(lanes)]
    while True:
        read = [(place, lane, next(lane, None)) for place, lane in enumerate(lanes_left)]
        going = [(place, lane, part) for place, lane, part in read if part is not None]
        if not going:
            return
        kept, lanes_left = [place for place, _, _ in going], [lane for _, lane, _ in going]
        names, firsts, parts = zip(*(part for _, _, part in going), strict=True)
        yield Step(_segment([part.tokens for part in parts], firsts, length), names, parts, firsts, kept)


def _segment(tokens: Sequence[np.ndarray], firsts: Sequence[int], length: int) -> Segment:
    token_BL = np.zeros((len(tokens), length), dtype=np.int64)
    for row, own in zip(token_BL, tokens, strict=True):
        row[: len(own)] = own
    present_BL = torch.arange(length) < torch.tensor([[len(own)] for own in tokens])
    return Segment(torch.from_numpy(token_BL), present_BL, torch.tensor(firsts) == 0)


def _lane(waiting: Iterator[tuple[str, Iterable[Aligned]]], length: int) -> Iterator[tuple[str, int, Aligned]]:
    for name, parts in waiting:
        for number, segment in enumerate(_segments(parts, length)):
            yield name, number * length, segment


def _segments(parts: Iterable[Aligned], length: int) -> Iterator[Aligned]:
    rest = Aligned(NO_TOKENS, NO_TOKENS, b"")
    for part in parts:
        tokens, sizes = np.concatenate((rest.tokens, part.tokens)), np.concatenate((rest.sizes, part.sizes))
        content, start = rest.content + part.content, 0
        for first in range(0, len(tokens) - length + 1, length):
            end = start + int(sizes[first : first + length].sum())
            yield Aligned(tokens[first : first + length], sizes[first : first + length], content[start:end])
            start = end
        left = len(tokens) // length * length
        rest = Aligned(tokens[left:], sizes[left:], content[start:])
    if len(rest.tokens):
        yield rest
