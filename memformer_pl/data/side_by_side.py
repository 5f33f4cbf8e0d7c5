"""Documents that are streamed, several at a time: each lane reads one after the other, none is held."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Integer

from memformer_pl.recurrence import Segment

Tokens = Integer[np.ndarray, " _"]
NOTHING = "", 0, np.empty(0, dtype=np.int64)
"""What a lane reads that has run out."""


class Step(NamedTuple):
    """A segment of as many documents as there are lanes."""

    segment: Segment
    names: Sequence[str]
    """Of the document that each lane reads; empty where it has run out."""
    firsts: Sequence[int]
    """The first token of each lane's segment, counted from the start of its document."""


def steps(documents: Iterable[tuple[str, Iterable[Tokens]]], *, lanes: int, length: int) -> Iterator[Step]:
    """Segments of documents; the next document goes to the lane that is free first.

    Args:
        documents: Name and tokens of each, the tokens in parts of any size.
        lanes: Documents that are read side by side.
        length: Tokens of a segment, the last one of a document aside.
    """
    waiting = iter(documents)
    reading = [_lane(waiting, length) for _ in range(lanes)]
    while True:
        read = [next(lane, NOTHING) for lane in reading]
        count_B = torch.tensor([len(tokens) for _, _, tokens in read])
        if not count_B.any():
            return
        token_BL = np.zeros((lanes, length), dtype=np.int64)
        for row, (_, _, tokens) in zip(token_BL, read, strict=True):
            row[: len(tokens)] = tokens
        names, firsts, _ = zip(*read, strict=True)
        starts_B = (torch.tensor(firsts) == 0) & (count_B > 0)
        yield Step(
            Segment(torch.from_numpy(token_BL), torch.arange(length) < count_B[:, None], starts_B), names, firsts
        )


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
