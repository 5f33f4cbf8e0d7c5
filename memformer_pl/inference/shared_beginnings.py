"""Read many texts, and each beginning that several of them share only once.

Texts are cut into segments from their first token, so texts with a common beginning have common segments. They form a
tree: a segment is read once, by a session that has read what precedes it, and that session is copied for each text that
goes on differently. Segments of different texts are read side by side, as lanes of one session.

T  tokens
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from memformer_pl.contract import SegmentModel
from memformer_pl.errors import NonFiniteError, require_sizes
from memformer_pl.inference.session import Session


class Text(NamedTuple):
    """A text, and what is to be known of it."""

    tokens: Int64[Tensor, " T"]
    scored: int
    """The first token that counts in the score; their number if none does."""


class Read(NamedTuple):
    """A text that has been read."""

    text: int
    """Its place among the texts."""
    nats: float
    """The loss of all tokens that count, in double precision."""
    greedy: bool
    """Whether each of them was the most likely token."""
    session: Session
    """A session of one lane that has read the text."""


@dataclass
class Piece:
    """A segment in the tree, or the beginning of one at the end of a text."""

    tokens: Int64[Tensor, " T"]
    following: dict[bytes, "Piece"] = field(default_factory=dict)
    texts: dict[int, int] = field(default_factory=dict)
    """The texts that have tokens here that count, with the first of these."""
    ends: list[int] = field(default_factory=list)
    """The texts that end here."""


class Ready(NamedTuple):
    """A piece, and a session of one lane that has read what precedes it."""

    piece: Piece
    session: Session


def read_texts(model: SegmentModel, texts: Sequence[Text], *, lanes: int) -> Iterator[Read]:
    """Read texts with a model in evaluation mode; yields each as soon as it has been read, in any order.

    A piece without tokens that count goes into the state and is not predicted. Branches are read depth first, so few
    copies of a state exist at a time.

    Args:
        model: The model.
        texts: The texts. A text without tokens is read at once.
        lanes: Pieces that are read side by side.

    Raises:
        UsageError: The model is in training mode, or a token is outside its vocabulary.
        NonFiniteError: A loss is NaN.
    """
    require_sizes(lanes=lanes)
    start = Session(model)
    root = tree(texts, segment_length=model.segment_length)
    nats, greedy = [0.0] * len(texts), [True] * len(texts)
    unscored: list[Ready] = []
    scored: list[Ready] = []
    yield from (Read(index, 0.0, True, start) for index in root.ends)
    after = [Ready(piece, start) for piece in root.following.values()]
    while after or unscored or scored:
        for ready in after:
            (scored if ready.piece.texts else unscored).append(ready)
        pool = scored if len(scored) >= lanes or not unscored else unscored
        batch, after = pool[-lanes:], []
        del pool[-lanes:]
        for piece, session in read_pieces(batch, nats, greedy):
            yield from (Read(index, nats[index], greedy[index], session) for index in piece.ends)
            after.extend(Ready(following, session) for following in piece.following.values())


def read_pieces(batch: Sequence[Ready], nats: list[float], greedy: list[bool]) -> list[Ready]:
    """Read pieces side by side; returns them with the sessions that have read them, too.

    Args:
        batch: The pieces.
        nats: The loss of each text so far; is added to.
        greedy: Whether so far each token that counts was the most likely one.
    """
    pieces = [ready.piece for ready in batch]
    session = Session.joined([ready.session for ready in batch])
    tokens = torch.nn.utils.rnn.pad_sequence([piece.tokens for piece in pieces], batch_first=True)
    token_mask = torch.arange(tokens.shape[1]) < torch.tensor([[len(piece.tokens)] for piece in pieces])
    if not any(piece.texts for piece in pieces):
        session.feed(tokens, token_mask)
    else:
        scores = session.score(tokens, token_mask)
        if scores.token_losses.isnan().any():
            raise NonFiniteError("a loss is NaN: the model's weights are not finite")
        for lane, piece in enumerate(pieces):
            for index, first in piece.texts.items():
                there = slice(first, len(piece.tokens))
                nats[index] += float(scores.token_losses[lane, there].sum())
                greedy[index] = greedy[index] and bool(scores.correct[lane, there].all())
    return [Ready(piece, session.select([lane])) for lane, piece in enumerate(pieces)]


def tree(texts: Sequence[Text], *, segment_length: int) -> Piece:
    """The pieces of all texts, below one without tokens."""
    root = Piece(torch.empty(0, dtype=torch.int64))
    for index, text in enumerate(texts):
        piece = root
        for start in range(0, len(text.tokens), segment_length):
            tokens = text.tokens[start : start + segment_length]
            piece = piece.following.setdefault(tokens.numpy().tobytes(), Piece(tokens))
            first = max(text.scored - start, 0)
            if first < len(tokens):
                piece.texts[index] = first
        piece.ends.append(index)
    return root
