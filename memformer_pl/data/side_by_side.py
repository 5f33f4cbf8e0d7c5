"""Documents that are streamed, several at a time: each lane reads one after the other, none is held."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Integer

from memformer_pl.recurrence import Segment

Tokens = Integer[np.ndarray, " _"]


class Step(NamedTuple):
    """A segment of each document that is being read."""

    segment: Segment
    names: Sequence[str]
    """Of the document that each lane reads."""
    firsts: Sequence[int]
    """The first token of each lane's segment, counted from the start of its document."""
    kept: Sequence[int]
    """The places that these lanes had in the step before: a lane goes once there is no document left for it."""


def steps(documents: Iterable[tuple[str, Iterable[Tokens]]], *, lanes: int, length: int) -> Iterator[Step]:
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
        names, firsts, tokens = zip(*(part for _, _, part in going), strict=True)
        yield Step(_segment(tokens, firsts, length), names, firsts, kept)


def _segment(tokens: Sequence[Tokens], firsts: Sequence[int], length: int) -> Segment:
    token_BL = np.zeros((len(tokens), length), dtype=np.int64)
    for row, own in zip(token_BL, tokens, strict=True):
        row[: len(own)] = own
    present_BL = torch.arange(length) < torch.tensor([[len(own)] for own in tokens])
    return Segment(torch.from_numpy(token_BL), present_BL, torch.tensor(firsts) == 0)


def _lane(waiting: Iterator[tuple[str, Iterable[Tokens]]], length: int) -> Iterator[tuple[str, int, Tokens]]:
    for name, parts in waiting:
        for number, tokens in enumerate(_segments(parts, length)):
            yield name, number * length, tokens


def _segments(parts: Iterable[Tokens], length: int) -> Iterator[Tokens]:
    rest = np.empty(0, dtype=np.int64)
    for part in parts:
        rest = np.concatenate((rest, part))
        whole = len(rest) // length
        yield from rest[: whole * length].reshape(whole, length)
        rest = rest[whole * length :]
    if len(rest):
        yield rest
